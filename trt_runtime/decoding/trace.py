"""A finished forward of a row, for traces, results and recorded cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from trt_runtime.decoding.policies.base import BlockState, Ints, RowStats

Written = tuple[list[int], list[int]]  # positions and their tokens
Seen = tuple[Ints, RowStats, BlockState]  # candidates, their statistics, the block's state


@dataclass(frozen=True)
class Step:
    """A finished forward, for traces: its window, and the positions and tokens that it committed. edits: the
    positions that it changed, and their new tokens; None where tokens are never edited. source: what the
    policy chose from (`seen`), or a function that returns it. looked: the positions that could be edited, and
    their statistics."""

    kind: str
    start: int
    length: int
    positions: list[int]
    tokens: list[int]
    source: Seen | Callable[[], Seen] | None = field(default=None, repr=False, compare=False)
    edits: Written | None = None
    looked: tuple[Ints, RowStats] | None = field(default=None, repr=False, compare=False)

    @property
    def seen(self) -> Seen | None:
        """What the policy chose from: the candidates, their statistics, and the block's state; None if it is
        not known here."""
        return self.source() if callable(self.source) else self.source

    @property
    def written_edits(self) -> list[Written]:
        """The edits, as something to write: one pair, or none."""
        return [self.edits] if self.edits else []

    @property
    def changed(self) -> list[tuple[int, float | None]]:
        """Every position that was written, with its confidence."""
        committed: list[tuple[int, float | None]] = list(zip(self.positions, self.confidence, strict=True))
        if not self.edits or self.looked is None:
            return committed
        sure = dict(zip(self.looked[0].tolist(), self.looked[1].confidence.tolist(), strict=True))
        return [*committed, *((position, sure[position]) for position in self.edits[0])]

    @property
    def confidence(self) -> list[float | None]:
        """The confidence of the committed positions; None if it is not known here."""
        if (seen := self.seen) is None:
            return [None] * len(self.positions)
        by_position = dict(zip(seen[0].tolist(), seen[1].confidence.tolist(), strict=True))
        return [by_position.get(position) for position in self.positions]

    def as_list(self) -> list[object]:
        """The step in the form of recorded cases: [kind, start, length, positions, tokens], and with editing
        the edited positions and their new tokens."""
        return [self.kind, self.start, self.length, self.positions, self.tokens, *(self.edits or ())]

    def with_confidence(self) -> list[object]:
        """The step in the form of results: `as_list` and the confidence of each committed position."""
        return [*self.as_list(), self.confidence]


class Trace:
    """The steps of a row. They are added as functions, and are only computed when somebody asks for them.
    count: how many there are."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._late: list[Callable[[], Step]] = []
        self.count = 0

    def add(self, step: Callable[[], Step]) -> None:
        """Add a step, as a function that returns it."""
        self._late.append(step)
        self.count += 1

    @property
    def steps(self) -> list[Step]:
        """All of them."""
        if self._late:
            self._steps += [step() for step in self._late]
            self._late.clear()
        return self._steps
