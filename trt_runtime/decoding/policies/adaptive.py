"""Policies beyond Fast-dLLM's own: the number of positions that a forward commits follows the model's
certainty. Pure NumPy.

Each is one rule over the graph's statistics; its docstring states the rule and the paper, and what was
adapted where a paper works on logits, on several blocks at a time or in stages. Every policy commits at least
the most confident position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trt_runtime.decoding.policies.base import (
    BlockState,
    Bools,
    Floats,
    Ints,
    Policy,
    RowStats,
    most_confident,
)
from trt_runtime.decoding.policies.options import Value, option, threshold_option

Trials = tuple[Mapping[str, Value], ...]


@dataclass(frozen=True)
class EntropyBounded(Policy):
    """EB-sampler (arXiv 2505.24857): positions in order of entropy, as many as keep the sum of their
    entropies minus the largest within gamma. That difference bounds how much the positions depend on one
    another, and so the error of committing them together."""

    name: ClassVar[str] = "eb"
    is_joint: ClassVar[bool] = True
    gamma: float = option(
        0.1,
        low=0,
        hint="0.1 is usual; larger commits more at once",
        help="bound on the sum of entropies, in nats",
    )
    trials: ClassVar[Trials] = ({"gamma": 0.05}, {"gamma": 0.2})

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        order = np.argsort(np.where(is_masked, stats.entropy, np.inf), kind="stable")[: int(is_masked.sum())]
        sums = np.append(0.0, np.cumsum(stats.entropy[order], dtype=np.float64))
        others = sums[: len(order)]  # in this order, the last is the largest
        chosen = np.zeros_like(is_masked)
        chosen[order[: max(1, int((others <= self.gamma).sum()))]] = True
        return chosen & is_masked


@dataclass(frozen=True)
class EntropyBoundedByConfidence(Policy):
    """As 'eb', with the positions in order of falling confidence: as many as keep the sum of their entropies
    but for the largest within gamma (RND1)."""

    name: ClassVar[str] = "eb_confidence"
    is_joint: ClassVar[bool] = True
    gamma: float = option(
        0.1,
        low=0,
        hint="0.1 is usual; larger commits more at once",
        help="bound on the sum of entropies, in nats",
    )

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        order = np.argsort(np.where(is_masked, -stats.confidence, np.inf), kind="stable")
        order = order[: int(is_masked.sum())]
        entropies = stats.entropy[order].astype(np.float64)
        others = np.cumsum(entropies) - np.maximum.accumulate(entropies)
        chosen = np.zeros_like(is_masked)
        chosen[order[: max(1, int(np.flatnonzero(others <= self.gamma)[-1:].sum() + 1))]] = True
        return chosen & is_masked


@dataclass(frozen=True)
class Margin(Policy):
    """All positions whose best token leads the second by the threshold, and the one with the largest lead
    (arXiv 2502.06768)."""

    name: ClassVar[str] = "margin"
    threshold: float = threshold_option()
    trials: ClassVar[Trials] = ({"threshold": 0.8}, {"threshold": 0.9})

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        return most_confident(stats.margin, is_masked, 1) | (is_masked & (stats.margin >= self.threshold))


@dataclass(frozen=True)
class Dynamic(Policy):
    """Streaming-dLLM (arXiv 2601.17917): a threshold that falls as the block fills: threshold x (1 - alpha x
    (1 - masks left / masks at first))."""

    name: ClassVar[str] = "dynamic"
    threshold: float = threshold_option()
    alpha: float = option(
        0.3,
        low=0,
        high=1,
        hint="0 keeps the threshold as it is",
        help="how far the threshold falls as the block fills",
    )
    trials: ClassVar[Trials] = ({"alpha": 0.2}, {"alpha": 0.4})

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        left = min(1.0, is_masked.sum() / max(1, state.num_masked))
        bound = self.threshold * (1 - self.alpha * (1 - left))
        return most_confident(stats.confidence, is_masked, 1) | (is_masked & (stats.confidence >= bound))


@dataclass(frozen=True)
class LocalLeap(Policy):
    """LocalLeap (arXiv 2510.07081): anchors are positions with confidence >= threshold; within 4 positions of
    one, low_threshold is enough."""

    name: ClassVar[str] = "localleap"
    threshold: float = threshold_option()
    low_threshold: float = option(0.6, low=0, low_is_open=True, high=1, help="the lower threshold")
    trials: ClassVar[Trials] = ({"low_threshold": 0.6}, {"low_threshold": 0.75})
    radius: ClassVar[int] = 4

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        anchors = is_masked & (stats.confidence >= self.threshold)
        where = _positions(state, len(is_masked))
        is_near = (np.abs(where[:, None] - where[None, anchors]) <= self.radius).any(1)
        relaxed = is_masked & is_near & (stats.confidence >= self.low_threshold)
        return most_confident(stats.confidence, is_masked, 1) | anchors | relaxed


@dataclass(frozen=True)
class Hierarchy(Policy):
    """dInfer's hierarchical decoding (arXiv 2510.08666): committed positions split the masked span, and every
    part is decoded independently.

    All positions with confidence >= threshold; and of each run of neighbouring masks the most confident one,
    if that has >= low_threshold.
    """

    name: ClassVar[str] = "hierarchy"
    threshold: float = threshold_option()
    low_threshold: float = option(0.6, low=0, low_is_open=True, high=1, help="the lower threshold")
    trials: ClassVar[Trials] = ({"low_threshold": 0.6}, {"low_threshold": 0.75})

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        chosen = most_confident(stats.confidence, is_masked, 1) | (
            is_masked & (stats.confidence >= self.threshold)
        )
        where = _positions(state, len(is_masked))[is_masked]
        for run in np.split(np.flatnonzero(is_masked), np.flatnonzero(np.diff(where) > 1) + 1):
            if len(run) and stats.confidence[run].max() >= self.low_threshold:
                chosen[run[stats.confidence[run].argmax()]] = True
        return chosen


@dataclass(frozen=True)
class Prophet(Policy):
    """Prophet (arXiv 2508.19982): one position per forward until the model is certain of all, then everything
    at once.

    It is certain when the mean gap between the two best logits is at least 7.5 in the first third of the
    block, 5 in the second, 2.5 in the last. (The gap of two logits is the logarithm of the ratio of their
    probabilities. The paper measures progress over the generation and the gap over the answer.)
    """

    name: ClassVar[str] = "prophet"
    is_joint: ClassVar[bool] = True
    trials: ClassVar[Trials] = ({},)
    stages: ClassVar[tuple[tuple[float, float], ...]] = ((0.33, 7.5), (0.67, 5.0), (np.inf, 2.5))

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        if not is_masked.any():
            return is_masked
        best = stats.confidence if stats.best is None else stats.best
        tiny = np.finfo(np.float32).tiny
        gap = np.log(np.maximum(best[is_masked], tiny) / np.maximum(stats.runner_up[is_masked], tiny)).mean()
        progress = 1 - is_masked.sum() / max(1, state.num_masked)
        needed = next(least for limit, least in self.stages if progress < limit)
        return is_masked.copy() if gap >= needed else most_confident(stats.confidence, is_masked, 1)


@dataclass(frozen=True)
class SlowFast(Policy):
    """SlowFast sampling (arXiv 2506.10848): slow, one position per forward, until the model's horizon is
    stable; then fast, many positions per forward up to the horizon.

    The horizon is the last position with confidence >= low_threshold. It is stable when its variance over two
    forwards of the block is at most 1, or after six forwards; then all positions up to it with confidence >=
    threshold are committed. (In the paper the span is the block's own.)
    """

    name: ClassVar[str] = "slowfast"
    threshold: float = threshold_option()
    low_threshold: float = option(0.6, low=0, low_is_open=True, high=1, help="the lower threshold")
    trials: ClassVar[Trials] = ({"low_threshold": 0.3},)
    window: ClassVar[int] = 2
    most_slow: ClassVar[int] = 6

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        where = _positions(state, len(is_masked))
        seen = [self._horizon(confidence, at) for at, confidence in state.before]
        seen.append(self._horizon(stats.confidence[is_masked], where[is_masked]))
        chosen = most_confident(stats.confidence, is_masked, 1)
        if len(seen) > self.most_slow or (len(seen) >= self.window and np.var(seen[-self.window :]) <= 1):
            chosen |= is_masked & (where <= seen[-1]) & (stats.confidence >= self.threshold)
        return chosen

    def _horizon(self, confidence: Floats, where: Ints) -> int:
        return int(where[confidence >= self.low_threshold].max(initial=-1))


def _positions(state: BlockState, count: int) -> Ints:
    """Canvas positions of the candidates [R]; without any, as if they were neighbours."""
    return np.arange(count) if state.positions is None else state.positions
