"""Paths of the checkout and its checkpoints, and exports without output."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.pipeline import ExportConfig, export
from trt_runtime.errors import DllmError

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "data" / "goldens"
DEMO = ROOT / "checkpoints" / "llada-demo"
BLOCK_CAUSAL_DEMO = ROOT / "checkpoints" / "sdar-demo"


def export_quietly(checkpoint: Path, out: Path, **options) -> Path:
    export(ExportConfig(str(checkpoint), out, **options), lambda total: lambda done: None)
    return out


def refused(path, out, *parts: str, **options) -> None:
    """The export fails with one line that contains all `parts`, and leaves nothing at or next to `out`."""
    with pytest.raises(DllmError) as error:
        export_quietly(path, out, **options)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert not out.exists() and not [p for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")]
