"""Measurements of every backend in report.py: parity with PyTorch, milliseconds per forward, tokens per
second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernels import measured_ceilings
from windows import windows

from trt_runtime.artifact.manifest import Manifest
from trt_runtime.decoding.backend import Backend, Cache, Stats, Window
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.machine import devices, roofline
from trt_runtime.model import Model

STATISTICS = ("confidence", "runner_up", "entropy")


def outputs(backend: Backend, settings: Any) -> dict[str, Stats]:
    """Both roles once, over the same inputs for every backend."""
    canvas = settings.canvases[0]
    full, step = windows(backend.manifest, 1, canvas, settings.block_length)
    cache = backend.new_cache(1, canvas)
    return {
        "prefix": backend.prefix(cache, slice(0, 1), full),
        "refine": backend.refine(cache, slice(0, 1), step),
    }


def parity(measured: dict[str, Stats], settings: Any, tag: str) -> dict[str, Any]:
    """Distances from PyTorch in fp32 and in the artifact's dtype, whose own distance from fp32 is the scale.

    Distances are the largest differences of log probabilities and of entropies, in nats: with random weights
    the probabilities are too small to compare directly. Passed: every distance from fp32 is at most three
    times PyTorch's own.
    """
    file = Path(settings.work) / "torch.npz"
    if not file.is_file():
        return {"skipped": "no outputs of PyTorch: the stage 'torch' did not run"}
    arrays, result = np.load(file), {}
    for role, stats in measured.items():
        row: dict[str, Any] = {}
        for name in STATISTICS:
            wide, same, mine = (
                _nats(name, item)
                for item in (
                    arrays[f"fp32 {role} {name}"],
                    arrays[f"{settings.dtype} {role} {name}"],
                    getattr(stats, name),
                )
            )
            row[name] = {
                "from_fp32": _apart(mine, wide),
                "from_torch": _apart(mine, same),
                "torch_from_fp32": _apart(same, wide),
            }
        row["tokens_as_fp32"] = float((stats.token == arrays[f"fp32 {role} token"]).mean())
        row["torch_tokens_as_fp32"] = float(
            (arrays[f"{settings.dtype} {role} token"] == arrays[f"fp32 {role} token"]).mean()
        )
        floor = 1e-3 if settings.dtype == "fp32" else 5e-3
        row["passed"] = all(
            row[name]["from_fp32"] <= max(floor, 3 * row[name]["torch_from_fp32"]) for name in STATISTICS
        )
        result[role] = row
    result["passed"] = all(row["passed"] for row in result.values())
    result["of"] = tag
    return result


def _apart(mine: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(mine - theirs).max())


def _nats(name: str, values: np.ndarray) -> np.ndarray:
    return values if name == "entropy" else np.log(np.maximum(values, 1e-30))


def speeds(backend: Backend, settings: Any, note: Callable[..., None]) -> list[dict[str, Any]]:
    """Milliseconds of a refine step and a prefix pass at each canvas and batch, in wall time, and their
    shares of the roofline."""
    rows: list[dict[str, Any]] = []
    for canvas in settings.canvases:
        for batch in settings.batches:
            full, step = windows(backend.manifest, batch, canvas, settings.block_length, seed=1)
            cache, row = backend.new_cache(batch, canvas), {"canvas": canvas, "batch": batch}
            row["prefix_ms"] = _call_ms(backend.prefix, cache, full, max(3, settings.repeats // 3))
            row["refine_ms"] = _call_ms(backend.refine, cache, step, settings.repeats)
            rows.append(row | shares(backend.manifest, settings, row))
            note(speeds=rows)
    return rows


def _call_ms(call: Callable[..., Stats], cache: Cache, window: Window, repeats: int) -> float:
    """Median wall time in ms of a synchronous call, after four warm-up calls."""
    taken = []
    for _ in range(repeats + 4):
        begin = time.perf_counter()
        call(cache, slice(0, cache.batch), window)
        taken.append(1000 * (time.perf_counter() - begin))
    return statistics.median(taken[4:])


def shares(manifest: Manifest, settings: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The roofline at this machine's measured copy and product rates, and its ratio to the measured times."""
    limits = measured_ceilings(settings)
    if limits is None:
        return {}
    device = devices.DeviceSpec("measured", 1 << 40, 0, limits[0], limits[1], limits[1])
    work = roofline.Work(row["batch"], row["canvas"], settings.block_length)
    ratios = {}
    for name, size in (("prefix", row["canvas"]), ("refine", settings.block_length)):
        floor = roofline.seconds(manifest.model, work, device, rows=size)
        ratios[f"{name}_roofline_ms"] = 1000 * floor if floor else None
        ratios[f"{name}_share"] = 1000 * floor / row[f"{name}_ms"] if floor else None
    return ratios


def tokens_per_second(backend: Backend, settings: Any, repeats: int = 3) -> dict[str, Any]:
    """The decoding loop: one prompt on the longest canvas, dual cache, a fixed schedule with a whole number
    of forwards per block."""
    canvas, gen = settings.canvases[-1], settings.gen_length
    full, _ = windows(backend.manifest, 1, canvas, settings.block_length, seed=2)
    prompt = np.where(full.input_ids[0] == backend.manifest.decoding.mask_token_id, 5, full.input_ids[0])[
        : canvas - gen
    ].tolist()
    forwards = settings.forwards_per_block * -(-gen // settings.block_length)
    config = GenerationConfig(
        gen_length=gen, block_length=settings.block_length, policy="fixed", steps=forwards, stop_at_eos=False
    )
    model, taken = Model(settings.artifact, backend), []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        (result,) = model.generate([prompt], config)
        taken.append(time.perf_counter() - begin)
    seconds = statistics.median(taken[1:])
    return {
        "canvas": canvas,
        "gen_length": gen,
        "nfe": result.nfe,
        "tokens_per_forward": gen / result.nfe,
        "tokens_per_second": gen / seconds,
    }


def at_the_schedule(row: dict[str, Any], settings: Any, manifest: Manifest) -> float:
    """Tokens per second at batch 1, computed from the times of single calls and the schedule's tokens per
    forward. A block begins with a prefix pass; a block-causal one has refine steps alone, and ends with its
    store, which costs as much as one."""
    forwards = settings.block_length / settings.tokens_per_forward
    milliseconds = (forwards - 1) * row["refine_ms"] + row["prefix_ms"]
    if manifest.decoding.is_block_causal:
        milliseconds = (forwards + 1) * row["refine_ms"]
    return 1000 * settings.block_length / milliseconds


def measure(backend: Backend, settings: Any, note: Callable[..., None], tag: str) -> None:
    """Parity, speeds and tokens per second of a backend. A wrong backend is still measured, but its stage
    fails."""
    verdict = parity(outputs(backend, settings), settings, tag)
    note(parity=verdict)
    rows = speeds(backend, settings, note)
    longest = next(row for row in rows if row["canvas"] == settings.canvases[-1] and row["batch"] == 1)
    note(
        tokens_per_second=tokens_per_second(backend, settings),
        tokens_per_second_at_schedule=at_the_schedule(longest, settings, backend.manifest),
    )
    if not verdict.get("passed", True):
        raise SystemExit(f"{tag} is further from PyTorch in fp32 than rounding explains: {verdict}")


def memory(settings: Any) -> int | None:
    """Bytes in use on the GPU, by all processes; None for the twin."""
    if settings.is_twin:
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)
