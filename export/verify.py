"""Parity of an artifact with the PyTorch reference, stage by stage: weights, logits, cache, decode.

The artifact's own graphs are run, with one internal value (the logits) exposed as an output. ONNX Runtime has no bf16 on a
CPU: a bf16 artifact is verified through an fp32 twin, exported from the same checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers

from export import pipeline
from export.reference import TorchBackend, origin
from trt_runtime import contract, tolerances
from trt_runtime import manifest as manifests
from trt_runtime import replay as replays
from trt_runtime.backends.base import Window
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.manifest import Manifest

_CANVASES = 3
_CASES = 12

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Stage:
    """One question of the verification: what was compared, the worst that was seen, and whether it passes."""

    name: str
    passed: bool
    measured: dict[str, Any]

    def __str__(self) -> str:
        shown = ", ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.measured.items())
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {shown}"


def verify(artifact: Path, checkpoint: str | None = None) -> Iterator[Stage]:
    """The stages, as they finish. After the last, the result is written into the manifest. Raises DllmError."""
    manifest = manifests.load(artifact, check_hashes=True)
    yield (weights := Stage("weights", True, {"files": len(manifest.files), "hashes": "as in the manifest"}))
    with tempfile.TemporaryDirectory() as temporary:
        reference = TorchBackend(artifact, checkpoint=checkpoint, dtype="fp32")
        runnable = artifact if manifest.model.dtype != "bf16" else _fp32_twin(manifest, checkpoint, Path(temporary))
        stages = [weights]
        for stage in _compare(runnable, reference):
            stages.append(stage)
            yield stage
    _write(artifact, manifest, stages)


def exposed(artifact: Path, role: str, names: list[str]) -> bytes:
    """The graph of a role with internal values added to its outputs (float32), over the artifact's own weights."""
    model = onnx.load(artifact / f"{role}.onnx", load_external_data=False)
    present = {output.name for output in model.graph.output}
    for name in names:
        if name not in present:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    data: bytes = model.SerializeToString()
    return data


def _compare(artifact: Path, reference: TorchBackend) -> Iterator[Stage]:
    engines = {
        role: OrtBackend(artifact, role=role, model_bytes=exposed(artifact, role, [contract.LOGITS])) for role in contract.ROLES
    }
    dtype = engines["refine"].manifest.model.dtype
    logits, cache, same = _graphs(engines, reference)
    yield Stage("logits", logits <= tolerances.LOGITS[dtype], {"worst": logits, "allowed": tolerances.LOGITS[dtype]})
    cache_ok = cache <= tolerances.CACHE[dtype] and same <= tolerances.SAME_GRAPH[dtype]
    yield Stage("cache", cache_ok, {"worst": cache, "prefix against refine": same, "allowed": tolerances.CACHE[dtype]})
    cases = replays.random_cases(reference.manifest, _CASES)
    recorded = replays.record(reference, cases)["cases"]
    margin = tolerances.CONFIDENCE[dtype]
    found = [replays.compare(case, replays.replay(engines["refine"], case), margin) for case in recorded]
    wrong = [str(item) for item in found if item is not None and not item.ambiguous]
    measured = {"cases": len(found), "exact": found.count(None), "ambiguous": len(found) - found.count(None) - len(wrong)}
    yield Stage("decode", not wrong, measured | ({"first": wrong[0]} if wrong else {}))


def _graphs(engines: dict[str, OrtBackend], reference: TorchBackend) -> tuple[float, float, float]:
    """Worst relative differences: logits against the reference, caches against it, and prefix graph against refine graph."""
    facts, rng = reference.manifest, np.random.default_rng(0)
    logits = caches = same = 0.0
    for _ in range(_CANVASES):
        length = int(rng.integers(12, min(96, facts.model.max_length) + 1))
        full, refine, valid = _calls(facts, rng, length)
        theirs = _torch_run(reference, full, refine)
        mine = {role: _ort_run(engine, full, refine) for role, engine in engines.items()}
        logits = max(logits, _worst(mine["refine"][0] * valid, theirs[0] * valid), _worst(mine["refine"][1], theirs[1]))
        same = max(same, _worst(mine["prefix"][0] * valid, mine["refine"][0] * valid))
        for role in contract.ROLES:
            pairs = zip(mine[role][2], theirs[2], strict=True)
            caches = max(caches, *(_worst(a * valid[:, None], b * valid[:, None]) for a, b in pairs))
    return logits, caches, same


def _calls(facts: Manifest, rng: np.random.Generator, length: int) -> tuple[Window, Window, Array]:
    """A prefix pass over two rows of unequal length, a refine step over an edited block, and the valid rows [2, L, 1]."""
    canvas = rng.integers(0, facts.model.vocab_size, (2, length))
    canvas[:, length // 2 :] = facts.decoding.mask_token_id
    kv_len = np.array([length, length - 3])
    start = length // 2
    edited = rng.integers(0, facts.model.vocab_size, (2, 4))
    valid = (np.arange(length) < kv_len[:, None])[..., None]
    return _window(canvas, 0, kv_len), _window(edited, start, kv_len), valid


def _window(ids: Array, start: int, kv_len: Array) -> Window:
    batch, rows = ids.shape
    row = np.tile(np.arange(rows), (batch, 1))
    return Window(ids.astype(np.int64), row + start, np.full(batch, start), kv_len.astype(np.int64), row)


def _ort_run(engine: OrtBackend, full: Window, refine: Window) -> tuple[Array, Array, list[Array]]:
    """Logits of a prefix pass and of a refine step, and the caches between them. The prefix graph makes only the pass."""
    slots, length = slice(0, 2), full.input_ids.shape[1]
    cache = engine.new_cache(2, length)
    first = engine.run(cache, slots, full, [contract.LOGITS])[contract.LOGITS]
    written = [array.astype(np.float32) for array in cache.buffers.arrays.values()]
    if engine.role == "prefix":
        return first, first, written
    return first, engine.run(cache, slots, refine, [contract.LOGITS])[contract.LOGITS], written


@torch.inference_mode()
def _torch_run(reference: TorchBackend, full: Window, refine: Window) -> tuple[Array, Array, list[Array]]:
    slots, length = slice(0, 2), full.input_ids.shape[1]
    cache = reference.new_cache(2, length)
    first = reference.logits(cache, slots, full, own_rows_only=True).numpy()
    written = [tensor.clone().numpy() for pair in cache.buffers for tensor in pair]
    return first, reference.logits(cache, slots, refine, own_rows_only=False).numpy(), written


def _worst(mine: Array, theirs: Array) -> float:
    """Largest difference over max(1, largest value); infinite where something is no number."""
    difference = float(np.abs(mine - theirs).max() / max(1.0, float(np.abs(theirs).max())))
    return difference if np.isfinite(difference) else float("inf")


def _fp32_twin(manifest: Manifest, checkpoint: str | None, directory: Path) -> Path:
    name, ignored = origin(manifest, checkpoint)
    twin = directory / "fp32-twin"
    pipeline.export(
        pipeline.ExportConfig(name, twin, lowering=manifest.lowering, ignored_keys=ignored), lambda total: lambda done: None
    )
    return twin


def _write(artifact: Path, manifest: Manifest, stages: list[Stage]) -> None:
    verified = {
        "passed": all(stage.passed for stage in stages),
        "against": f"transformers {transformers.__version__} on PyTorch {torch.__version__}, fp32, CPU",
        "backend": f"onnxruntime {onnxruntime.__version__}" + (", fp32 twin" if manifest.model.dtype == "bf16" else ""),
        "stages": {stage.name: {"passed": stage.passed, **stage.measured} for stage in stages},
    }
    manifests.write(replace(manifest, verified=verified), artifact)
