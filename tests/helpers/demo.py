"""One order for the demo model, and its right plan."""

from __future__ import annotations

import demo_task

__all__ = ["PLAN", "PROMPT", "demo_task"]


PROMPT = "take red cups from kitchen to garage, then hand blue pens to Mia, and clean hall with mop"


PLAN = [
    {"do": "move", "item": "cups", "color": "red", "from": "kitchen", "to": "garage"},
    {"do": "give", "item": "pens", "color": "blue", "for": "Mia"},
    {"do": "clean", "in": "hall", "with": "mop"},
]
