"""The artifact's graphs run on canvases of random tokens, and compared with the PyTorch reference or, if they
are quantised, with the same graphs in standard operators.

The artifact's own graphs are run, with the logits exposed as an output where they are not one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import Manifest
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.backend import Window
from trt_runtime.decoding.blocks import row_lengths
from trt_runtime.errors import DllmError
from trt_runtime.measure import tolerances

from ..quantize import gate as quality
from . import bisect as layers
from .reference import TorchBackend
from .spelled import spelled

_CANVASES = 3
_BLOCK = 3  # positions; windows of refine steps have 4

Array = np.ndarray[Any, Any]


@dataclass
class Worst:
    """The largest differences seen, relative to max(1, largest value). share: of the rows of a tensor that
    count, the best ones: below 1 where a few rows may pass other experts."""

    share: float = 1.0
    logits: float = 0.0
    refine_logits: float = 0.0
    caches: float = 0.0
    same: float = 0.0
    ranges: layers.Ranges = field(default_factory=layers.Ranges)

    def add(self, role: str, mine: Run, theirs: Run, valid: Array) -> None:
        """Add a run of the graph of a role, compared with the expected one. valid: [2, L, 1], the rows that
        count."""
        self.logits = max(self.logits, self._apart(mine.logits * valid, theirs.logits * valid))
        caches = list(zip(mine.caches, theirs.caches, strict=True))
        if role == "refine":
            apart = self._apart(mine.refine_logits, theirs.refine_logits)
            self.refine_logits = max(self.refine_logits, apart)
            caches += zip(mine.refined, theirs.refined, strict=True)
        self.caches = max(
            self.caches, *(self._apart(a * valid[:, None], b * valid[:, None]) for a, b in caches)
        )

    def _apart(self, mine: Array, theirs: Array) -> float:
        """The difference of the rows [..., width] that count."""
        if self.share == 1:
            return layers.difference(mine, theirs)
        rows = np.abs(mine - theirs).max(-1).reshape(-1)
        largest = float(np.quantile(rows, self.share)) / max(1.0, float(np.abs(theirs).max()))
        return largest if np.isfinite(rows).all() else math.inf


def graph_in(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors
        raise DllmError(
            f"{path}: not a valid ONNX graph ({' '.join(str(error).split())[:200]}): export it again."
        ) from error


def exposed(artifact: Path, role: str, names: list[str], dtype: str = "fp32") -> bytes:
    """The graph of a role with internal values of a dtype added to its outputs, over the artifact's own
    weights."""
    model = graph_in(artifact / manifests.load(artifact).graphs[role].file)
    kinds = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16}
    present = {output.name for output in model.graph.output}
    for name in names:
        if name not in present:
            kind = onnx.TensorProto.FLOAT if name == contract.LOGITS else kinds[dtype]
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    data: bytes = model.SerializeToString()
    return data


def compare(artifact: Path, reference: TorchBackend) -> tuple[Worst, OrtBackend]:
    """Both graphs compared with the reference on random canvases of two unequal rows: prefix passes, then a
    refine step. One graph is open at a time: the weights of both would take twice the memory."""
    worst, rng = Worst(), np.random.default_rng(0)
    calls = [
        calls_of(reference.manifest, rng, min(24 + 7 * n, reference.manifest.model.max_length))
        for n in range(_CANVASES)
    ]
    with layers.watched(reference, worst.ranges):
        theirs = [_torch_run(reference, *call[:2]) for call in calls]
    runs: dict[str, list[Run]] = {}
    for role in contract.ROLES:
        engine = OrtBackend(
            artifact,
            role=role,
            model_bytes=exposed(artifact, role, [contract.LOGITS]),
            threads=quality.threads_of(reference.manifest.model.parameters),
        )
        runs[role] = [_ort_run(engine, *call[:2]) for call in calls]
        if role == "prefix":
            engine.close()
    for i, (_, _, valid) in enumerate(calls):
        for role in contract.ROLES:
            worst.add(role, runs[role][i], theirs[i], valid)
        worst.same = max(
            worst.same, layers.difference(runs["prefix"][i].logits * valid, runs["refine"][i].logits * valid)
        )
    return worst, engine


@dataclass(frozen=True)
class Run:
    """Logits of a prefix pass, the caches after it, logits of a refine step, and the caches after that
    (refine graph only)."""

    logits: Array
    caches: list[Array]
    refine_logits: Array
    refined: list[Array]


def calls_of(facts: Manifest, rng: np.random.Generator, length: int) -> tuple[Window, Window, Array]:
    """A prefix pass over two rows of unequal length, a refine step over an edited block, and the valid rows
    [2, L, 1]."""
    canvas = rng.integers(0, facts.model.vocab_size, (2, length))
    canvas[:, length // 2 :] = facts.decoding.mask_token_id
    start = length // 2
    kv_len = np.array([length, max(start + 1, length - 3)])
    edited = rng.integers(0, facts.model.vocab_size, (2, min(4, length - start)))
    valid = (np.arange(length) < kv_len[:, None])[..., None]
    full = window(canvas, 0, kv_len)
    refine = window(edited, start, kv_len)
    if facts.decoding.is_block_causal:
        full, refine = (_of_blocks(call) for call in (full, refine))
    full.position_ids[~valid[..., 0]] = 0  # the contents of padding must not matter
    return full, refine, valid


def _of_blocks(call: Window) -> Window:
    """The call with block-causal attention, in blocks that are short enough for a window to have several."""
    row_len = row_lengths(call.position_ids, call.kv_len[:, None], _BLOCK)
    return replace(call, row_len=np.maximum(row_len, 1))


def window(ids: Array, start: int, kv_len: Array) -> Window:
    """A call over `ids` [B, S] from position `start`, with outputs for every row."""
    batch, rows = ids.shape
    row = np.tile(np.arange(rows), (batch, 1))
    return Window(ids.astype(np.int64), row + start, np.full(batch, start), kv_len.astype(np.int64), row)


def _ort_run(engine: OrtBackend, full: Window, refine: Window) -> Run:
    slots, length = slice(0, 2), full.input_ids.shape[1]
    cache = engine.new_cache(2, length)
    outputs = engine.run(cache, slots, full, [contract.LOGITS, *contract.STATISTICS])
    first = outputs[contract.LOGITS]
    _check_statistics(outputs, engine.manifest)
    written = [array.astype(np.float32) for array in cache.buffers.arrays.values()]
    if engine.role == "prefix":
        return Run(first, written, first, [])
    second = engine.run(cache, slots, refine, [contract.LOGITS])[contract.LOGITS]
    return Run(first, written, second, [array.astype(np.float32) for array in cache.buffers.arrays.values()])


def _check_statistics(outputs: dict[str, Array], manifest: Manifest) -> None:
    """Check that a graph's statistics are those of its own logits without the mask token. Raises
    DllmError."""
    logits = outputs[contract.LOGITS].astype(np.float64)
    weights_of = np.exp(logits - logits.max(-1, keepdims=True))
    probability = weights_of / weights_of.sum(-1, keepdims=True)
    entropy = -(probability * np.log(np.maximum(probability, 1e-300))).sum(-1)
    probability[..., manifest.decoding.mask_token_id] = -1
    best = np.sort(probability, -1)
    proposed = np.take_along_axis(probability, outputs["token"][..., None], -1)[..., 0]
    pairs = {
        "token": (proposed, best[..., -1]),
        "confidence": (outputs["confidence"], best[..., -1]),
        "runner_up": (outputs["runner_up"], best[..., -2]),
        "entropy": (outputs["entropy"], entropy),
    }
    for name, (mine, theirs) in pairs.items():
        if not np.allclose(mine, theirs, rtol=1e-3, atol=1e-4):
            raise DllmError(
                f"the graph's {name} does not match its logits with mask token "
                f"{manifest.decoding.mask_token_id}: the graph does not belong to this "
                "artifact: export it again."
            )


@torch.inference_mode()
def _torch_run(reference: TorchBackend, full: Window, refine: Window) -> Run:
    slots, length = slice(0, 2), full.input_ids.shape[1]
    cache = reference.new_cache(2, length)
    first = reference.logits(cache, slots, full, own_rows_only=True).numpy()
    written = [tensor.clone().numpy() for pair in cache.buffers for tensor in pair]
    second = reference.logits(cache, slots, refine, own_rows_only=False).numpy()
    return Run(first, written, second, [tensor.numpy() for pair in cache.buffers for tensor in pair])


def compare_quantised(artifact: Path, manifest: Manifest) -> Worst:
    """Both graphs of a quantised artifact as this processor computes them. For the CPU they are compared with
    the same graph in standard operators and float arithmetic (export/parity/spelled.py); for TensorRT, whose
    graphs have none of the CPU's integer operators, with each other. Raises DllmError if a graph's statistics
    are not those of its logits."""
    assert manifest.quantization is not None
    share = 1.0 if manifest.model.experts is None else tolerances.MOST_ROWS
    worst, rng = Worst(share), np.random.default_rng(0)
    calls = [calls_of(manifest, rng, min(24 + 7 * n, manifest.model.max_length)) for n in range(_CANVASES)]
    graphs = {
        role: exposed(artifact, role, [contract.LOGITS], manifest.model.dtype) for role in contract.ROLES
    }
    for_cpu = manifest.quantization.target == manifests.ORT_CPU
    beside = (
        spelled(onnx.load_from_string(graphs["refine"])).SerializeToString() if for_cpu else graphs["refine"]
    )
    expected = _runs(artifact, manifest, "refine", beside, calls, optimise=not for_cpu)
    for role in contract.ROLES:
        runs = _runs(artifact, manifest, role, graphs[role], calls)
        for mine, theirs, (_, _, valid) in zip(runs, expected, calls, strict=True):
            worst.add(role, mine, theirs, valid)
    return worst


def _runs(
    artifact: Path,
    manifest: Manifest,
    role: str,
    graph: bytes,
    calls: list[tuple[Window, Window, Array]],
    *,
    optimise: bool = True,
) -> list[Run]:
    engine = OrtBackend(
        artifact,
        role=role,
        model_bytes=graph,
        threads=quality.threads_of(manifest.model.parameters),
        optimise=optimise,
    )
    runs = [_ort_run(engine, *call[:2]) for call in calls]
    engine.close()
    return runs
