"""Fast-dLLM's own policies: commit as many positions as are certain, by a threshold or a factor. Pure NumPy.
Shape legend: R candidates of one row of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trt_runtime.decoding.policies.base import BlockState, Bools, CommitRule, Policy, RowStats, most_confident
from trt_runtime.decoding.policies.options import Value, option, threshold_option


@dataclass(frozen=True)
class Threshold(Policy):
    """The most confident position, and every other with confidence >= threshold (Fast-dLLM, arXiv 2505.22618,
    section 3.3).

    With `steps_per_block`, only the most confident within a budget: an equal share per step, plus what
    earlier steps left over (Fast-dLLM's Dream without a cache). After the last step the budget is everything
    that is left.
    """

    name: ClassVar[str] = "threshold"
    threshold: float = threshold_option(hint="0.9 is usual; 1 commits one token per forward")
    steps_per_block: int | None = None

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        asked = most_confident(stats.confidence, is_masked, self._budget(int(is_masked.sum()), state))
        return most_confident(stats.confidence, is_masked, 1) | (asked & (stats.confidence >= self.threshold))

    def rule(self, state: BlockState, limit: int) -> CommitRule | None:
        return CommitRule(self.name, limit, self.threshold) if self.steps_per_block is None else None

    def _budget(self, left: int, state: BlockState) -> int:
        steps = left if self.steps_per_block is None else max(1, self.steps_per_block - state.forced)
        done = state.step - state.forced + 1
        if self.steps_per_block is None or done >= steps:
            return left
        return max(0, (state.num_masked // steps) * done - (state.num_masked - left))


@dataclass(frozen=True)
class Factor(Policy):
    """The n most confident positions for the largest n with (n + 1)(1 - c_n) < factor, at least one
    (Fast-dLLM, theorem 1). The published code accepts one candidate more than this rule of the paper; here
    the paper's rule is used."""

    name: ClassVar[str] = "factor"
    factor: float = option(
        1.0,
        low=0,
        low_is_open=True,
        hint="1.0 is usual; larger commits more at once",
        help="bound on (n + 1)(1 - confidence of the n-th)",
    )
    trials: ClassVar[tuple[Mapping[str, Value], ...]] = ({"factor": 0.5}, {"factor": 1.0})

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        ordered = np.sort(stats.confidence[is_masked])[::-1]
        n = np.arange(1, len(ordered) + 1)
        accepted = np.flatnonzero((n + 1) * (1 - ordered) < self.factor)
        return most_confident(stats.confidence, is_masked, int(accepted[-1]) + 1 if len(accepted) else 1)

    def rule(self, state: BlockState, limit: int) -> CommitRule:
        return CommitRule(self.name, limit, self.factor)
