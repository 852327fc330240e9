"""SDAR's remasking strategies: schedules by the length of the block, whatever of it is still masked. Pure
NumPy.

A step's quota is a share of the block's positions, those of the prompt included; here it never takes more
than the masks that are left (the published loop then overwrites other positions). Shape legend: R candidates
of one row of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trt_runtime.decoding.policies.base import BlockState, Bools, Policy, RowStats, most_confident
from trt_runtime.decoding.policies.options import option, threshold_option
from trt_runtime.decoding.policies.schedules import quota


@dataclass(frozen=True)
class _OfBlock(Policy):
    """A schedule of `steps_per_block` steps over the block's positions; without it, one position a step."""

    is_schedule: ClassVar[bool] = True
    steps_per_block: int | None = None

    def count(self, state: BlockState) -> int:
        """How many positions a step may commit by the schedule; after its last step, one."""
        steps = self.steps_per_block or max(1, state.length)
        number = state.step - state.forced
        return max(1, quota(state.length, steps)[number]) if number < steps else 1


@dataclass(frozen=True)
class Sequential(_OfBlock):
    """The leftmost masked positions, as many as the schedule's quota (SDAR)."""

    name: ClassVar[str] = "sequential"

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        return np.asarray(is_masked & (np.cumsum(is_masked) <= self.count(state)))


@dataclass(frozen=True)
class LowConfidenceStatic(_OfBlock):
    """The most confident positions, as many as the schedule's quota (SDAR)."""

    name: ClassVar[str] = "low_confidence_static"

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        return most_confident(stats.confidence, is_masked, self.count(state))


@dataclass(frozen=True)
class LowConfidenceDynamic(_OfBlock):
    """Every position with confidence >= threshold if these are at least the schedule's quota, else the most
    confident, as many as the quota (SDAR, arXiv 2510.06303; LLaDA2)."""

    name: ClassVar[str] = "low_confidence_dynamic"
    threshold: float = threshold_option(hint="0.9 is usual; 1 commits one token per forward")
    at_least: int = option(1, low=1, help="a step commits no fewer positions, if as many are masked")

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        count = max(self.at_least, self.count(state))
        sure = is_masked & (stats.confidence >= self.threshold)
        return sure if sure.sum() >= count else most_confident(stats.confidence, is_masked, count)
