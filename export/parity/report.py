"""Run a verification for a command: print its stages as they finish, and return the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import ModelFacts
from trt_runtime.machine.roofline import MEMORY_LAYOUTS, Work, memory
from trt_runtime.system import program
from trt_runtime.system.progress import SILENT, Progress

Verification = tuple[bool, dict[str, Any]]


def verify(
    artifact: Path,
    checkpoint: str | None,
    *,
    say: Callable[[str], object] = print,
    progress: Progress = SILENT,
    with_polygraphy: bool = False,
) -> Verification:
    """Verify an artifact and print each stage. Returns whether all passed, and the manifest's `verified`."""
    with program.importing(), progress.task("loading PyTorch"):
        from .verify import verify as run_verification

    passed, is_quantised = True, manifests.load(artifact).quantization is not None
    say(f"verifying {artifact} against {'its checkpoint' if is_quantised else 'the PyTorch reference'}")
    with progress.task("hashing the artifact's files") as task:
        for stage in run_verification(artifact, checkpoint, task.doing, with_polygraphy=with_polygraphy):
            say(f"  {stage}")
            passed = passed and stage.passed
    where = "" if is_quantised else f"; 'dllm-trt verify {artifact} --layers' shows where it begins"
    say(
        "verified: the result is in the manifest"
        if passed
        else f"NOT VERIFIED: do not deploy this artifact{where}"
    )
    return passed, {"artifact": str(artifact), **(manifests.load(artifact).verified or {})}


def verify_layers(
    artifact: Path,
    checkpoint: str | None,
    *,
    say: Callable[[str], object] = print,
    progress: Progress = SILENT,
) -> Verification:
    """Compare the residual stream with the reference's, layer by layer, and print the tables. Returns whether
    all layers agree, and the rows of each kind of forward."""
    from .bisect import table
    from .verify import bisect

    with progress.task(f"comparing the layers of {artifact} with PyTorch's"):
        tables = bisect(artifact, checkpoint)
    for kind, rows in tables.items():
        say(f"{kind}: residual stream after each layer, compared with PyTorch's")
        for line in table(rows):
            say(f"  {line}")
    different = [f"{kind}: {row.name}" for kind, rows in tables.items() for row in rows if not row.passed]
    say(f"the first difference is at {different[0]}" if different else "all layers agree")
    layers = {kind: [asdict(row) | {"passed": row.passed} for row in rows] for kind, rows in tables.items()}
    return not different, {
        "artifact": str(artifact),
        "passed": not different,
        "first": different[0] if different else None,
        "layers": layers,
    }


def memory_needed(facts: ModelFacts) -> int:
    """Bytes of memory that a verification takes: the reference in fp32, and ONNX Runtime next to it."""
    dtype = (
        "fp32" if facts.dtype == "bf16" else facts.dtype
    )  # a bf16 artifact is verified through an fp32 twin
    work = Work(batch=2, length=64, block_length=32)
    return sum(
        memory(replace(facts, dtype=kind), work, layout, on_cpu=True).total
        for kind, layout in ((dtype, MEMORY_LAYOUTS[0]), ("fp32", MEMORY_LAYOUTS[-1]))
    )
