"""Lossless self-speculation: several steps of a block checked in one call, with the tokens that one step a call would have made.

    draft:   from the last statistics alone, what would the policy commit next, and then, and then?
    verify:  the canvases after each of these steps are the rows of one call
    accept:  row 0 is certain; if the policy, seeing its statistics, commits what row 1 was drafted with, row 1 is certain too; and so on

The draft costs no forward, and a wrong one costs nothing but the row. In the manner of SSD (arXiv 2510.04147) and FreeDave (arXiv 2510.00294); works with every
policy that draws nothing. Branches stand in neighbouring slots of the cache with the same keys and values outside the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from trt_runtime.backends.base import Backend, Cache, Stats
from trt_runtime.errors import DllmError
from trt_runtime.generator import Generator, Wanted, assemble, propose, slots_of
from trt_runtime.policies import Ints, RowStats
from trt_runtime.sequence import Seen, Sequence, Written


class Speculating(Generator):
    """A Generator whose every call verifies up to `branches` steps of one row. Raises DllmError where the backend takes fewer rows a call."""

    def __init__(self, backend: Backend, sequences: Iterable[Sequence], branches: int) -> None:
        if backend.max_batch is not None and branches > backend.max_batch:
            raise DllmError(
                f"speculate is {branches}: the engines take {backend.max_batch} rows a call: ask for less, or build with a larger --max-batch."
            )
        self.branches = branches
        super().__init__(backend, sequences)

    def new_cache(self) -> Cache:
        return self.backend.new_cache(len(self.sequences) * self.branches, self.capacity)

    def step(self, instead: Mapping[int, Written] | None = None) -> list[Wanted]:
        """One call for every unfinished row."""
        wanted = [Wanted(i, row, row.next_forward()) for i, row in enumerate(self.sequences) if not row.is_finished]
        for row in wanted:
            if row.sequence.rules.cache != "none" and row.sequence.opens_block:
                self._open_block(row)
            else:
                self._verify(row.sequence, row.slot * self.branches)
        return wanted

    def _open_block(self, wanted: Wanted) -> None:
        """The block's first forward, after which all branches have its keys and values: copied, or else made in each."""
        first = wanted.slot * self.branches
        can_copy = self.backend.copy_slot(self.cache, first, slice(first, first))
        group = [replace(wanted, slot=first + i) for i in range(1 if can_copy else self.branches)]
        wanted.sequence.commit(wanted.forward, propose(group[0], self._call(group), 0))
        if can_copy:
            self.backend.copy_slot(self.cache, first, slice(first + 1, first + self.branches))

    def _verify(self, row: Sequence, first: int) -> None:
        block = row.block
        group = [
            Wanted(first + i, draft, draft.next_forward()) for i, draft in enumerate([row, *_drafts(row, self.branches - 1)])
        ]
        stats = self._call(group)
        for i, wanted in enumerate(group):
            if row.block != block or (i and not np.array_equal(row.canvas, wanted.sequence.canvas)):
                break
            row.commit(wanted.forward, propose(wanted, stats, i))
            row.num_free += i > 0

    def _call(self, group: list[Wanted]) -> Stats:
        call = self.backend.prefix if group[0].forward.is_prefix_pass else self.backend.refine
        return call(self.cache, slots_of(group), assemble(group))


def _drafts(row: Sequence, most: int) -> list[Sequence]:
    """The row after its next steps in the running block, as its last statistics foretell them."""
    seen, made, last = row.trace[-1].seen if row.trace and row.state.step else None, list[Sequence](), row
    while seen is not None and len(made) < most:
        last = last.fork()
        forward = last.next_forward()
        if not np.isin(forward.candidates, seen[0]).all():
            break
        last.commit(forward, _of(seen, forward.candidates))
        if last.block != row.block:
            break
        made.append(last)
    return made


def _of(seen: Seen, candidates: Ints) -> RowStats:
    """The statistics of some of the candidates that were seen."""
    at, stats = np.searchsorted(seen[0], candidates), seen[1]
    best = None if stats.best is None else stats.best[at]
    return RowStats(stats.token[at], stats.confidence[at], stats.runner_up[at], stats.entropy[at], best)
