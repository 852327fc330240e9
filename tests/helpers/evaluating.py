"""Evaluations on the tasks under tests/data/tasks."""

from __future__ import annotations

from places import ROOT

from trt_runtime.cli import main as cli

TASKS = ROOT / "tests" / "data" / "tasks"


def evaluate(artifact, *words):
    """Run `dllm-trt eval` on two questions per task; returns the exit status."""
    return cli.main(
        ["eval", str(artifact), "--include-path", str(TASKS), "--limit", "2", "--mc-samples", "2", *words]
    )
