"""Policies that follow a schedule of steps: LLaDA's fixed one, and Dream's. Pure NumPy.

Shape legend: R candidates of one row of the batch.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trt_runtime.decoding.policies.base import (
    BlockState,
    Bools,
    CommitRule,
    Floats,
    Policy,
    RowStats,
    most_confident,
)
from trt_runtime.decoding.policies.options import option
from trt_runtime.errors import DllmError

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 100.0


@dataclass(frozen=True)
class Fixed(Policy):
    """The most confident positions, as many as the schedule's quota, whatever their confidence (LLaDA, arXiv
    2502.09992). Without `steps_per_block`, here and in the other schedules, there is one step per mask."""

    name: ClassVar[str] = "fixed"
    is_schedule: ClassVar[bool] = True
    steps_per_block: int | None = None

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        steps, number = _steps(self.steps_per_block, state), state.step - state.forced
        quotas = quota(state.num_masked, max(1, steps - state.forced))
        return most_confident(stats.confidence, is_masked, planned(quotas, number))

    def rule(self, state: BlockState, limit: int) -> CommitRule:
        steps = max(1, _steps(self.steps_per_block, state) - state.forced)
        return CommitRule(
            self.name, limit, masks=state.num_masked, steps=steps, number=state.step - state.forced
        )


@dataclass(frozen=True)
class EntropyLinear(Policy):
    """All positions but those of highest entropy, of which a share of the block's masks stays that falls
    linearly to 0 (RND1). Steps that would commit nothing are skipped: their forward would change nothing."""

    name: ClassVar[str] = "entropy_linear"
    is_schedule: ClassVar[bool] = True
    steps_per_block: int | None = None

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        steps, left = max(1, self.steps_per_block or state.num_masked), int(is_masked.sum())
        numbers = np.arange(steps - 1, -1, -1, dtype=np.float32)
        stay = np.floor(np.float32(state.num_masked) * numbers / np.float32(steps)).astype(np.int64)
        kept = int(next((count for count in stay if count < left), 0))
        order = np.argsort(np.where(is_masked, -stats.entropy, np.inf), kind="stable")[:kept]
        chosen = is_masked.copy()
        chosen[order] = False
        return chosen


@dataclass(frozen=True)
class Decaying(Policy):
    """Dream's schedules (arXiv 2508.15487): time runs from 1 to 0.001, and a step commits the fraction of it
    that has passed. The positions are the best by `score`, or with alg_temp > 0 sampled from softmax(score /
    alg_temp). Steps that would commit nothing are skipped: their forward would change nothing."""

    is_schedule: ClassVar[bool] = True
    steps_per_block: int | None = None
    alg_temp: float = option(
        0.0,
        low=MIN_TEMPERATURE,
        high=MAX_TEMPERATURE,
        off=0.0,
        help="above 0, positions are drawn from softmax(score / alg_temp)",
    )

    @property
    def draws(self) -> bool:
        return self.alg_temp > 0

    @abstractmethod
    def score(self, stats: RowStats) -> Floats:
        """The order of the positions [R], best highest."""

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        quotas = [
            n
            for n in decaying_quota(state.num_masked, _steps(self.steps_per_block, state), state.forced)
            if n
        ]
        number = state.step - state.forced
        score = self.score(stats)
        # the largest values of score/T plus Gumbel noise are a sample without replacement
        if self.alg_temp > 0:
            assert state.rng is not None
            score = score / self.alg_temp + state.rng.gumbel(size=len(score))
        return most_confident(score, is_masked, quotas[number] if number < len(quotas) else len(score))


@dataclass(frozen=True)
class MaskgitPlus(Decaying):
    """Dream's schedule, most confident first."""

    name: ClassVar[str] = "maskgit_plus"

    def score(self, stats: RowStats) -> Floats:
        return stats.confidence


@dataclass(frozen=True)
class Entropy(Decaying):
    """Dream's schedule, lowest entropy first."""

    name: ClassVar[str] = "entropy"

    def score(self, stats: RowStats) -> Floats:
        return -stats.entropy


@dataclass(frozen=True)
class TopkMargin(Decaying):
    """Dream's schedule, largest gap between the best two tokens first."""

    name: ClassVar[str] = "topk_margin"

    def score(self, stats: RowStats) -> Floats:
        return stats.margin


@dataclass(frozen=True)
class Origin(Policy):
    """Each masked position is committed at a step drawn for it alone (Dream's `origin`, the reverse process
    of arXiv 2406.03736).

    That step is i with probability 1 - t[i+1]/t[i], given that it is not an earlier one; steps that draw no
    position are skipped.
    """

    name: ClassVar[str] = "origin"
    is_schedule: ClassVar[bool] = True
    steps_per_block: int | None = None

    @property
    def draws(self) -> bool:
        return True

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        assert state.uniform is not None
        if not is_masked.any():
            return is_masked
        steps = _steps(self.steps_per_block, state)
        time = _times(steps)[min(state.forced, steps - 1) :]
        survival = time[1:-1] / time[0]  # the last step commits everything that remains
        step = np.searchsorted(1 - survival, state.uniform, side="right")
        return np.asarray(is_masked & (step == step[is_masked].min()))


@dataclass(frozen=True)
class Linear(Policy):
    """MDLM's linear schedule as dllm's A2D samplers compute it, most confident first: a step commits
    the share of the masks left that the step has of the time left, in float32, rounded half to even. It
    commits the same numbers as `fixed` where the steps divide the masks, in another order elsewhere. Steps
    that would commit nothing are skipped."""

    name: ClassVar[str] = "linear"
    is_schedule: ClassVar[bool] = True
    steps_per_block: int | None = None

    @classmethod
    def steps_of_block(cls, steps: int, num_blocks: int) -> int:
        return -(-steps // num_blocks)

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        steps = max(1, _steps(self.steps_per_block, state) - state.forced)
        quotas, number = linear_quota(state.num_masked, steps), state.step - state.forced
        count = quotas[number] if number < len(quotas) else len(is_masked)
        return most_confident(stats.confidence, is_masked, count)


def linear_quota(masked: int, steps: int) -> list[int]:
    """Positions that each step of MDLM's linear schedule commits, without the steps that commit none: of
    `left` masks round(left * (1 - s / t)), where time runs from t = 1 - j / steps to s = 1 - (j + 1) /
    steps."""
    one, counts = np.float32(1), []
    for j in range(steps):
        now, then = np.float32((steps - j) / steps), np.float32((steps - j - 1) / steps)
        # 1 - (1 - a(s)) / (1 - a(t)) with a(i) = 1 - i, in the order and precision of the published code
        share = one - (one - (one - then)) / (one - (one - now))
        counts.append(min(masked, int(np.round(np.float32(masked) * share))))
        masked -= counts[-1]
    return [count for count in counts if count]


def quota(masked: int, steps: int) -> list[int]:
    """`masked` positions spread over `steps` forwards: masked // steps in each, the first masked % steps one
    more."""
    if steps < 1 or masked < 0:
        raise DllmError(
            f"a schedule of {steps} steps for {masked} masks: expected at least one step and no negative "
            f"masks."
        )
    return [masked // steps + (i < masked % steps) for i in range(steps)]


def planned(quotas: list[int], number: int) -> int:
    """How many positions the step `number` of a fixed schedule commits: at least one, because if gaps of the
    prompt used part of the quota, the block needs more steps than its schedule has."""
    return max(1, quotas[number]) if number < len(quotas) else 1


def decaying_quota(masked: int, steps: int, first: int = 0) -> list[int]:
    """Positions that Dream's schedule commits in steps `first` to steps - 1: int(left * (1 - t[i+1]/t[i])),
    and everything in the last."""
    if steps < 1 or masked < 0:
        raise DllmError(
            f"a schedule of {steps} steps for {masked} masks: expected at least one step and no negative "
            f"masks."
        )
    time, counts = _times(steps), []
    for i in range(first, steps):
        counts.append(int(masked * (1 - time[i + 1] / time[i])) if i < steps - 1 else masked)
        masked -= counts[-1]
    return counts


def _steps(steps_per_block: int | None, state: BlockState) -> int:
    """Steps of the block, including the forced one."""
    return max(1, state.num_masked + state.forced) if steps_per_block is None else steps_per_block


def _times(steps: int) -> Floats:
    return np.linspace(1, 1e-3, steps + 1)
