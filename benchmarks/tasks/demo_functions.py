"""Offline tasks over the demo model's language, for `dllm-trt eval`: its own task, a needle in a long order,
and multiple choice by likelihood.

The orders are those of tools/demo_prompts.py: held out from training and the same on every run.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import demo_prompts
import demo_task
from datasets import Dataset

COUNT, CHOICES = 500, 4


def plans(**options: Any) -> dict[str, Dataset]:
    """Orders and their plans."""
    rows = [
        {"order": e.prompt, "plan": json.dumps(e.plan), "answer": e.answer}
        for e in demo_prompts.held_out(COUNT)
    ]
    return {"test": Dataset.from_list(rows)}


def needles(**options: Any) -> dict[str, Dataset]:
    """Orders with the thing and colour of one of their steps, which the answer must name together."""
    rows = []
    for row in plans()["test"]:
        steps = [step for step in json.loads(row["plan"]) if "item" in step]
        if steps:
            step = random.Random(row["order"]).choice(steps)
            rows.append({"order": row["order"], "item": step["item"], "color": step["color"]})
    return {"test": Dataset.from_list(rows)}


def choices(**options: Any) -> dict[str, Dataset]:
    """The right answer among others in which words were replaced by other words of their kind."""
    rows = []
    kinds = (demo_task.ITEMS, demo_task.COLORS, demo_task.ROOMS, demo_task.PEOPLE, demo_task.TOOLS)
    for row in plans()["test"]:
        rng = random.Random(row["order"])
        answers = {row["answer"]}
        while len(answers) < CHOICES:
            kind = rng.choice(kinds)
            replaceable = [word for word in kind if f'"{word}"' in row["answer"]]
            if replaceable:
                answers.add(row["answer"].replace(f'"{rng.choice(replaceable)}"', f'"{rng.choice(kind)}"', 1))
        offered = sorted(answers, key=lambda answer: rng.random())
        rows.append({"order": row["order"], "choices": offered, "right": offered.index(row["answer"])})
    return {"test": Dataset.from_list(rows)}


def plan_is_right(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"exact_match": float(demo_task.is_right(results[0], json.loads(doc["plan"])))}


def needle_is_found(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether one step of the answer names both."""
    try:
        steps = json.loads(results[0])
        is_named = any({doc["item"], doc["color"]} <= set(step.values()) for step in steps)
    except (ValueError, TypeError, AttributeError):
        is_named = False
    return {"found": float(is_named)}
