"""Parity of an artifact with the PyTorch reference, stage by stage: weights, range, logits, cache, decode.

weights: every tensor of weights.data is the checkpoint's, converted. range: no activation of the reference leaves the dtype's range.
logits: a prefix pass on both graphs. cache: what the pass and a refine step left in it, and the logits of the step, which reads it.
decode: recorded cases of the reference, token by token.

The artifact's own graphs are run, with the logits exposed as an output where they are none. ONNX Runtime has no bf16 on a CPU: a
bf16 artifact is verified through an fp32 twin, exported from the same checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
import transformers

from export import layers, pipeline, quality, quantization, tokenizer_files, weights
from export.quantization.base import Calibration, Scheme
from export.reference import TorchBackend, origin, source_of
from trt_runtime import contract, tolerances
from trt_runtime import manifest as manifests
from trt_runtime import replay as replays
from trt_runtime.backends.base import Window
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.cases import random_cases
from trt_runtime.errors import DllmError
from trt_runtime.manifest import Manifest
from trt_runtime.tokenizer import Tokenizer

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

    def __str__(self) -> str:
        shown = ", ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.measured.items())
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {shown}" + (f" -- {self.advice}" if self.advice else "")


@dataclass
class _Worst:
    """The largest differences seen, relative to max(1, largest value)."""

    logits: float = 0.0
    refine_logits: float = 0.0
    caches: float = 0.0
    same: float = 0.0
    ranges: layers.Ranges = field(default_factory=layers.Ranges)


def verify(artifact: Path, checkpoint: str | None = None, doing: Callable[[str], object] = lambda what: None) -> Iterator[Stage]:
    """The stages, as they finish; `doing` is told what runs now. After the last, the result is written into the manifest. Raises DllmError."""
    manifest = manifests.load(artifact, check_hashes=True)
    stages, made = [], _stages if manifest.quantization is None else _quantized_stages
    for stage in made(artifact, checkpoint, manifest, doing):
        stages.append(stage)
        yield stage
    _write(artifact, manifest, stages)


@contextmanager
def opened(artifact: Path, checkpoint: str | None) -> Iterator[tuple[Path, TorchBackend]]:
    """The artifact as it can run here (a bf16 one as its fp32 twin), and the reference in fp32."""
    manifest = manifests.load(artifact)
    reference = TorchBackend(artifact, checkpoint=checkpoint, dtype="fp32", threads=quality.threads_of(manifest.model.parameters))
    with tempfile.TemporaryDirectory() as temporary:
        yield artifact if manifest.model.dtype != "bf16" else _fp32_twin(manifest, checkpoint, Path(temporary)), reference


def bisect(artifact: Path, checkpoint: str | None = None) -> dict[str, list[layers.Row]]:
    """Layer by layer, for a prefix pass and a refine step: where a failure begins. Raises DllmError."""
    if manifests.load(artifact).quantization is not None:
        raise DllmError(f"{artifact}: is quantised, and not to agree layer by layer: look at the artifact without --quantize.")
    with opened(artifact, checkpoint) as (runnable, reference):
        calls = _calls(reference.manifest, np.random.default_rng(0), min(31, reference.manifest.model.max_length))
        return layers.compare(runnable, reference, calls, exposed)


def _stages(artifact: Path, checkpoint: str | None, manifest: Manifest, doing: Callable[[str], object]) -> Iterator[Stage]:
    doing("opening the reference" + (" and exporting an fp32 twin" if manifest.model.dtype == "bf16" else ""))
    with opened(artifact, checkpoint) as (runnable, reference):
        doing("weights: comparing every tensor with the checkpoint's")
        yield _weights(artifact, reference.source, manifest)
        doing("range, logits and cache: running both graphs and the reference")
        worst, engine = _graphs(runnable, reference)
        dtype = engine.manifest.model.dtype
        yield _range(worst.ranges, manifest.model.dtype, manifest.weight_maxima)
        allowed = tolerances.LOGITS[dtype]
        logits_ok = worst.logits <= allowed and worst.same <= tolerances.SAME_GRAPH[dtype]
        yield Stage("logits", logits_ok, {"worst": worst.logits, "prefix against refine graph": worst.same, "allowed": allowed})
        cache_ok = worst.caches <= tolerances.CACHE[dtype] and worst.refine_logits <= allowed
        measured = {"worst": worst.caches, "allowed": tolerances.CACHE[dtype], "refine logits": worst.refine_logits,
                    "allowed for logits": allowed}  # fmt: skip
        yield Stage("cache", cache_ok, measured)
        doing("decode: recording cases with the reference, and following them")
        yield _decode(engine, reference, manifest, dtype)


def _quantized_stages(
    artifact: Path, checkpoint: str | None, manifest: Manifest, doing: Callable[[str], object]
) -> Iterator[Stage]:
    """What is quantised is not to agree within rounding: its weights and graphs must be those that this version makes of the checkpoint, and
    the gate of the export must have been passed."""
    source = source_of(manifest, checkpoint, artifact)
    doing("weights: quantising the checkpoint again, and comparing every tensor")
    yield _weights(artifact, source, manifest)
    assert manifest.quantization is not None
    if different := _different_facts(source, artifact, manifest):
        yield Stage("decode", False, {"first": different}, "export it again")
    measured = manifest.quantization.quality
    advice = "" if measured else "its quality was not measured: export it with --data and --gate yes"
    yield Stage("quality", measured is not None, measured or {}, advice)


def _weights(artifact: Path, source: pipeline.Source, manifest: Manifest) -> Stage:
    """Every initializer that comes from the checkpoint holds that tensor, converted, at the place where the graphs look for it."""
    mode = "copy" if weights.holds_all(manifest) else "link"
    scheme = _scheme(artifact, manifest)
    planned = weights.plan(source.decoder, source.family, source.checkpoint, manifest.model.dtype, mode, scheme)
    wrong: list[str] = []
    for role in contract.ROLES:
        graph = _graph(artifact / manifest.graphs[role].file)
        held = {tensor.name: tensor for tensor in graph.graph.initializer}
        is_compared = manifest.model.dtype == "bf16" or scheme is not None
        if is_compared and graph.graph != _built(role, source, manifest, planned, scheme):
            wrong.append(f"the {role} graph itself (which is not the one that this version builds)")
        for weight in planned:
            if weight.name not in held or not _lies_where_planned(held[weight.name], weight):
                wrong.append(f"{weight.name} in the {role} graph")
    if not wrong:
        wrong = [weight.name for weight in planned if not weights.is_in(weight, artifact)]
    measured: dict[str, Any] = {"tensors": len(planned), "files": len(manifest.files), "hashes": "as in the manifest"}
    if wrong:
        measured["not the checkpoint's"] = f"{len(wrong)}, first {wrong[0]}"
    return Stage("weights", not wrong, measured, "export it again" if wrong else "")


def _scheme(artifact: Path, manifest: Manifest) -> Scheme | None:
    """How the artifact was quantised, with what it was calibrated with."""
    if manifest.quantization is None:
        return None
    kind = quantization.find(manifest.quantization.scheme, manifest.quantization.target)
    return kind(manifest.model.dtype, Calibration.read(artifact) if kind.is_calibrated else None)


def _graph(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors
        raise DllmError(f"{path}: is no ONNX graph ({' '.join(str(error).split())[:200]}): export it again.") from error


def _built(
    role: str, source: pipeline.Source, manifest: Manifest, planned: list[weights.Weight], scheme: Scheme | None
) -> onnx.GraphProto:
    """The graph that this version builds for the checkpoint: what stands in for running a bf16 one."""
    model = pipeline.graph_of(role, source, manifest.model.dtype, manifest.head, manifest.lowering, planned, scheme)
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
    passed = ranges.largest <= weights.FP16_LARGEST
    near = f"{ranges.where} comes near fp16's range ({weights.FP16_LARGEST:g}): prefer DTYPE=bf16"
    over = f"{ranges.where} leaves fp16's range ({weights.FP16_LARGEST:g}): export with DTYPE=bf16"
    return Stage("range", passed, measured, over if not passed else near if ranges.largest > weights.FP16_NEAR else "")


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
        return Stage("decode", False, measured, "too many decisions within rounding: nothing is proven; verify it in fp32")
    return Stage("decode", True, measured)


def _different_facts(source: pipeline.Source, artifact: Path, manifest: Manifest) -> str:
    """The first thing that the manifest says otherwise than the checkpoint; empty if there is none."""
    expected, got = _expected_facts(source, artifact, manifest), {**asdict(manifest.decoding), **asdict(manifest.model)}
    different = (f"{key} is {got[key]}, the checkpoint says {expected[key]}" for key in expected if expected[key] != got[key])
    return next(different, "")


def _expected_facts(source: pipeline.Source, artifact: Path, manifest: Manifest) -> dict[str, Any]:
    """What the manifest must say of the checkpoint: its network, and how it decodes."""
    decoding = source.decoding
    if manifest.tokenizer is not None:
        tokenizer = Tokenizer(artifact / manifest.tokenizer)
        decoding = tokenizer_files.completed(decoding, tokenizer, source.decoder.vocab_size)
    facts = asdict(pipeline.facts_of_source(source, manifest.model.dtype))
    del facts["weight_bytes"]  # the file's size, checked with it
    return {**asdict(decoding), **facts}


def exposed(artifact: Path, role: str, names: list[str], dtype: str = "fp32") -> bytes:
    """The graph of a role with internal values of a dtype added to its outputs, over the artifact's own weights."""
    model = _graph(artifact / manifests.load(artifact).graphs[role].file)
    kinds = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16}
    present = {output.name for output in model.graph.output}
    for name in names:
        if name not in present:
            kind = onnx.TensorProto.FLOAT if name == contract.LOGITS else kinds[dtype]
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    data: bytes = model.SerializeToString()
    return data


def _graphs(artifact: Path, reference: TorchBackend) -> tuple[_Worst, OrtBackend]:
    """Both graphs against the reference on random canvases of two unequal rows: prefix passes, then a refine step. One graph is
    open at a time: the weights of both would take twice the memory."""
    worst, rng = _Worst(), np.random.default_rng(0)
    calls = [_calls(reference.manifest, rng, min(24 + 7 * n, reference.manifest.model.max_length)) for n in range(_CANVASES)]
    with layers.watched(reference, worst.ranges):
        theirs = [_torch_run(reference, *call[:2]) for call in calls]
    made: dict[str, list[_Run]] = {}
    for role in contract.ROLES:
        engine = OrtBackend(
            artifact,
            role=role,
            model_bytes=exposed(artifact, role, [contract.LOGITS]),
            threads=quality.threads_of(reference.manifest.model.parameters),
        )
        made[role] = [_ort_run(engine, *call[:2]) for call in calls]
        if role == "prefix":
            engine.close()
    for i, (_, _, valid) in enumerate(calls):
        for role in contract.ROLES:
            mine = made[role][i]
            worst.logits = max(worst.logits, layers.difference(mine.logits * valid, theirs[i].logits * valid))
            pairs = zip(mine.caches, theirs[i].caches, strict=True)
            worst.caches = max(worst.caches, *(layers.difference(a * valid[:, None], b * valid[:, None]) for a, b in pairs))
        worst.same = max(worst.same, layers.difference(made["prefix"][i].logits * valid, made["refine"][i].logits * valid))
        mine = made["refine"][i]
        worst.refine_logits = max(worst.refine_logits, layers.difference(mine.refine_logits, theirs[i].refine_logits))
        pairs = zip(mine.refined, theirs[i].refined, strict=True)
        worst.caches = max(worst.caches, *(layers.difference(a * valid[:, None], b * valid[:, None]) for a, b in pairs))
    return worst, engine


@dataclass(frozen=True)
class _Run:
    """Logits of a prefix pass, the caches after it, logits of a refine step, and the caches after that (refine graph only)."""

    logits: Array
    caches: list[Array]
    refine_logits: Array
    refined: list[Array]


def _calls(facts: Manifest, rng: np.random.Generator, length: int) -> tuple[Window, Window, Array]:
    """A prefix pass over two rows of unequal length, a refine step over an edited block, and the valid rows [2, L, 1]."""
    canvas = rng.integers(0, facts.model.vocab_size, (2, length))
    canvas[:, length // 2 :] = facts.decoding.mask_token_id
    start = length // 2
    kv_len = np.array([length, max(start + 1, length - 3)])
    edited = rng.integers(0, facts.model.vocab_size, (2, min(4, length - start)))
    valid = (np.arange(length) < kv_len[:, None])[..., None]
    return window(canvas, 0, kv_len), window(edited, start, kv_len), valid


def window(ids: Array, start: int, kv_len: Array) -> Window:
    """A call over `ids` [B, S] from position `start` on, asking for every row."""
    batch, rows = ids.shape
    row = np.tile(np.arange(rows), (batch, 1))
    return Window(ids.astype(np.int64), row + start, np.full(batch, start), kv_len.astype(np.int64), row)


def _ort_run(engine: OrtBackend, full: Window, refine: Window) -> _Run:
    slots, length = slice(0, 2), full.input_ids.shape[1]
    cache = engine.new_cache(2, length)
    made = engine.run(cache, slots, full, [contract.LOGITS, *contract.STATISTICS])
    first = made[contract.LOGITS]
    _check_statistics(made, engine.manifest)
    written = [array.astype(np.float32) for array in cache.buffers.arrays.values()]
    if engine.role == "prefix":
        return _Run(first, written, first, [])
    second = engine.run(cache, slots, refine, [contract.LOGITS])[contract.LOGITS]
    return _Run(first, written, second, [array.astype(np.float32) for array in cache.buffers.arrays.values()])


def _check_statistics(made: dict[str, Array], manifest: Manifest) -> None:
    """A graph's statistics must be those of its own logits, the mask token left out. Raises DllmError."""
    logits = made[contract.LOGITS].astype(np.float64)
    weights_of = np.exp(logits - logits.max(-1, keepdims=True))
    probability = weights_of / weights_of.sum(-1, keepdims=True)
    entropy = -(probability * np.log(np.maximum(probability, 1e-300))).sum(-1)
    probability[..., manifest.decoding.mask_token_id] = -1
    best = np.sort(probability, -1)
    proposed = np.take_along_axis(probability, made["token"][..., None], -1)[..., 0]
    pairs = {"token": (proposed, best[..., -1]), "confidence": (made["confidence"], best[..., -1]),
             "runner_up": (made["runner_up"], best[..., -2]), "entropy": (made["entropy"], entropy)}  # fmt: skip
    for name, (mine, theirs) in pairs.items():
        if not np.allclose(mine, theirs, rtol=1e-3, atol=1e-4):
            raise DllmError(
                f"the graph's {name} is not that of its logits with mask token {manifest.decoding.mask_token_id}: the graph is not of "
                "this artifact: export it again."
            )


@torch.inference_mode()
def _torch_run(reference: TorchBackend, full: Window, refine: Window) -> _Run:
    slots, length = slice(0, 2), full.input_ids.shape[1]
    cache = reference.new_cache(2, length)
    first = reference.logits(cache, slots, full, own_rows_only=True).numpy()
    written = [tensor.clone().numpy() for pair in cache.buffers for tensor in pair]
    second = reference.logits(cache, slots, refine, own_rows_only=False).numpy()
    return _Run(first, written, second, [tensor.numpy() for pair in cache.buffers for tensor in pair])


def _fp32_twin(manifest: Manifest, checkpoint: str | None, directory: Path) -> Path:
    name, ignored = origin(manifest, checkpoint)
    twin = directory / "fp32-twin"
    pipeline.export(
        pipeline.ExportConfig(name, twin, lowering=manifest.lowering, ignored_keys=ignored), lambda total: lambda done: None
    )
    return twin


def _write(artifact: Path, manifest: Manifest, stages: list[Stage]) -> None:
    against = f"transformers {transformers.__version__} on PyTorch {torch.__version__}, fp32, CPU"
    backend = f"onnxruntime {onnxruntime.__version__}" + (", fp32 twin" if manifest.model.dtype == "bf16" else "")
    if manifest.quantization is not None:
        against = "the checkpoint, quantised again by this version, and the quality that its export measured"
    verified = {
        "passed": all(stage.passed for stage in stages),
        "against": against,
        "backend": backend,
        "stages": {stage.name: {"passed": stage.passed, **stage.measured} for stage in stages},
    }
    manifests.write(replace(manifest, verified=verified), artifact)
