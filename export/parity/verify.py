"""Parity of an artifact with the PyTorch reference, stage by stage (`stages.py`): weights, range, logits,
cache, decode. A quantised artifact has stages of its own: weights, canvases, quality.

The artifact's own graphs are run, with the logits exposed as an output where they are not one. ONNX Runtime
has no bf16 on a CPU: a bf16 artifact is verified through an fp32 twin, exported from the same checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import transformers

from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import Manifest
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.cli import render
from trt_runtime.errors import DllmError
from trt_runtime.optional import import_optional
from trt_runtime.system import commands

from .. import pipeline
from ..quantize import gate as quality
from . import bisect as layers
from . import stages, verify_graphs
from .reference import TorchBackend, origin, source_of
from .stages import Stage


def verify(
    artifact: Path,
    checkpoint: str | None = None,
    doing: Callable[[str], object] = lambda what: None,
    *,
    with_polygraphy: bool = False,
) -> Iterator[Stage]:
    """Yield the stages as they finish, and then write the result into the manifest. doing: called with a
    description of each step before it runs. with_polygraphy: one more stage, Polygraphy's Comparator
    (export/debug/runners.py). Raises DllmError."""
    manifest = manifests.load(artifact, check_hashes=True)
    is_quantised = manifest.quantization is not None
    if with_polygraphy and is_quantised:
        raise DllmError(
            f"{artifact}: is quantised, so its outputs differ from PyTorch's: remove --with-polygraphy."
        )
    finished = []
    for stage in (_quantized if is_quantised else _exact)(artifact, checkpoint, manifest, doing):
        finished.append(stage)
        yield stage
    if with_polygraphy:
        doing("polygraphy: the same calls on its runner, ours and PyTorch")
        finished.append(_polygraphy(artifact, checkpoint))
        yield finished[-1]
    _write(artifact, manifest, finished)


def bisect(artifact: Path, checkpoint: str | None = None) -> dict[str, list[layers.LayerDifference]]:
    """Compare layer by layer, for a prefix pass and a refine step, to find where a failure begins. Raises
    DllmError."""
    if manifests.load(artifact).quantization is not None:
        raise DllmError(
            f"{artifact}: is quantised, so its layers differ from PyTorch's: check the artifact exported "
            f"without --quantize."
        )
    with opened(artifact, checkpoint) as (runnable, reference):
        calls = verify_graphs.calls_of(
            reference.manifest, np.random.default_rng(0), min(31, reference.manifest.model.max_length)
        )
        return layers.compare(runnable, reference, calls, verify_graphs.exposed)


@contextmanager
def opened(artifact: Path, checkpoint: str | None) -> Iterator[tuple[Path, TorchBackend]]:
    """The artifact in a form that can be compared here (a bf16 one, and a 16-bit one with experts, as its
    fp32 twin), and the reference in fp32."""
    manifest = manifests.load(artifact)
    reference = TorchBackend(
        artifact, checkpoint=checkpoint, dtype="fp32", threads=quality.threads_of(manifest.model.parameters)
    )
    with tempfile.TemporaryDirectory() as temporary:
        twin = fp32_twin(manifest, checkpoint, Path(temporary)) if needs_twin(manifest) else artifact
        yield twin, reference


def needs_twin(manifest: Manifest) -> bool:
    """Whether an artifact is compared as its fp32 twin, with the same graph: ONNX Runtime runs no bf16 on a
    CPU, and in 16 bits rows that pass other experts differ by more than rounding."""
    has_experts = manifest.model.experts is not None
    return manifest.model.dtype == "bf16" or (has_experts and manifest.model.dtype != "fp32")


def _exact(
    artifact: Path, checkpoint: str | None, manifest: Manifest, doing: Callable[[str], object]
) -> Iterator[Stage]:
    """The stages of an artifact that must agree with PyTorch within rounding."""
    doing("opening the reference" + (" and exporting an fp32 twin" if needs_twin(manifest) else ""))
    with opened(artifact, checkpoint) as (runnable, reference):
        doing("weights: comparing every tensor with the checkpoint's")
        yield stages.weights_stage(artifact, reference.source, manifest)
        doing("range, logits and cache: running both graphs and the reference")
        worst, engine = verify_graphs.compare(runnable, reference)
        yield stages.range_stage(worst.ranges, manifest.model.dtype, manifest.weight_maxima)
        yield from stages.logits_and_cache(worst, engine.manifest.model.dtype)
        if manifest.model.experts is not None:
            doing("experts: comparing which experts each row passes")
            yield stages.experts_stage(runnable, reference)
            if manifest.model.dtype == "fp16":
                yield stages.experts_stage(artifact, reference, "experts in fp16")
        doing("decode: recording cases with the reference, and replaying them")
        yield stages.decode_stage(engine, reference, manifest)
        if manifest.decoding.is_block_causal:
            doing("blocks: decoding naively in PyTorch, and comparing the cached decoding with it")
            yield stages.blocks_stage(engine, reference)


def _quantized(
    artifact: Path, checkpoint: str | None, manifest: Manifest, doing: Callable[[str], object]
) -> Iterator[Stage]:
    """The stages of a quantised artifact, which cannot agree within rounding: its weights and graphs must be
    those that this version makes from the checkpoint, and it must have passed the export's gate."""
    source = source_of(manifest, checkpoint, artifact)
    doing("weights: quantising the checkpoint again, and comparing every tensor")
    yield stages.weights_stage(artifact, source, manifest)
    assert manifest.quantization is not None
    if different := stages.different_facts(source, artifact, manifest):
        yield Stage("decode", False, {"first": different}, "export it again")
    yield stages.canvases_stage(artifact, manifest)
    measured = manifest.quantization.quality
    advice = "" if measured else "its quality was not measured: export it with --data and --gate yes"
    summary = render.quality(measured) if measured else ""
    yield Stage("quality", measured is not None, measured or {}, advice, summary)


def _polygraphy(artifact: Path, checkpoint: str | None) -> Stage:
    install = commands.install("debug")
    runners = import_optional("export.debug.runners", "verify --with-polygraphy", install)
    with opened(artifact, checkpoint) as (runnable, reference):
        engine = OrtBackend(runnable, threads=quality.threads_of(reference.manifest.model.parameters))
        passed, measured, failure = runners.stage(runnable, engine, reference)
        engine.close()
    return Stage("polygraphy", passed, measured, failure)


def fp32_twin(manifest: Manifest, checkpoint: str | None, directory: Path) -> Path:
    """The artifact's checkpoint exported in fp32, to be verified in place of a bf16 artifact on a CPU."""
    told, twin = origin(manifest, checkpoint), directory / "fp32-twin"
    config = pipeline.ExportConfig(
        told.checkpoint,
        twin,
        lowering=manifest.lowering,
        ignored_keys=told.ignored_keys,
        mask_token=told.mask_token,
        attention=told.attention,
        block_length=told.block_length,
        target=manifests.ORT_CPU if manifest.is_for_cpu else None,
    )
    pipeline.export(config, lambda total: lambda done: None)
    return twin


def _write(artifact: Path, manifest: Manifest, finished: list[Stage]) -> None:
    against = f"transformers {transformers.__version__} on PyTorch {torch.__version__}, fp32, CPU"
    backend = f"onnxruntime {onnxruntime.__version__}" + (", fp32 twin" if needs_twin(manifest) else "")
    if manifest.quantization is not None:
        against = "the checkpoint, quantised again by this version, and the quality that its export measured"
    verified = {
        "passed": all(stage.passed for stage in finished),
        "against": against,
        "backend": backend,
        "stages": {stage.name: {"passed": stage.passed, **stage.measured} for stage in finished},
    }
    manifests.update(artifact, lambda current: replace(current, verified=verified), since=manifest)
