"""What the host does in a forward, over a backend that computes nothing: choosing the window, assembling and
checking its inputs, checking the outputs, the policy, and the canvas.

    python benchmarks/cpu/host_loop.py                                   # 1 minute; make demo first
    python benchmarks/cpu/host_loop.py --artifact artifacts/sdar-demo    # block-causal attention

Microseconds for each call at batch 1 and 16, and for each row more: the sixteenth of a call of 16 rows costs
as much as the others. Medians of interleaved rounds, one thread. The figure is what remains when the
backend's own time is taken away.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2]))

from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import Manifest
from trt_runtime.decoding.backend import Backend, Cache, Stats, Window
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.generator import Generator
from trt_runtime.decoding.rules import rules_of
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.measure.bench import machine

ROUNDS, BATCHES, PROMPT, GEN_LENGTH, BLOCK = 9, (1, 16), 256, 128, 32
POLICIES: dict[str, dict[str, Any]] = {
    "threshold": {"policy": "threshold", "threshold": 0.9},
    "factor": {"policy": "factor"},
    "fixed": {"policy": "fixed", "steps": GEN_LENGTH // 2},
}


class NullBackend(Backend):
    """Answers with prepared statistics: about two candidates in a block of 32 are certain. seconds, calls:
    spent in it; ordinary: the token of every answer."""

    name: ClassVar[str] = "null"
    is_on_cpu = True

    def __init__(self, manifest: Manifest, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.manifest = replace(manifest, model=replace(manifest.model, max_length=PROMPT + 2 * GEN_LENGTH))
        self.seconds, self.calls = 0.0, 0
        shape = (64, max(BATCHES), 2 * BLOCK)
        certain = rng.random(shape) < 2 / BLOCK
        confidence = np.where(certain, 0.95, rng.uniform(0.1, 0.4, shape)).astype(np.float32)
        special = (manifest.decoding.mask_token_id, *manifest.decoding.eos_token_ids)
        self.ordinary = next(token for token in range(9) if token not in special)
        token = np.full(shape, self.ordinary, np.int64)
        self._prepared = [
            Stats(*arrays) for arrays in zip(token, confidence, confidence / 9, confidence, strict=True)
        ]

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return Cache(batch, capacity, None)

    def close(self) -> None:
        """Nothing is open."""

    def _forward(self, role: str, cache: Cache, slots: slice, window: Window, want_logits: bool) -> Stats:
        begun = time.perf_counter()
        stats, shape = self._prepared[self.calls % 64], window.logit_rows.shape
        arrays = (stats.token, stats.confidence, stats.runner_up, stats.entropy)
        if shape[1] > 2 * BLOCK:  # a cache plan that asks for the whole canvas
            arrays = tuple(np.tile(array, -(-shape[1] // (2 * BLOCK))) for array in arrays)
        answer = Stats(*(array[: shape[0], : shape[1]] for array in arrays))
        self.calls += 1
        self.seconds += time.perf_counter() - begun
        return answer


def measured(manifest: Manifest, options: dict[str, Any], batch: int) -> float:
    """Microseconds of the host for each call of a whole generation."""
    config = GenerationConfig(
        gen_length=GEN_LENGTH, block_length=BLOCK, stop_at_eos=False, **options
    ).resolved(manifest)
    backend, rules = NullBackend(manifest), rules_of(config, manifest)
    prompt = np.full(PROMPT, backend.ordinary, np.int64)
    begun = time.perf_counter()
    Generator(backend, [Sequence(prompt, rules, seed) for seed in range(batch)]).run()
    return 1e6 * (time.perf_counter() - begun - backend.seconds) / backend.calls


def rows(manifest: Manifest, rounds: int) -> Iterator[dict[str, Any]]:
    """Every policy at every batch, in interleaved rounds."""
    seen: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for policy, options in POLICIES.items():
            for batch in BATCHES:
                seen.setdefault((policy, batch), []).append(measured(manifest, options, batch))
    for policy in POLICIES:
        one, many = (statistics.median(seen[policy, batch]) for batch in BATCHES)
        yield {
            "policy": policy,
            "microseconds": round(one, 1),
            f"microseconds at batch {BATCHES[1]}": round(many, 1),
            "a row more": round((many - one) / (BATCHES[1] - 1), 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--artifact", type=Path, default=Path("artifacts/llada-demo"), help="default: artifacts/llada-demo"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"interleaved rounds (default {ROUNDS})")
    parser.add_argument("--output", type=Path, help="a file for the JSON result")
    args = parser.parse_args()
    report = {"machine": machine(), "rows": list(rows(manifests.load(args.artifact), args.rounds))}
    for row in report["rows"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
