"""Policies: which masked positions to commit, from the statistics of a forward. Pure NumPy.

Shape legend: R candidates of one row of the batch. A policy sees one row at a time: rows of a batch may follow different
policies, and no row can depend on its batch-mates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from trt_runtime.errors import DllmError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
_MOST_ENTROPY = 1e30  # finite, as scores are divided and added


@dataclass(frozen=True)
class RowStats:
    """Statistics [R] of one row: the proposed token, its probability, the next best probability, the entropy in nats.

    `best` is the probability of the best token where the proposal was drawn and may be another; None: it is `confidence`.
    """

    token: Ints
    confidence: Floats
    runner_up: Floats
    entropy: Floats
    best: Floats | None = None

    @property
    def margin(self) -> Floats:
        """Probability of the best token less that of the second best."""
        return (self.confidence if self.best is None else self.best) - self.runner_up


@dataclass(frozen=True)
class BlockState:
    """Where a row stands in its block.

    num_masked: masks that the policy has to commit in the block. step: forwards already made in it, of which `forced` (0 or
    1) left the policy no choice. uniform: for each candidate [R] a number in [0, 1), the same in every forward. rng: for what
    is drawn anew in each forward. These two are there for policies that draw; None will do for the others. positions: of the candidates
    [R] on the canvas. before: candidates and their confidence in each earlier forward of the block.
    """

    num_masked: int
    step: int
    forced: int = 0
    uniform: Floats | None = None
    rng: np.random.Generator | None = None
    positions: Ints | None = None
    before: tuple[tuple[Ints, Floats], ...] = ()


@dataclass(frozen=True)
class CommitRule:
    """A policy's choice in a block as data, which a device can follow without the host (steps.py).

    kind: fixed, threshold or factor. limit: positions of the block. masks, steps, number: of a fixed schedule, the masks it began
    with, its steps, and how many of them are done.
    """

    kind: str
    limit: int
    value: float = 0.0
    masks: int = 0
    steps: int = 1
    number: int = 0


class Policy(ABC):
    """Commits at least one masked position in each call, unless none is masked."""

    name: ClassVar[str]
    is_joint: ClassVar[bool] = (
        False  # whether it judges all candidates together, and so may commit one for the sake of the others
    )

    @abstractmethod
    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        """The positions [R] to commit: a subset of `is_masked` [R]."""

    def rule(self, state: BlockState, limit: int) -> CommitRule | None:
        """The same choice as data, for a block of `limit` positions; None where it cannot be written so."""
        return None


@dataclass(frozen=True)
class Fixed(Policy):
    """The quota's number of most confident positions: a schedule, whatever the confidence (LLaDA, arXiv 2502.09992).

    Without `steps_per_block`, here and in the other schedules, there is a step for each mask.
    """

    name = "fixed"
    steps_per_block: int | None = None

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        steps, number = _steps(self.steps_per_block, state), state.step - state.forced
        quotas = quota(state.num_masked, max(1, steps - state.forced))
        planned = quotas[number] if number < len(quotas) else 0
        # never none: where gaps of the prompt took part of the quota, the block outlasts its schedule
        return most_confident(stats.confidence, is_masked, max(1, planned))

    def rule(self, state: BlockState, limit: int) -> CommitRule:
        steps = max(1, _steps(self.steps_per_block, state) - state.forced)
        return CommitRule(self.name, limit, masks=state.num_masked, steps=steps, number=state.step - state.forced)


@dataclass(frozen=True)
class Threshold(Policy):
    """The most confident position, and every other with confidence >= threshold (Fast-dLLM, arXiv 2505.22618, section 3.3).

    With `steps_per_block` only the most confident of a budget are asked: an equal share for each step, and what earlier steps
    left over (Fast-dLLM's Dream without a cache). After the last step the budget is all that is left.
    """

    name = "threshold"
    threshold: float
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
    """The n most confident positions for the largest n with (n + 1)(1 - c_n) < factor, at least one (Fast-dLLM, theorem 1).

    The published code accepts one candidate more than this rule of the paper; the rule is followed here.
    """

    name = "factor"
    factor: float

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        ordered = np.sort(stats.confidence[is_masked])[::-1]
        n = np.arange(1, len(ordered) + 1)
        accepted = np.flatnonzero((n + 1) * (1 - ordered) < self.factor)
        return most_confident(stats.confidence, is_masked, int(accepted[-1]) + 1 if len(accepted) else 1)

    def rule(self, state: BlockState, limit: int) -> CommitRule:
        return CommitRule(self.name, limit, self.factor)


@dataclass(frozen=True)
class Decaying(Policy):
    """Dream's schedules (arXiv 2508.15487): time runs from 1 to 0.001, and a step commits the share of it that has passed.

    The positions are the best by `score`, or with alg_temp > 0 drawn from softmax(score / alg_temp). Steps that would commit
    nothing are left out: their forward would change nothing.
    """

    steps_per_block: int | None = None
    alg_temp: float = 0.0

    @abstractmethod
    def score(self, stats: RowStats) -> Floats:
        """What positions are ordered by [R], the best highest."""

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        quotas = [n for n in decaying_quota(state.num_masked, _steps(self.steps_per_block, state), state.forced) if n]
        number = state.step - state.forced
        score = self.score(stats)
        if self.alg_temp > 0:  # the largest of score/T plus Gumbel noise are a draw without replacement
            assert state.rng is not None
            score = score / self.alg_temp + state.rng.gumbel(size=len(score))
        return most_confident(score, is_masked, quotas[number] if number < len(quotas) else len(score))


@dataclass(frozen=True)
class MaskgitPlus(Decaying):
    """Dream's schedule, most confident first."""

    name = "maskgit_plus"

    def score(self, stats: RowStats) -> Floats:
        return stats.confidence


@dataclass(frozen=True)
class Entropy(Decaying):
    """Dream's schedule, lowest entropy first."""

    name = "entropy"

    def score(self, stats: RowStats) -> Floats:
        return -stats.entropy


@dataclass(frozen=True)
class TopkMargin(Decaying):
    """Dream's schedule, widest gap between the best two tokens first."""

    name = "topk_margin"

    def score(self, stats: RowStats) -> Floats:
        return stats.margin


@dataclass(frozen=True)
class Origin(Policy):
    """Each masked position is committed at a step drawn for it alone (Dream's `origin`, the reverse process of arXiv 2406.03736).

    It is step i with probability 1 - t[i+1]/t[i] if it was none before; steps that draw no position are left out.
    """

    name = "origin"
    steps_per_block: int | None = None

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        assert state.uniform is not None
        if not is_masked.any():
            return is_masked
        steps = _steps(self.steps_per_block, state)
        time = _times(steps)[min(state.forced, steps - 1) :]
        survival = time[1:-1] / time[0]  # the last step takes all that remain
        step = np.searchsorted(1 - survival, state.uniform, side="right")
        return np.asarray(is_masked & (step == step[is_masked].min()))


# policies that are schedules of steps; those of the second table also take alg_temp
DECAYING: dict[str, type[Entropy] | type[MaskgitPlus] | type[TopkMargin]] = {
    "entropy": Entropy, "maskgit_plus": MaskgitPlus, "topk_margin": TopkMargin,
}  # fmt: skip
SCHEDULES: dict[str, Callable[[int | None], Policy]] = {"fixed": Fixed, "origin": Origin, **DECAYING}


def quota(masked: int, steps: int) -> list[int]:
    """`masked` positions spread over `steps` forwards: masked // steps in each, the first masked % steps one more."""
    if steps < 1 or masked < 0:
        raise DllmError(f"a schedule of {steps} steps for {masked} masks: expected at least one step and no negative masks.")
    return [masked // steps + (i < masked % steps) for i in range(steps)]


def decaying_quota(masked: int, steps: int, first: int = 0) -> list[int]:
    """Positions that Dream's schedule commits in steps `first` to steps - 1: int(left * (1 - t[i+1]/t[i])), at last all."""
    if steps < 1 or masked < 0:
        raise DllmError(f"a schedule of {steps} steps for {masked} masks: expected at least one step and no negative masks.")
    time, counts = _times(steps), []
    for i in range(first, steps):
        counts.append(int(masked * (1 - time[i + 1] / time[i])) if i < steps - 1 else masked)
        masked -= counts[-1]
    return counts


def _steps(steps_per_block: int | None, state: BlockState) -> int:
    """Steps of the block, the forced one included."""
    return max(1, state.num_masked + state.forced) if steps_per_block is None else steps_per_block


def _times(steps: int) -> Floats:
    return np.linspace(1, 1e-3, steps + 1)


def without_confidence(stats: RowStats, which: Bools) -> RowStats:
    """The statistics [R] with those of `which` [R] as unsure as can be: confidence 0, and last by entropy and margin too."""
    best = stats.confidence if stats.best is None else stats.best
    return RowStats(stats.token, np.where(which, 0.0, stats.confidence), np.where(which, 1.0, stats.runner_up),
                    np.where(which, _MOST_ENTROPY, stats.entropy), best=np.where(which, 0.0, best))  # fmt: skip


def select_holding_back(policy: Policy, stats: RowStats, is_end: Bools, state: BlockState) -> Bools:
    """What `policy` commits of all candidates [R], but those of `is_end` [R] only once no other is left (LLaDA's evaluations set the
    confidence of end tokens to 0). `stats` are those of `without_confidence`; policies that look at none are held to it here."""
    if policy.is_joint and not is_end.all():
        return policy.select(stats, ~is_end, state)
    chosen = policy.select(stats, np.ones_like(is_end), state)
    if not (chosen & is_end).any() or (chosen | is_end).all():
        return chosen
    others = chosen & ~is_end
    return others if others.any() else policy.select(stats, ~is_end, state)


def most_confident(confidence: Floats, is_masked: Bools, count: int) -> Bools:
    """The `count` masked positions of highest confidence, the lowest position first among equals."""
    order = np.argsort(np.where(is_masked, -confidence, np.inf), kind="stable")[:count]
    selected = np.zeros_like(is_masked)
    selected[order] = True
    return selected & is_masked
