"""What every backend of report.py is measured by: parity with PyTorch, milliseconds of each forward, tokens
per second."""

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


def parity(made: dict[str, Stats], settings: Any, tag: str) -> dict[str, Any]:
    """Against PyTorch in fp32 and in the artifact's dtype, whose own distance from fp32 is the yardstick.

    Distances are the largest differences of logarithms of probabilities and of entropies, in nats: with
    random weights probabilities are small, and their differences would say nothing. Passed: nothing is
    further from fp32 than three times what PyTorch's is.
    """
    file = Path(settings.work) / "torch.npz"
    if not file.is_file():
        return {"skipped": "no outputs of PyTorch: its stage did not run"}
    held, result = np.load(file), {}
    for role, stats in made.items():
        row: dict[str, Any] = {}
        for name in STATISTICS:
            wide, same, mine = (
                _nats(name, item)
                for item in (
                    held[f"fp32 {role} {name}"],
                    held[f"{settings.dtype} {role} {name}"],
                    getattr(stats, name),
                )
            )
            row[name] = {
                "from_fp32": _apart(mine, wide),
                "from_torch": _apart(mine, same),
                "torch_from_fp32": _apart(same, wide),
            }
        row["tokens_as_fp32"] = float((stats.token == held[f"fp32 {role} token"]).mean())
        row["torch_tokens_as_fp32"] = float(
            (held[f"{settings.dtype} {role} token"] == held[f"fp32 {role} token"]).mean()
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
    """Milliseconds of a refine step and a prefix pass at each canvas and batch, as a caller sees them, and
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
    """Median wall time of a call, which returns when its results are there; four before it warm up."""
    taken = []
    for _ in range(repeats + 4):
        begin = time.perf_counter()
        call(cache, slice(0, cache.batch), window)
        taken.append(1000 * (time.perf_counter() - begin))
    return statistics.median(taken[4:])


def shares(manifest: Manifest, settings: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The roofline of this machine (its measured copy and product rates) over what was measured."""
    limits = measured_ceilings(settings)
    if limits is None:
        return {}
    device = devices.DeviceSpec("measured", 1 << 40, 0, limits[0], limits[1], limits[1])
    work = roofline.Work(row["batch"], row["canvas"], settings.block_length)
    made = {}
    for name, size in (("prefix", row["canvas"]), ("refine", settings.block_length)):
        floor = roofline.seconds(manifest.model, work, device, rows=size)
        made[f"{name}_roofline_ms"] = 1000 * floor if floor else None
        made[f"{name}_share"] = 1000 * floor / row[f"{name}_ms"] if floor else None
    return made


def tokens_per_second(backend: Backend, settings: Any, repeats: int = 3) -> dict[str, Any]:
    """The loop itself: one prompt on the longest canvas, dual cache, a fixed schedule of whole forwards a
    block."""
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


def at_the_schedule(row: dict[str, Any], settings: Any) -> float:
    """Tokens a second that the times of single calls amount to at exactly the schedule's tokens per forward
    (batch 1)."""
    forwards = settings.block_length / settings.tokens_per_forward
    return settings.block_length / ((row["prefix_ms"] + (forwards - 1) * row["refine_ms"]) / 1000)


def measure(backend: Backend, settings: Any, note: Callable[..., None], tag: str) -> None:
    """Parity, speeds and tokens per second of a backend. A backend that is wrong is measured all the same,
    and its stage fails."""
    held = parity(outputs(backend, settings), settings, tag)
    note(parity=held)
    rows = speeds(backend, settings, note)
    longest = next(row for row in rows if row["canvas"] == settings.canvases[-1] and row["batch"] == 1)
    note(
        tokens_per_second=tokens_per_second(backend, settings),
        tokens_per_second_at_schedule=at_the_schedule(longest, settings),
    )
    if not held.get("passed", True):
        raise SystemExit(f"{tag} is further from PyTorch in fp32 than rounding explains: {held}")


def memory(settings: Any) -> int | None:
    """Bytes in use on the GPU, by anything."""
    if settings.is_twin:
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)
