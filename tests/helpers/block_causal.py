"""Checkpoints with block-causal attention whose official decoding was recorded, and how they are exported."""

from __future__ import annotations

import json
from pathlib import Path

from places import GOLDENS, export_quietly

# the options of their export, and the number of recorded cases
TOLD = {"sdar": {}, "fastdllm_v2": {}, "a2d_qwen3": {"attention": "block_causal"}}
COUNTS = {"sdar": 59, "fastdllm_v2": 60, "a2d_qwen3": 25}


def recording_of(family: str) -> dict:
    """The file of recorded cases, as it stands."""
    return json.loads((GOLDENS / f"{family}_cases.json").read_text())


def export_tiny(family: str, out: Path, **options) -> Path:
    return export_quietly(GOLDENS / f"{family}_tiny", out, **TOLD[family], **options)
