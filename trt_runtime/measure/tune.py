"""The fastest way of decoding that keeps the answers: block length, policy, cache and refresh, tried on a
user's own prompts and measured on this machine.

    1. baseline: one token per forward, dual cache, the model's block length: how many answers are right
    2. block lengths, with thresholds  ->  the fastest within the bound
    3. every other policy with a few values of its option, at that block length
    4. with the best policy: caches, refresh modes, a bounded suffix
    5. the fastest few once more, in turn, prompt by prompt: medians decide

A way of decoding is within the bound if at most `max_drop` points fewer answers are right than with the
baseline. An answer is right if the data list it or, for prompts without answers, if it equals the baseline's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import Manifest
from trt_runtime.decoding.blocks import blocks_of
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.policies.options import options_of
from trt_runtime.decoding.policies.registry import POLICIES
from trt_runtime.measure.bench import machine
from trt_runtime.measure.examples import Example, is_right
from trt_runtime.model import Model

_THRESHOLDS = (0.7, 0.8, 0.9, 0.95)
_FINALISTS, _ROUNDS = 3, 3


@dataclass
class Trial:
    """Decoding options and their result: right answers, seconds and useful tokens of all prompts, one at a
    time, forwards."""

    options: dict[str, Any]
    right: int
    seconds: float
    tokens: int
    nfe: int

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


class Tuner:
    """Trials over examples. tell: called with a line about each."""

    def __init__(
        self,
        model: Model,
        examples: list[Example],
        base: GenerationConfig,
        max_drop: float,
        match: str,
        tell: Callable[[str], None],
    ) -> None:
        self.model, self.base, self.max_drop, self.match, self.tell = (
            model,
            base.resolved(model.manifest),
            max_drop,
            match,
            tell,
        )
        self.examples, self.trials = examples, list[Trial]()
        self.baseline = self._baseline()

    def run(self) -> Trial:
        """The fastest trial within the bound."""
        block, gen = self.base.block_length, self.base.gen_length
        assert block is not None and gen is not None
        lengths = sorted({max(1, block // 2), block, min(gen, 2 * block), min(gen, 4 * block)})
        best = self._best(
            [
                {"block_length": length, "policy": "threshold", "threshold": t}
                for length in lengths
                for t in _THRESHOLDS
            ]
        )
        shared = {"block_length": best.options["block_length"]}
        best = self._best(
            [
                {**shared, "policy": name, **own}
                for name in POLICIES.names()
                for own in POLICIES.find(name).trials
            ]
        )
        length = best.options["block_length"]
        self._best([best.options | more for more in self._caches(length)])
        return self._final()

    def _caches(self, length: int) -> list[dict[str, Any]]:
        """The caches to try, for blocks of `length`."""
        blocks = blocks_of(self.model.manifest.decoding, length)
        if blocks is None:
            return [
                {"cache": "prefix"},
                {"refresh_every": 2},
                {"refresh_every": 0, "refresh_window": length},
                {"refresh_every": 2, "refresh_window": length},
                {"suffix": 2 * length},
                {"suffix": length, "suffix_decay": True},
            ]
        return [{"cache": "block_dual"}] if blocks.has_small_blocks else []

    def is_within(self, trial: Trial) -> bool:
        return 100 * (self.baseline.right - trial.right) / len(self.examples) <= self.max_drop + 1e-9

    def _baseline(self) -> Trial:
        options = {"policy": "fixed", "cache": self.base.cache, "block_length": self.base.block_length}
        trial, answers = self._decode(options)
        self.examples = [
            replace(example, answers=(answer,)) if example.answers is None else example
            for example, answer in zip(self.examples, answers, strict=True)
        ]
        trial.right = self._right(answers)
        self.tell(self._line(trial))
        return trial

    def _best(self, wanted: list[dict[str, Any]]) -> Trial:
        """Try each, and return the fastest of all trials within the bound."""
        for options in wanted:
            trial, answers = self._decode(options)
            trial.right = self._right(answers)
            self.trials.append(trial)
            self.tell(self._line(trial))
        return max([self.baseline, *filter(self.is_within, self.trials)], key=lambda trial: trial.speed)

    def _final(self) -> Trial:
        """Measure the fastest few again, in turn."""
        finalists = sorted(filter(self.is_within, self.trials), key=lambda trial: -trial.speed)[:_FINALISTS]
        finalists.append(self.baseline)  # so that the speedup is measured side by side
        seconds = [[self._decode(trial.options)[0].seconds for trial in finalists] for _ in range(_ROUNDS)]
        for i, trial in enumerate(finalists):
            trial.seconds = statistics.median(times[i] for times in seconds)
        self.tell(f"measuring the fastest again, in turn, medians of {_ROUNDS}:")
        for trial in finalists:
            self.tell(self._line(trial))
        return max(finalists, key=lambda trial: trial.speed)

    def _decode(self, options: dict[str, Any]) -> tuple[Trial, list[str]]:
        config = replace(self.base, **options)
        begin = time.perf_counter()
        results = [self.model.generate([example.prompt], config)[0] for example in self.examples]
        seconds = time.perf_counter() - begin
        trial = Trial(
            options,
            0,
            seconds,
            sum(result.num_useful for result in results),
            sum(result.nfe for result in results),
        )
        return trial, [result.text or "" for result in results]

    def _right(self, answers: list[str]) -> int:
        return sum(
            is_right(answer, example, self.match)
            for answer, example in zip(answers, self.examples, strict=True)
        )

    def _line(self, trial: Trial) -> str:
        share = trial.right / len(self.examples)
        error = 100 * math.sqrt(share * (1 - share) / len(self.examples))
        words = ", ".join(f"{name} {value}" for name, value in trial.options.items())
        return (
            f"{100 * share:5.1f} ± {error:.1f} % right  {trial.speed:7.0f} tokens/s  "
            f"{trial.tokens / trial.nfe:5.2f} a forward  {words}"
        )


def run(
    model: Model,
    examples: list[Example],
    base: GenerationConfig,
    *,
    max_drop: float,
    match: str,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Tune, and return the baseline, the choice, and all trials."""
    tuner = Tuner(model, examples, base, max_drop, match, tell)
    chosen = tuner.run()
    # options that the choice depends on in addition to those that were tried: its policy's own
    options = {"cache": tuner.base.cache, **chosen.options} | {
        item.name: getattr(tuner.base, item.name)
        for item in options_of(POLICIES.find(chosen.options["policy"]))
        if item.name not in chosen.options and item.off is None
    }
    return {
        "artifact": model.path.name,
        "backend": model.backend.name,
        "examples": len(examples),
        "max_drop": max_drop,
        "options": options,
        "right": chosen.right,
        "baseline_right": tuner.baseline.right,
        "speedup": chosen.speed / tuner.baseline.speed,
        "baseline": asdict(tuner.baseline),
        "chosen": asdict(chosen),
        "trials": [asdict(trial) for trial in tuner.trials],
        "machine": machine(),
    }


def write(artifact: Path, options: dict[str, Any], since: Manifest | None = None) -> None:
    """Record options in the manifest: generations without options of their own use them. since: the manifest
    of the artifact that was tuned, if the artifact may have been replaced in the meantime. Raises DllmError
    if it was."""
    manifests.update(
        artifact,
        lambda current: replace(current, decoding=replace(current.decoding, tuned=options)),
        since=since or manifests.load(artifact),
    )
