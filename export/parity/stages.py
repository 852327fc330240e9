"""The stages of a verification: what each compares, and when it passes.

weights: every tensor of weights.data is the checkpoint's, converted. range: no activation of the reference
leaves the dtype's range. logits: of a prefix pass on both graphs. cache: the cache after that pass and after
a refine step, and the logits of that step, which reads the cache. decode: recorded cases of the reference,
token by token. blocks (block-causal attention): the cached decoding against a naive one. canvases (quantised
artifacts): this machine computes the graphs correctly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import Manifest
from trt_runtime.artifact.tokenizer import Tokenizer
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.backend import Window
from trt_runtime.measure import replay as replays
from trt_runtime.measure import tolerances
from trt_runtime.measure.cases import random_cases

from .. import pipeline, schemes
from ..graph.linears import FusedLinears, Linears
from ..quantize import gate as quality
from ..schemes.base import Calibration, Scheme
from ..weights import plan as weights
from ..weights import stream
from ..weights.sources import FP16_LARGEST
from . import bisect as layers
from . import block_causal, experts, verify_graphs
from .reference import TorchBackend

_CASES = 12
_MOST_AMBIGUOUS = 0.25  # of the decisions


@dataclass(frozen=True)
class Stage:
    """One comparison of the verification: what was measured, and whether it passes."""

    name: str
    passed: bool
    measured: dict[str, Any]
    advice: str = ""
    summary: str = ""  # what was measured, in words; default: the names and numbers

    def __str__(self) -> str:
        shown = self.summary or ", ".join(
            f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.measured.items()
        )
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {shown}" + (
            f" -- {self.advice}" if self.advice else ""
        )


def weights_stage(artifact: Path, source: pipeline.Source, manifest: Manifest) -> Stage:
    """Every initializer that comes from the checkpoint holds that tensor, converted, at the offset that the
    graphs read."""
    mode = "copy" if stream.holds_all(manifest) else "link"
    scheme, source = _scheme(artifact, manifest), source.as_in(manifest.model)
    linears = FusedLinears() if scheme is None and manifest.is_for_cpu else scheme
    planned = weights.plan(
        source.decoder, source.family, source.checkpoint, manifest.model.dtype, mode, scheme
    )
    wrong: list[str] = []
    for role in contract.ROLES:
        graph = verify_graphs.graph_in(artifact / manifest.graphs[role].file)
        stored = {tensor.name: tensor for tensor in graph.graph.initializer}
        is_compared = manifest.model.dtype == "bf16" or linears is not None or manifest.model.experts
        if is_compared and graph.graph != _built(role, source, manifest, planned, linears):
            wrong.append(f"the {role} graph itself (which is not the one that this version builds)")
        for weight in planned:
            if weight.name not in stored or not _lies_where_planned(stored[weight.name], weight):
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
    """The artifact's quantisation scheme with its calibration; None if it is not quantised."""
    if manifest.quantization is None:
        return None
    kind = schemes.find(manifest.quantization.scheme, manifest.quantization.target)
    return kind(manifest.model.dtype, Calibration.read(artifact) if kind.is_calibrated else None)


def _built(
    role: str,
    source: pipeline.Source,
    manifest: Manifest,
    planned: list[weights.Weight],
    linears: Linears | None,
) -> onnx.GraphProto:
    """The graph that this version builds for the checkpoint; comparing with it replaces running a bf16
    graph."""
    model = pipeline.graph_of(
        role, source, manifest.model.dtype, manifest.head, manifest.lowering, planned, linears
    )
    return onnx.ModelProto.FromString(ir.to_proto(model).SerializeToString()).graph


def _lies_where_planned(tensor: onnx.TensorProto, weight: weights.Weight) -> bool:
    placed = {entry.key: entry.value for entry in tensor.external_data}
    location = (placed.get("location"), str(placed.get("offset", 0)), tuple(tensor.dims))
    return location == (weight.file, str(weight.offset), weight.shape)


def logits_and_cache(worst: verify_graphs.Worst, dtype: str) -> tuple[Stage, Stage]:
    """Both graphs compared with the reference, by the largest differences that were seen."""
    allowed = tolerances.LOGITS[dtype]
    measured = {"worst": worst.logits, "prefix against refine graph": worst.same, "allowed": allowed}
    logits_ok = worst.logits <= allowed and worst.same <= tolerances.SAME_GRAPH[dtype]
    cache = {
        "worst": worst.caches,
        "allowed": tolerances.CACHE[dtype],
        "refine logits": worst.refine_logits,
        "allowed for logits": allowed,
    }
    cache_ok = worst.caches <= tolerances.CACHE[dtype] and worst.refine_logits <= allowed
    return Stage("logits", logits_ok, measured), Stage("cache", cache_ok, cache)


def range_stage(ranges: layers.Ranges, dtype: str, maxima: dict[str, float]) -> Stage:
    """No activation of the reference leaves fp16's range. maxima: the largest magnitude of each weight."""
    measured: dict[str, Any] = {"largest activation": ranges.largest, "in": ranges.where}
    if maxima:
        name = max(maxima, key=lambda item: maxima[item])
        measured |= {"largest weight": maxima[name], "of": name}
    if dtype != "fp16":
        return Stage("range", True, measured)
    passed = ranges.largest <= FP16_LARGEST
    near = f"{ranges.where} is close to the limit of fp16's range ({FP16_LARGEST:g}): prefer DTYPE=bf16"
    over = f"{ranges.where} leaves fp16's range ({FP16_LARGEST:g}): export with DTYPE=bf16"
    return Stage(
        "range", passed, measured, over if not passed else near if ranges.largest > stream.FP16_NEAR else ""
    )


def decode_stage(engine: OrtBackend, reference: TorchBackend, manifest: Manifest) -> Stage:
    """The engine decodes recorded cases of the reference to the same tokens, but for decisions within
    rounding."""
    dtype = engine.manifest.model.dtype
    if different := different_facts(reference.source, reference.artifact, manifest):
        return Stage("decode", False, {"first": different}, "export it again")
    recorded = replays.record(reference, random_cases(reference.manifest, _CASES))["cases"]
    margin = tolerances.CONFIDENCE[dtype]
    excuse = _within_a_gap(reference, engine.manifest.model.dtype)
    return _followed("decode", [replays.follow(engine, case, margin, excuse) for case in recorded])


def _within_a_gap(reference: TorchBackend, dtype: str) -> replays.Excuse | None:
    """Whether a router's choice in a forward lies within rounding, so that another decision proves nothing;
    None for a model without experts."""
    if reference.manifest.model.experts is None:
        return None

    def excused(canvas: np.ndarray[Any, Any], reach: np.ndarray[Any, Any] | None) -> bool:
        rows = np.arange(len(canvas))[None]
        start, length = np.zeros(1, np.int64), np.array([len(canvas)])
        window = Window(canvas[None], rows, start, length, rows, None if reach is None else reach[None])
        return experts.least_gap(reference, window, dtype) <= 1

    return excused


def experts_stage(artifact: Path, reference: TorchBackend, name: str = "experts") -> Stage:
    """Every row passes the experts that the reference's passes, with their weights, but for choices within
    rounding."""
    rng, facts = np.random.default_rng(1), reference.manifest
    length = min(48, facts.model.max_length)
    calls = [verify_graphs.calls_of(facts, rng, length) for _ in range(2)]
    threads = quality.threads_of(facts.model.parameters)
    seen = experts.compare(artifact, reference, calls, threads)
    dtype = manifests.load(artifact).model.dtype
    allowed = tolerances.EXPERT_WEIGHTS[dtype]
    measured = {
        "rows": seen.rows,
        "other experts": seen.flipped,
        "their largest gap over rounding": seen.gap,
        # none where every row passes all experts
        **({"smallest gap over rounding": seen.smallest} if np.isfinite(seen.smallest) else {}),
        "weights": seen.weights,
        "allowed": allowed,
    }
    return Stage(name, seen.gap <= 1 and seen.weights <= allowed, measured)


def blocks_stage(engine: OrtBackend, reference: TorchBackend) -> Stage:
    """With block-causal attention: the engine's cached decoding makes the decisions of a naive decoding in
    PyTorch without a cache, but for those within rounding."""
    dtype = engine.manifest.model.dtype
    margin, excuse = tolerances.CONFIDENCE[dtype], _within_a_gap(reference, dtype)
    return _followed(
        "blocks",
        [
            replays.follow_decisions(engine, case, decisions, margin, excuse)
            for case, decisions in block_causal.cases(reference)
        ],
    )


def _followed(name: str, followed: list[replays.Agreement]) -> Stage:
    """The stage of cases whose decisions were followed."""
    wrong = [str(item.mismatch) for item in followed if item.mismatch is not None]
    decisions, ambiguous = sum(item.decisions for item in followed), sum(item.ambiguous for item in followed)
    measured: dict[str, Any] = {"cases": len(followed), "decisions": decisions, "ambiguous": ambiguous}
    if excused := sum(item.excused for item in followed):
        measured["of these by another expert"] = excused
    if wrong:
        return Stage(name, False, measured | {"first": wrong[0]})
    if ambiguous > _MOST_AMBIGUOUS * decisions:
        return Stage(
            name,
            False,
            measured,
            "too many decisions lie within rounding, so nothing is proven: verify it in fp32",
        )
    return Stage(name, True, measured)


def different_facts(source: pipeline.Source, artifact: Path, manifest: Manifest) -> str:
    """The first fact in which the manifest differs from the checkpoint; empty if there is none."""
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
    """What the manifest must say about the checkpoint: its network, and how it decodes."""
    decoding = source.decoding
    if manifest.tokenizer is not None:
        decoding = pipeline.decoding_of(source, Tokenizer(artifact / manifest.tokenizer))
    facts = asdict(pipeline.facts_of_source(source.as_in(manifest.model), manifest.model.dtype))
    del facts["weight_bytes"]  # the file's size, checked with it
    fields = asdict(decoding)
    del fields["tuned"]  # recorded by 'dllm-trt tune': the user's choice, not a fact about the checkpoint
    return {**fields, **facts}


def canvases_stage(artifact: Path, manifest: Manifest) -> Stage:
    """Whether this machine computes the graphs of a quantised artifact correctly."""
    dtype = manifest.model.dtype
    if dtype == "bf16":
        return Stage(
            "canvases",
            True,
            {"run": "no: ONNX Runtime has no bf16 on a CPU; the graphs are those that this version makes"},
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
        "this processor or ONNX Runtime computes the graphs incorrectly: 'dllm-trt doctor' checks its 8-bit "
        "products"
    )
    return Stage("canvases", largest <= allowed, measured, "" if largest <= allowed else advice)
