"""What a policy is: it chooses the masked positions to commit, from the statistics of a forward. Pure NumPy.
Shape legend: R candidates of one row of the batch.

A policy sees one row at a time: rows of a batch may follow different policies, and no row can depend on its
batch-mates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from trt_runtime.decoding.policies.options import Value, options_of

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
_MOST_ENTROPY = 1e30  # finite, as scores are divided and added


@dataclass(frozen=True)
class RowStats:
    """Statistics [R] of one row: the proposed token, its probability, the next best probability, the entropy
    in nats. best: the probability of the best token if the proposal was sampled and may be another; None: the
    same as `confidence`."""

    token: Ints
    confidence: Floats
    runner_up: Floats
    entropy: Floats
    best: Floats | None = None

    def part(self, which: slice) -> RowStats:
        """The statistics of some of the rows."""
        best = None if self.best is None else self.best[which]
        return RowStats(
            self.token[which], self.confidence[which], self.runner_up[which], self.entropy[which], best
        )

    @property
    def margin(self) -> Floats:
        """Probability of the best token minus that of the second best."""
        return (self.confidence if self.best is None else self.best) - self.runner_up


@dataclass(frozen=True)
class BlockState:
    """The progress of a row in its block.

    num_masked: masks that the policy has to commit in the block. step: forwards already made in it, of which
    `forced` (0 or 1) left the policy no choice. uniform: for each candidate [R] a number in [0, 1), the same
    in every forward. rng: for what is drawn anew in each forward. Both are set only for policies that draw,
    else None. positions: of the candidates [R] on the canvas. before: candidates and their
    confidence in each earlier forward of the block. length: positions of the block.
    """

    num_masked: int
    step: int
    forced: int = 0
    uniform: Floats | None = None
    rng: np.random.Generator | None = None
    positions: Ints | None = None
    before: tuple[tuple[Ints, Floats], ...] = ()
    length: int = 0

    def after(self, forwards: list[tuple[Ints, Floats]]) -> BlockState:
        """The state after more forwards, given the candidates and confidence of each."""
        return replace(self, step=self.step + len(forwards), before=(*self.before, *forwards))


@dataclass(frozen=True)
class CommitRule:
    """A policy's choice in a block as data, which a device can follow without the host (device_commit.py).
    kind: fixed, threshold or factor. limit: positions of the block. masks, steps, number: of a fixed
    schedule, the masks it began with, its steps, and how many of them are done."""

    kind: str
    limit: int
    value: float = 0.0
    masks: int = 0
    steps: int = 1
    number: int = 0


class Policy(ABC):
    """Commits at least one masked position in each call, unless none is masked. A frozen dataclass whose
    options are fields (options.py).

    name: on the command line and in requests. is_joint: it judges all candidates together, so whether it
    commits one may depend on the others.
    is_schedule: how many positions a forward commits follows a schedule of `steps`. trials: sets of option
    values that 'dllm-trt tune' tries.
    A field `steps_per_block: int | None` receives the steps of one block, where the user gave `steps`.
    """

    name: ClassVar[str]
    is_joint: ClassVar[bool] = False
    is_schedule: ClassVar[bool] = False
    trials: ClassVar[tuple[Mapping[str, Value], ...]] = ()

    @classmethod
    def made(cls, options: Mapping[str, Value], steps_per_block: int | None = None) -> Policy:
        """The policy with `options` (which may include others), and the steps per block if it takes them."""
        own: dict[str, Any] = {item.name: options.get(item.name, item.default) for item in options_of(cls)}
        return cls(**own, **({"steps_per_block": steps_per_block} if cls.takes_steps() else {}))

    @classmethod
    def takes_steps(cls) -> bool:
        """Whether the policy uses `steps`."""
        return "steps_per_block" in getattr(cls, "__dataclass_fields__", {})

    @classmethod
    def steps_of_block(cls, steps: int, num_blocks: int) -> int:
        """The steps of one block, if `steps` are for the whole generation."""
        return max(1, steps // num_blocks)

    @property
    def draws(self) -> bool:
        """Whether its choice depends on the seed."""
        return False

    @abstractmethod
    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        """The positions [R] to commit: a subset of `is_masked` [R]."""

    def rule(self, state: BlockState, limit: int) -> CommitRule | None:
        """The same choice as data, for a block of `limit` positions; None if it cannot be expressed so."""
        return None


def without_confidence(stats: RowStats, which: Bools) -> RowStats:
    """The statistics [R] with those of `which` [R] as uncertain as possible: confidence 0, and last by
    entropy and margin too."""
    best = stats.confidence if stats.best is None else stats.best
    return RowStats(
        stats.token,
        np.where(which, 0.0, stats.confidence),
        np.where(which, 1.0, stats.runner_up),
        np.where(which, _MOST_ENTROPY, stats.entropy),
        best=np.where(which, 0.0, best),
    )


def select_holding_back(policy: Policy, stats: RowStats, is_end: Bools, state: BlockState) -> Bools:
    """What `policy` commits from all candidates [R], but end tokens (`is_end` [R]) only once no other
    candidate is left (LLaDA's evaluations set the confidence of end tokens to 0). stats: from
    `without_confidence`; this function also enforces it for policies that ignore the statistics."""
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
