"""Mixture of experts on a CPU (a part of system.py): a random LLaDA-MoE of 290 M parameters (64 experts, 8 of
which are chosen), dense, by ONNX Runtime's operators MoE and QMoE (int4), and in eager PyTorch (transformers'
loop over experts); and how a forward grows with rows and experts, compared with the roofline."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.extend(str(Path(__file__).resolve().parents[2] / name) for name in ("", "tools"))

from machine_rates import peaks
from model_sizes import PRESETS
from random_checkpoint import write as write_checkpoint

from trt_runtime.artifact.manifest import ModelFacts
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.backend import Window
from trt_runtime.machine import roofline

FORMS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "moe": ("--target", "ort-cpu"),
    "int4": ("--quantize", "int4", "--gate", "no"),
}
ROWS, COUNTS, TURNS = (1, 8, 32, 128, 384), (16, 64, 128), 5


def exported(run: Callable[..., None], checkpoint: Path, out: Path) -> dict[str, Path]:
    """The artifacts of a checkpoint, by form."""
    paths = {form: out / form for form in FORMS}
    for form, options in FORMS.items():
        command = ("--checkpoint", str(checkpoint), "--out", str(paths[form]), "--verify", "no")
        run("-m", "export", *command, *options)
    return paths


def measure(run: Callable[..., None], scratch: Path, repeats: int, output: Path) -> dict[str, Any]:
    """The bench of all forms (written by itself), and the growth of a forward."""
    config, dtype = PRESETS["llada-moe-300m"]
    points, rates = [], peaks(1)
    for count in COUNTS:
        checkpoint = scratch / f"experts-{count}"
        write_checkpoint(config | {"num_experts": count}, checkpoint, dtype)
        paths = exported(run, checkpoint, scratch / f"forms-{count}")
        if count == config["num_experts"]:
            run(
                *("-m", "trt_runtime.cli", "bench", str(paths["dense"]), "--threads", "1"),
                *("--beside", str(paths["moe"]), "--beside", str(paths["int4"])),
                *("--prompt-length", "256", "--gen-length", "128", "--block-length", "32"),
                *("--tokens-per-step", "2", "--count", "1", "--repeats", str(repeats)),
                *("--variants", "dual", "--reference", "dual"),
                *("--output", str(output / "system-experts.json")),
            )
        rows = ROWS if count == config["num_experts"] else (32,)
        for point in growth({form: OrtBackend(path, threads=1) for form, path in paths.items()}, rows, rates):
            points.append({"experts": count, **point})
            print(points[-1], flush=True)
    return {"rates": rates, "points": points}


def growth(
    backends: dict[str, OrtBackend], rows: tuple[int, ...], rates: dict[str, float]
) -> list[dict[str, Any]]:
    """Median ms of forwards over some rows of a canvas of 384, and the roofline's."""
    canvas = np.random.default_rng(0).integers(0, 30_000, (1, 384))
    points = []
    for count in rows:
        at = np.arange(count)[None]
        window = Window(canvas[:, :count], at, np.zeros(1, np.int64), np.array([384]), at[:, :32])
        times: dict[str, list[float]] = {form: [] for form in backends}
        caches = {form: backend.new_cache(1, 384) for form, backend in backends.items()}
        for turn in range(TURNS):
            for form, backend in backends.items():
                begin = time.perf_counter()
                backend.refine(caches[form], slice(0, 1), window)
                if turn:  # the first warms up
                    times[form].append(1000 * (time.perf_counter() - begin))
        for form, backend in backends.items():
            least = limit(backend.manifest.model, count, rates, quantised=form == "int4")
            ms = statistics.median(times[form])
            points.append({"form": form, "rows": count, "ms": ms, "roofline_ms": least})
    return points


def limit(facts: ModelFacts, rows: int, rates: dict[str, float], *, quantised: bool) -> float:
    """The minimum ms of a forward at this machine's measured rates, experts chosen independently."""
    linear = roofline.flops(facts, rows, 0, min(rows, 32))
    attention = roofline.flops(facts, rows, 384, min(rows, 32)) - linear
    compute = linear / rates["int8" if quantised else "fp32"] + attention / rates["fp32"]
    return 1000 * max(compute, roofline.read_bytes(facts, rows) / rates["bandwidth"])
