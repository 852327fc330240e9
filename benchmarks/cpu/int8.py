"""What 8-bit products cost on this processor, spelling by spelling: time and error of a refine step and a
prefix pass of a random LLaDA of 140 M parameters.

    python benchmarks/cpu/int8.py                                        # this processor (3 minutes)
    python tools/cpu_without.py vnni -- python benchmarks/cpu/int8.py    # as if it had only AVX2
    python benchmarks/cpu/int8.py --artifact artifacts/llada-demo        # errors on a trained model

Each spelling, with session.x64quantprecision 0 and 1 where that changes anything:
    w8a8      8-bit weights, MatMulIntegerToFloat (u8 x s8): exact with VNNI; without it only with the option
    w7a8      weights in 7 bits: no sum of two products overflows 16 bits, so it is exact on every processor
    int8      8-bit weights in blocks of 128, MatMulNBits of accuracy level 4
    int4      4-bit weights in blocks of 128, MatMulNBits of accuracy level 4 (the head: 8 bit)
error: largest difference of logits from the fp32 artifact's, over the largest logit; same: share of rows with
the same best token. One random canvas. Medians of interleaved rounds, one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2]))

from export import pipeline
from export.schemes.base import Array
from export.schemes.int4 import Int4
from export.schemes.w8a8 import W8A8
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.ort import OrtBackend, int8
from trt_runtime.decoding.backend import Window
from trt_runtime.measure.bench import machine

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, PASS, STEP = 7, 384, 32


class W7A8(W8A8):
    """Weights in 7 bits."""

    def quantize(self, name: str, shape: tuple[int, int], rows: Iterator[Array]) -> dict[str, Array]:
        pieces = list(rows)
        parts = super().quantize(name, shape, iter(pieces))
        scale = parts["scale"] * np.float32(127 / 63)
        parts["int8"] = (
            np.concatenate(
                [np.rint(piece / scale[at : at + len(piece), None]) for at, piece in _placed(pieces)]
            )
            .astype(np.int8)
            .T.copy()
        )
        return parts | {"scale": scale}


def _placed(pieces: list[Array]) -> Iterator[tuple[int, Array]]:
    at = 0
    for piece in pieces:
        yield at, piece
        at += len(piece)


class Int8(Int4):
    """Every layer quantised as int4 quantises its head."""

    def parts(self, name: str, shape: tuple[int, int]) -> Any:
        return super().parts("lm_head.weight", shape)

    def quantize(self, name: str, shape: tuple[int, int], rows: Iterator[Array]) -> dict[str, Array]:
        return super().quantize("lm_head.weight", shape, rows)

    def linear(self, op: Any, x: Any, name: str, weight: Any, bias: Any = None) -> Any:
        shapes, self.shapes = self.shapes, {**self.shapes, "lm_head.weight": self.shapes[name]}
        product = super().linear(
            op, x, "lm_head.weight", lambda part: weight(part.replace("lm_head.weight", name)), bias
        )
        self.shapes = shapes
        return product


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--artifact", type=Path, help="an fp32 artifact whose checkpoint is quantised (default: a random one)"
    )
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        if args.artifact is None:
            checkpoint = str(scratch / "checkpoint")
            subprocess.run(
                [
                    sys.executable,
                    str(ROOT / "tools/random_checkpoint.py"),
                    "--preset",
                    "llada-140m",
                    checkpoint,
                ],
                cwd=ROOT,
                check=True,
            )
        else:
            checkpoint = str(manifests.load(args.artifact).source["checkpoint"])
        without = {"without": os.environ["DLLM_CPU_WITHOUT"]} if "DLLM_CPU_WITHOUT" in os.environ else {}
        report = {
            "machine": machine() | without,
            "exact as it is": {name: int8.is_exact(name, {}) for name in int8.PROBES},
            "rows": measure(scratch, checkpoint),
        }
    print(table(report))
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(scratch: Path, checkpoint: str) -> list[dict[str, Any]]:
    artifacts = {"fp32": None, "w8a8": W8A8, "w7a8": W7A8, "int8": Int8, "int4": Int4}
    for name, kind in artifacts.items():
        config = pipeline.ExportConfig(checkpoint, scratch / name)
        pipeline.export(
            config, lambda total: lambda done: None, scheme=None if kind is None else kind("fp32")
        )
    spellings = [
        ("fp32", {}),
        ("w8a8", {}),
        ("w8a8", {int8.PRECISION: "1"}),
        ("w7a8", {}),
        ("int8", {}),
        ("int4", {}),
    ]
    opened = [opened_with(scratch / name, settings) for name, settings in spellings]
    facts = opened[0].manifest.model
    length = min(PASS, facts.max_length)
    ids = np.random.default_rng(0).integers(0, facts.vocab_size, (1, length))
    calls = {
        "prefix_ms": (window(ids, 0, length), "prefix"),
        "refine_ms": (window(ids[:, -STEP:], length - STEP, length), "refine"),
    }
    times: list[dict[str, list[float]]] = [{key: [] for key in calls} for _ in opened]
    logits: list[Any] = []
    for backend in opened:
        cache = backend.new_cache(1, length)
        logits.append(backend.prefix(cache, slice(0, 1), calls["prefix_ms"][0], want_logits=True).logits[0])
    for _ in range(ROUNDS):
        for backend, taken in zip(opened, times, strict=True):
            cache = backend.new_cache(1, length)
            for key, (call, role) in calls.items():
                begin = time.perf_counter()
                getattr(backend, role)(cache, slice(0, 1), call)
                taken[key].append(1000 * (time.perf_counter() - begin))
    return [
        {
            "spelling": name,
            "precision": settings.get(int8.PRECISION, "0"),
            **{key: round(statistics.median(values), 2) for key, values in taken.items()},
            "error": float(f"{np.abs(mine - logits[0]).max() / np.abs(logits[0]).max():.3g}"),
            "same": float((mine.argmax(-1) == logits[0].argmax(-1)).mean()),
        }
        for (name, settings), taken, mine in zip(spellings, times, logits, strict=True)
    ]


def opened_with(artifact: Path, settings: Mapping[str, str]) -> OrtBackend:
    """The backend with these session options, whatever the probe finds."""
    usual = int8.session_entries
    int8.session_entries = lambda manifest: dict(settings)
    try:
        return OrtBackend(artifact, threads=1)
    finally:
        int8.session_entries = usual


def window(ids: Array, start: int, kv_len: int) -> Window:
    """A call over `ids` from position `start` on, with logits of its last positions."""
    rows = ids.shape[1]
    asked = np.arange(rows - min(STEP, rows), rows)[None]
    return Window(
        ids.astype(np.int64), np.arange(rows)[None] + start, np.array([start]), np.array([kv_len]), asked
    )


def table(report: dict[str, Any]) -> str:
    lines = [f"{'spelling':10}{'precision':>10}{'prefix ms':>11}{'refine ms':>11}{'error':>9}{'same %':>8}"]
    for row in report["rows"]:
        lines.append(
            f"{row['spelling']:10}{row['precision']:>10}{row['prefix_ms']:>11.1f}{row['refine_ms']:>11.1f}"
            f"{row['error']:>9.3f}{100 * row['same']:>8.0f}"
        )
    exact = ", ".join(
        f"{name}: {'yes' if exact else 'no'}" for name, exact in report["exact as it is"].items()
    )
    return "\n".join([*lines, f"exact on this processor as it is: {exact}", str(report["machine"])])


if __name__ == "__main__":
    main()
