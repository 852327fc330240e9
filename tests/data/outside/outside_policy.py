"""A policy of somebody else's: a threshold, and no more than a number of positions a forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trt_runtime.decoding.policies.base import BlockState, Bools, Policy, RowStats, most_confident
from trt_runtime.decoding.policies.options import option


@dataclass(frozen=True)
class Capped(Policy):
    """All positions with confidence >= threshold, but at most `cap` of them, and at least one."""

    name: ClassVar[str] = "capped"
    threshold: float = option(
        0.9, low=0, low_is_open=True, high=1, help="confidence from which a position is committed"
    )
    cap: int = option(4, low=1, help="most positions that a forward commits")
    trials: ClassVar[tuple[dict[str, int], ...]] = ({"cap": 2}, {"cap": 8})

    def select(self, stats: RowStats, is_masked: Bools, state: BlockState) -> Bools:
        sure = is_masked & (stats.confidence >= self.threshold)
        return most_confident(stats.confidence, is_masked, 1) | (
            most_confident(stats.confidence, is_masked, self.cap) & sure
        )
