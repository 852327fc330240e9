"""Stages of report.py without a model: the machine's ceilings, and the kernels against NumPy and
PyTorch."""

from __future__ import annotations

import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import network_kernels
import numpy as np
import torch

INNER = 64  # launches of a small kernel between two events


def milliseconds(work: Callable[[], Any], repeats: int, device: str, inner: int = 1) -> float:
    """The median ms of a call, after three that warm up. On a GPU it is timed by events around `inner` queued
    calls, so that launch overhead does not count."""
    for _ in range(3):
        work()
    taken = []
    for _ in range(repeats):
        if device == "cpu":
            begin = time.perf_counter()
            work()
            taken.append(1000 * (time.perf_counter() - begin))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(inner):
            work()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / inner)
    return statistics.median(taken)


def ceilings(settings: Any, note: Any) -> None:
    """The measured limits of memory and matrix units: a large copy (bytes read and written), large products
    of random matrices."""
    device = settings.device
    count, size = (1 << 22, 512) if settings.is_twin else (1 << 31, 8192)
    ms = _copy_ms(count, settings)
    note(copy={"bytes": 2 * count, "ms": ms, "gb_per_s": 2 * count / ms / 1e6})
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        ms = milliseconds(lambda a=a, b=b: a @ b, settings.repeats, device)
        note(**{f"matmul_{name}": {"size": size, "ms": ms, "tflops": 2 * size**3 / ms / 1e9}})


def _copy_ms(count: int, settings: Any) -> float:
    source = torch.randint(0, 100, (count,), dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source), settings.repeats, settings.device)


def measured_ceilings(settings: Any) -> tuple[float, float] | None:
    """Copy GB/s and bf16 TFLOPS of the ceilings stage, if it ran."""
    file = Path(settings.out) / "ceilings.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "copy" not in results or "matmul_bf16" not in results:
        return None
    matmul = results["matmul_fp32" if settings.dtype == "fp32" else "matmul_bf16"]
    return results["copy"]["gb_per_s"], matmul["tflops"]


def kernels(settings: Any, note: Any) -> None:
    """Each kernel against its NumPy reference and against PyTorch on fresh random inputs, and its time."""
    note(
        row_statistics=[
            _row_statistics(settings, vocab, rows) for vocab in settings.vocabularies for rows in (32, 256)
        ]
    )
    note(commit=_commit(settings))
    rows = (3, 20) if settings.is_twin else (32, 128, 384, 1280)
    note(experts=[_experts(settings, count) for count in rows])
    rows = (3, 33) if settings.is_twin else (32, 256)
    note(head=[network_kernels.head(settings, count, milliseconds) for count in rows])
    batches = (1, 2) if settings.is_twin else (1, 8)
    note(attention=[network_kernels.attention(settings, count, milliseconds) for count in batches])
    if not settings.is_twin and importlib.util.find_spec("cuda") is not None:
        note(ahead_of_time=_ahead_of_time(settings))


def _torch_statistics(logits: torch.Tensor, mask: int) -> tuple[torch.Tensor, ...]:
    allowed = logits.clone()
    allowed[:, mask] = -torch.inf
    best, token = allowed.topk(2, -1)
    total = logits.logsumexp(-1, keepdim=True)
    probability = (logits - total).exp()
    confidence = (best - total).exp()
    return token[:, 0], confidence[:, 0], confidence[:, 1], total[:, 0] - (probability * logits).sum(-1)


def _logits(settings: Any, vocab: int, rows: int) -> torch.Tensor:
    """Random logits [rows, vocab] with ties; the mask token is often the best."""
    logits = torch.randn(rows, vocab, device=settings.device) * 4
    logits[::4] = logits[::4].round()
    logits[::3, vocab - 2] = 40.0
    return logits


def _row_statistics(settings: Any, vocab: int, rows: int) -> dict[str, Any]:
    from plugins import row_statistics

    rows, mask = (8, vocab - 2) if settings.is_twin else (rows, vocab - 2)
    copies = [
        _logits(settings, vocab, rows) for _ in range(1 if settings.is_twin else 8)
    ]  # together larger than the L2 cache
    logits, turn = copies[0], itertools.cycle(copies)
    got = [value.cpu().numpy() for value in row_statistics.launch(logits, mask)]
    expected = row_statistics.reference(logits.cpu().numpy(), mask)
    by_torch = [value.cpu().numpy() for value in _torch_statistics(logits, mask)]
    ms = milliseconds(
        lambda: row_statistics.launch(next(turn), mask), settings.repeats, settings.device, INNER
    )
    other = milliseconds(
        lambda: _torch_statistics(next(turn), mask), settings.repeats, settings.device, INNER
    )
    figures = {
        "vocab": vocab,
        "rows": rows,
        "ms": ms,
        "torch_ms": other,
        "gb_per_s": logits.numel() * 4 / ms / 1e6,
        "tokens_equal": bool((got[0] == expected[0]).all()),
        "error": max(float(np.abs(a - b).max()) for a, b in zip(got[1:3], expected[1:3], strict=True)),
        "torch_error": max(float(np.abs(a - b).max()) for a, b in zip(got[1:3], by_torch[1:3], strict=True)),
    }
    if limits := measured_ceilings(settings):
        figures["share_of_copy"] = figures["gb_per_s"] / limits[0]
    if not figures["tokens_equal"] or figures["error"] > 1e-5:
        raise SystemExit(f"the kernel row_statistics is wrong: {figures}")
    return figures


def _commit(settings: Any) -> dict[str, Any]:
    from plugins import commit
    from trt_runtime.decoding import device_commit as steps
    from trt_runtime.decoding.policies.base import CommitRule

    rng, mask, wrong, ms, cases = np.random.default_rng(0), 126_336, 0, 0.0, 5 if settings.is_twin else 200
    for case in range(cases):
        ids = np.where(rng.random((8, 32)) < 0.6, mask, rng.integers(0, 1000, (8, 32))).astype(np.int64)
        token, confidence = (
            rng.integers(0, 1000, (8, 32)),
            np.round(rng.random((8, 32)), 2).astype(np.float32),
        )
        kinds = ("fixed", "threshold", "factor")
        rules = [
            CommitRule(
                kinds[i % 3], int(rng.integers(1, 33)), 0.75, int(rng.integers(32)), int(rng.integers(1, 9))
            )
            for i in range(8)
        ]
        state = steps.commit_arrays(rules, 32)
        arrays = (ids, token, confidence, state.plan, state.value, state.state, state.committed)
        tensors = [torch.from_numpy(array.copy()).to(settings.device) for array in arrays]
        commit.launch(*tensors, mask)
        steps.commit(ids, token, confidence, state, mask)
        wrong += sum(
            int((tensors[i].cpu().numpy() != array).sum())
            for i, array in ((0, ids), (5, state.state), (6, state.committed))
        )
        if case == 0:
            ms = milliseconds(
                lambda tensors=tensors: commit.launch(*tensors, mask),
                settings.repeats,
                settings.device,
                INNER,
            )
    if wrong:
        raise SystemExit(f"the kernel commit differs from its reference in {wrong} places")
    return {"cases": cases, "rows": 8, "columns": 32, "ms": ms}


def _dense_experts(
    hidden: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The dense form of the graph: all experts for every row."""
    units = torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)
    shares = units.view(len(hidden), weights.shape[1], -1) * weights.to(units.dtype)[:, :, None]
    return shares.view(len(hidden), -1) @ down.T


def _experts(settings: Any, rows: int) -> dict[str, Any]:
    """A layer of LLaDA-MoE's size with random weights and random experts: the kernels against their reference
    (64 rows of them), and the time of both forms."""
    from plugins import experts

    count, inner, width, top_k = (6, 40, 24, 3) if settings.is_twin else (64, 1024, 2048, 8)
    dtype = torch.float32 if settings.is_twin else torch.bfloat16
    shapes = (rows, width), (count * inner, width), (count * inner, width), (width, count * inner)
    made = (torch.randn(shape, device=settings.device) for shape in shapes)
    tensors = [(value * scale).to(dtype) for value, scale in zip(made, (1, 0.02, 0.02, 0.02), strict=True)]
    best = torch.rand(rows, count, device=settings.device).topk(top_k, -1)
    weights = torch.zeros(rows, count, device=settings.device).scatter(1, best.indices, best.values)
    some = slice(0, min(rows, 64))
    got = experts.launch(*tensors, weights, top_k)[some].float().cpu().numpy()
    hidden, *held = (value.float().cpu().numpy() for value in tensors)
    expected = experts.reference(hidden[some], *held, weights[some].cpu().numpy())
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    if not error < (1e-5 if settings.is_twin else 2e-2):
        raise SystemExit(f"the kernels of experts are wrong by {error} of the largest value, {rows} rows")
    ms = milliseconds(lambda: experts.launch(*tensors, weights, top_k), settings.repeats, settings.device, 4)
    dense = milliseconds(lambda: _dense_experts(*tensors, weights), settings.repeats, settings.device, 4)
    return {
        "rows": rows,
        "experts": count,
        "top_k": top_k,
        "inner": inner,
        "hidden": width,
        "error": error,
        "ms": ms,
        "dense_ms": dense,
    }


def _ahead_of_time(settings: Any) -> dict[str, Any]:
    """The PTX that engines carry, loaded by the driver through cuda-python and launched without Triton."""
    from plugins import row_statistics
    from trt_runtime.backends import cuda

    device, vocab, rows = cuda.CudaDevice(), settings.vocabularies[0], 32
    compiled = row_statistics.compiled(vocab, vocab - 2, device.facts.compute_capability)
    kernel, logits = device.kernel(compiled.ptx.encode(), compiled.name), _logits(settings, vocab, rows)
    kinds = {"token": np.int64, "confidence": np.float32, "runner_up": np.float32, "entropy": np.float32}
    shapes = {name: (np.dtype(kind), (rows,)) for name, kind in kinds.items()}
    arena = device.arena(cuda.Arena.size_of(shapes))
    results, addresses, used = arena.place(shapes)
    torch.cuda.synchronize()
    kernel.queue(rows, compiled.threads, compiled.shared, [logits.data_ptr(), *addresses.values()])
    device.download(arena.host[:used], arena.device.address)
    device.synchronize()
    expected = row_statistics.reference(logits.cpu().numpy(), vocab - 2)
    if (results["token"] != expected[0]).any() or np.abs(results["confidence"] - expected[1]).max() > 1e-5:
        raise SystemExit("the kernel row_statistics, compiled ahead of time, is wrong")
    return {"rows": rows, "vocab": vocab, "equal": True, "gpu": device.facts.name}
