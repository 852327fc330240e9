"""Parity of an artifact with the PyTorch reference, stage by stage: weights, range, logits, cache, decode.

weights: every tensor of weights.data is the checkpoint's, converted. range: no activation of the reference
leaves the dtype's range.
logits: a prefix pass on both graphs. cache: what the pass and a refine step left in it, and the logits of the
step, which reads it.
decode: recorded cases of the reference, token by token.

The artifact's own graphs are run, with the logits exposed as an output where they are none. ONNX Runtime has
no bf16 on a CPU: a bf16 artifact is verified through an fp32 twin, exported from the same checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
import transformers

from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import Manifest
from trt_runtime.artifact.tokenizer import Tokenizer
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.cli import render
from trt_runtime.errors import DllmError
from trt_runtime.measure import replay as replays
from trt_runtime.measure import tolerances
from trt_runtime.measure.cases import random_cases
from trt_runtime.optional import import_optional
from trt_runtime.system import commands

from .. import pipeline, schemes
from ..quantize import gate as quality
from ..schemes.base import Calibration, Scheme
from ..weights import plan as weights
from ..weights import stream
from ..weights.sources import FP16_LARGEST
from . import bisect as layers
from . import verify_graphs
from .reference import TorchBackend, origin, source_of

_CANVASES = 3
_CASES = 12
_MOST_AMBIGUOUS = 0.25  # of the decisions

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Stage:
    """One question of the verification: what was compared, the worst that was seen, and whether it passes."""

    name: str
    passed: bool
    measured: dict[str, Any]
    advice: str = ""
    said: str = ""  # what was measured, in words; else the names and numbers themselves

    def __str__(self) -> str:
        shown = self.said or ", ".join(
            f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.measured.items()
        )
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {shown}" + (
            f" -- {self.advice}" if self.advice else ""
        )


def verify(
    artifact: Path,
    checkpoint: str | None = None,
    doing: Callable[[str], object] = lambda what: None,
    *,
    with_polygraphy: bool = False,
) -> Iterator[Stage]:
    """The stages, as they finish; `doing` is told what runs now. with_polygraphy: one more, by Polygraphy's
    Comparator (export/debug/runners.py). After the last, the result is written into the manifest. Raises
    DllmError."""
    manifest = manifests.load(artifact, check_hashes=True)
    stages, made = [], _stages if manifest.quantization is None else _quantized_stages
    if with_polygraphy and manifest.quantization is not None:
        raise DllmError(
            f"{artifact}: is quantised, and not to agree with PyTorch output by output: leave "
            f"--with-polygraphy out."
        )
    for stage in made(artifact, checkpoint, manifest, doing):
        stages.append(stage)
        yield stage
    if with_polygraphy:
        doing("polygraphy: the same calls on its runner, ours and PyTorch")
        stages.append(_polygraphy(artifact, checkpoint))
        yield stages[-1]
    _write(artifact, manifest, stages)


def _polygraphy(artifact: Path, checkpoint: str | None) -> Stage:
    mend = commands.install("debug")
    runners = import_optional("export.debug.runners", "verify --with-polygraphy", mend)
    with opened(artifact, checkpoint) as (runnable, reference):
        engine = OrtBackend(runnable, threads=quality.threads_of(reference.manifest.model.parameters))
        passed, measured, failure = runners.stage(runnable, engine, reference)
        engine.close()
    return Stage("polygraphy", passed, measured, failure)


@contextmanager
def opened(artifact: Path, checkpoint: str | None) -> Iterator[tuple[Path, TorchBackend]]:
    """The artifact as it can run here (a bf16 one as its fp32 twin), and the reference in fp32."""
    manifest = manifests.load(artifact)
    reference = TorchBackend(
        artifact, checkpoint=checkpoint, dtype="fp32", threads=quality.threads_of(manifest.model.parameters)
    )
    with tempfile.TemporaryDirectory() as temporary:
        yield (
            artifact if manifest.model.dtype != "bf16" else fp32_twin(manifest, checkpoint, Path(temporary)),
            reference,
        )


def bisect(artifact: Path, checkpoint: str | None = None) -> dict[str, list[layers.LayerDifference]]:
    """Layer by layer, for a prefix pass and a refine step: where a failure begins. Raises DllmError."""
    if manifests.load(artifact).quantization is not None:
        raise DllmError(
            f"{artifact}: is quantised, and not to agree layer by layer: look at the artifact without "
            f"--quantize."
        )
    with opened(artifact, checkpoint) as (runnable, reference):
        calls = verify_graphs.calls_of(
            reference.manifest, np.random.default_rng(0), min(31, reference.manifest.model.max_length)
        )
        return layers.compare(runnable, reference, calls, verify_graphs.exposed)


def _stages(
    artifact: Path, checkpoint: str | None, manifest: Manifest, doing: Callable[[str], object]
) -> Iterator[Stage]:
    doing("opening the reference" + (" and exporting an fp32 twin" if manifest.model.dtype == "bf16" else ""))
    with opened(artifact, checkpoint) as (runnable, reference):
        doing("weights: comparing every tensor with the checkpoint's")
        yield _weights(artifact, reference.source, manifest)
        doing("range, logits and cache: running both graphs and the reference")
        worst, engine = verify_graphs.compare(runnable, reference)
        dtype = engine.manifest.model.dtype
        yield _range(worst.ranges, manifest.model.dtype, manifest.weight_maxima)
        allowed = tolerances.LOGITS[dtype]
        logits_ok = worst.logits <= allowed and worst.same <= tolerances.SAME_GRAPH[dtype]
        yield Stage(
            "logits",
            logits_ok,
            {"worst": worst.logits, "prefix against refine graph": worst.same, "allowed": allowed},
        )
        cache_ok = worst.caches <= tolerances.CACHE[dtype] and worst.refine_logits <= allowed
        measured = {
            "worst": worst.caches,
            "allowed": tolerances.CACHE[dtype],
            "refine logits": worst.refine_logits,
            "allowed for logits": allowed,
        }
        yield Stage("cache", cache_ok, measured)
        doing("decode: recording cases with the reference, and following them")
        yield _decode(engine, reference, manifest, dtype)


def _quantized_stages(
    artifact: Path, checkpoint: str | None, manifest: Manifest, doing: Callable[[str], object]
) -> Iterator[Stage]:
    """What is quantised is not to agree within rounding: its weights and graphs must be those that this
    version makes of the checkpoint, and the gate of the export must have been passed."""
    source = source_of(manifest, checkpoint, artifact)
    doing("weights: quantising the checkpoint again, and comparing every tensor")
    yield _weights(artifact, source, manifest)
    assert manifest.quantization is not None
    if different := _different_facts(source, artifact, manifest):
        yield Stage("decode", False, {"first": different}, "export it again")
    yield _canvases(artifact, manifest)
    measured = manifest.quantization.quality
    advice = "" if measured else "its quality was not measured: export it with --data and --gate yes"
    yield Stage(
        "quality", measured is not None, measured or {}, advice, render.quality(measured) if measured else ""
    )


def _canvases(artifact: Path, manifest: Manifest) -> Stage:
    """What this machine computes is what the graphs say."""
    dtype = manifest.model.dtype
    if dtype == "bf16":
        return Stage(
            "canvases",
            True,
            {
                "run": "no: ONNX Runtime computes no bf16 on a CPU; the graphs are those that this version "
                "makes"
            },
        )
    assert manifest.quantization is not None
    worst, allowed = (
        verify_graphs.compare_quantised(artifact, manifest),
        tolerances.QUANTIZED_GRAPH[manifest.quantization.target],
    )
    largest = max(worst.logits, worst.refine_logits, worst.caches)
    measured = {
        "logits": worst.logits,
        "refine logits": worst.refine_logits,
        "cache": worst.caches,
        "allowed": allowed,
    }
    advice = (
        "this processor, or this ONNX Runtime, does not compute what the graphs say: 'dllm-trt doctor' "
        "tells of its 8-bit products"
    )
    return Stage("canvases", largest <= allowed, measured, "" if largest <= allowed else advice)


def _weights(artifact: Path, source: pipeline.Source, manifest: Manifest) -> Stage:
    """Every initializer that comes from the checkpoint holds that tensor, converted, at the place where the
    graphs look for it."""
    mode = "copy" if stream.holds_all(manifest) else "link"
    scheme = _scheme(artifact, manifest)
    planned = weights.plan(
        source.decoder, source.family, source.checkpoint, manifest.model.dtype, mode, scheme
    )
    wrong: list[str] = []
    for role in contract.ROLES:
        graph = verify_graphs.graph_in(artifact / manifest.graphs[role].file)
        held = {tensor.name: tensor for tensor in graph.graph.initializer}
        is_compared = manifest.model.dtype == "bf16" or scheme is not None
        if is_compared and graph.graph != _built(role, source, manifest, planned, scheme):
            wrong.append(f"the {role} graph itself (which is not the one that this version builds)")
        for weight in planned:
            if weight.name not in held or not _lies_where_planned(held[weight.name], weight):
                wrong.append(f"{weight.name} in the {role} graph")
    if not wrong:
        wrong = [weight.name for weight in planned if not weight.is_in(artifact)]
    measured: dict[str, Any] = {
        "tensors": len(planned),
        "files": len(manifest.files),
        "hashes": "as in the manifest",
    }
    if wrong:
        measured["not the checkpoint's"] = f"{len(wrong)}, first {wrong[0]}"
    return Stage("weights", not wrong, measured, "export it again" if wrong else "")


def _scheme(artifact: Path, manifest: Manifest) -> Scheme | None:
    """How the artifact was quantised, with what it was calibrated with."""
    if manifest.quantization is None:
        return None
    kind = schemes.find(manifest.quantization.scheme, manifest.quantization.target)
    return kind(manifest.model.dtype, Calibration.read(artifact) if kind.is_calibrated else None)


def _built(
    role: str,
    source: pipeline.Source,
    manifest: Manifest,
    planned: list[weights.Weight],
    scheme: Scheme | None,
) -> onnx.GraphProto:
    """The graph that this version builds for the checkpoint: what stands in for running a bf16 one."""
    model = pipeline.graph_of(
        role, source, manifest.model.dtype, manifest.head, manifest.lowering, planned, scheme
    )
    return onnx.ModelProto.FromString(ir.to_proto(model).SerializeToString()).graph


def _lies_where_planned(tensor: onnx.TensorProto, weight: weights.Weight) -> bool:
    placed = {entry.key: entry.value for entry in tensor.external_data}
    there = (placed.get("location"), str(placed.get("offset", 0)), tuple(tensor.dims))
    return there == (weight.file, str(weight.offset), weight.shape)


def _range(ranges: layers.Ranges, dtype: str, maxima: dict[str, float]) -> Stage:
    measured: dict[str, Any] = {"largest activation": ranges.largest, "in": ranges.where}
    if maxima:
        name = max(maxima, key=lambda item: maxima[item])
        measured |= {"largest weight": maxima[name], "of": name}
    if dtype != "fp16":
        return Stage("range", True, measured)
    passed = ranges.largest <= FP16_LARGEST
    near = f"{ranges.where} comes near fp16's range ({FP16_LARGEST:g}): prefer DTYPE=bf16"
    over = f"{ranges.where} leaves fp16's range ({FP16_LARGEST:g}): export with DTYPE=bf16"
    return Stage(
        "range", passed, measured, over if not passed else near if ranges.largest > stream.FP16_NEAR else ""
    )


def _decode(engine: OrtBackend, reference: TorchBackend, manifest: Manifest, dtype: str) -> Stage:
    if different := _different_facts(reference.source, reference.artifact, manifest):
        return Stage("decode", False, {"first": different}, "export it again")
    recorded = replays.record(reference, random_cases(reference.manifest, _CASES))["cases"]
    margin = tolerances.CONFIDENCE[dtype]
    found = [replays.follow(engine, case, margin) for case in recorded]
    wrong = [str(item.mismatch) for item in found if item.mismatch is not None]
    decisions, ambiguous = sum(item.decisions for item in found), sum(item.ambiguous for item in found)
    measured: dict[str, Any] = {"cases": len(found), "decisions": decisions, "ambiguous": ambiguous}
    if wrong:
        return Stage("decode", False, measured | {"first": wrong[0]})
    if ambiguous > _MOST_AMBIGUOUS * decisions:
        return Stage(
            "decode",
            False,
            measured,
            "too many decisions within rounding: nothing is proven; verify it in fp32",
        )
    return Stage("decode", True, measured)


def _different_facts(source: pipeline.Source, artifact: Path, manifest: Manifest) -> str:
    """The first thing that the manifest says otherwise than the checkpoint; empty if there is none."""
    expected, got = (
        _expected_facts(source, artifact, manifest),
        {**asdict(manifest.decoding), **asdict(manifest.model)},
    )
    different = (
        f"{key} is {got[key]}, the checkpoint says {expected[key]}"
        for key in expected
        if expected[key] != got[key]
    )
    return next(different, "")


def _expected_facts(source: pipeline.Source, artifact: Path, manifest: Manifest) -> dict[str, Any]:
    """What the manifest must say of the checkpoint: its network, and how it decodes."""
    decoding = source.decoding
    if manifest.tokenizer is not None:
        decoding = pipeline.decoding_of(source, Tokenizer(artifact / manifest.tokenizer))
    facts = asdict(pipeline.facts_of_source(source, manifest.model.dtype))
    del facts["weight_bytes"]  # the file's size, checked with it
    said = asdict(decoding)
    del said["tuned"]  # what 'dllm-trt tune' noted is the user's choice, and no fact of the checkpoint
    return {**said, **facts}


def fp32_twin(manifest: Manifest, checkpoint: str | None, directory: Path) -> Path:
    """The artifact's checkpoint exported in fp32: what stands for a bf16 artifact on a CPU."""
    name, ignored, mask = origin(manifest, checkpoint)
    twin = directory / "fp32-twin"
    config = pipeline.ExportConfig(
        name, twin, lowering=manifest.lowering, ignored_keys=ignored, mask_token=mask
    )
    pipeline.export(config, lambda total: lambda done: None)
    return twin


def _write(artifact: Path, manifest: Manifest, stages: list[Stage]) -> None:
    against = f"transformers {transformers.__version__} on PyTorch {torch.__version__}, fp32, CPU"
    backend = f"onnxruntime {onnxruntime.__version__}" + (
        ", fp32 twin" if manifest.model.dtype == "bf16" else ""
    )
    if manifest.quantization is not None:
        against = "the checkpoint, quantised again by this version, and the quality that its export measured"
    verified = {
        "passed": all(stage.passed for stage in stages),
        "against": against,
        "backend": backend,
        "stages": {stage.name: {"passed": stage.passed, **stage.measured} for stage in stages},
    }
    manifests.update(artifact, lambda held: replace(held, verified=verified), since=manifest)
