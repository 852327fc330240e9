"""Policies: which masked positions to commit, from the statistics of a forward. Pure NumPy.

Shape legend: R candidates of one row of the batch. A policy sees one row at a time: rows of a batch may follow different
policies, and no row can depend on its batch-mates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from trt_runtime.errors import DllmError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RowStats:
    """Statistics [R] of one row: the proposed token, its probability, the next best probability, the entropy in nats."""

    token: Ints
    confidence: Floats
    runner_up: Floats
    entropy: Floats


@dataclass(frozen=True)
class BlockState:
    """Where a row stands in its block: masks at the block's start, and forwards already made in it."""

    num_masked: int
    step: int


class Policy(ABC):
    """Commits at least one masked position in each call, unless none is masked."""

    name: ClassVar[str]

    @abstractmethod
    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        """The positions [R] to commit: a subset of `is_masked` [R]."""


@dataclass(frozen=True)
class Fixed(Policy):
    """The quota's number of most confident positions: a schedule, whatever the confidence (LLaDA, arXiv 2502.09992)."""

    name = "fixed"
    steps_per_block: int

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        quotas = quota(state.num_masked, self.steps_per_block)
        planned = quotas[state.step] if state.step < len(quotas) else 0
        # never none: where gaps of the prompt took part of the quota, the block outlasts its schedule
        return _most_confident(stats.confidence, is_masked, max(1, planned))


@dataclass(frozen=True)
class Threshold(Policy):
    """The most confident position, and every other with confidence >= threshold (Fast-dLLM, arXiv 2505.22618, section 3.3)."""

    name = "threshold"
    threshold: float

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        return _most_confident(stats.confidence, is_masked, 1) | (is_masked & (stats.confidence >= self.threshold))


@dataclass(frozen=True)
class Factor(Policy):
    """The n most confident positions for the largest n with (n + 1)(1 - c_n) < factor, at least one (Fast-dLLM, theorem 1).

    The published code accepts one candidate more than this rule of the paper; the rule is followed here.
    """

    name = "factor"
    factor: float

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        ordered = np.sort(stats.confidence[is_masked])[::-1]
        n = np.arange(1, len(ordered) + 1)
        accepted = np.flatnonzero((n + 1) * (1 - ordered) < self.factor)
        return _most_confident(stats.confidence, is_masked, int(accepted[-1]) + 1 if len(accepted) else 1)


def quota(masked: int, steps: int) -> list[int]:
    """`masked` positions spread over `steps` forwards: masked // steps in each, the first masked % steps one more."""
    if steps < 1 or masked < 0:
        raise DllmError(f"a schedule of {steps} steps for {masked} masks: expected at least one step and no negative masks.")
    return [masked // steps + (i < masked % steps) for i in range(steps)]


def _most_confident(confidence: Floats, is_masked: Bools, count: int) -> Bools:
    """The `count` masked positions of highest confidence, the lowest position first among equals."""
    order = np.argsort(np.where(is_masked, -confidence, np.inf), kind="stable")[:count]
    selected = np.zeros_like(is_masked)
    selected[order] = True
    return selected & is_masked
