"""Lossless self-speculation: several steps of a block verified in one call, with the same tokens as one step
per call.

    draft:   from the last statistics alone, what would the policy commit next, and then, and then?
    verify:  the canvases after each of these steps are the rows of one call
    accept:  row 0 is certain; if the policy, seeing its statistics, commits what row 1 was drafted with,
             row 1 is certain too; and so on

The draft costs no forward, and a wrong one costs nothing but the row. In the manner of SSD (arXiv 2510.04147)
and FreeDave (arXiv 2510.00294); works with every policy that draws nothing. Branches are in neighbouring
slots of the cache with the same keys and values outside the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from trt_runtime.decoding.backend import Backend, Cache, Stats
from trt_runtime.decoding.generator import Generator
from trt_runtime.decoding.policies.base import Ints, RowStats
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.decoding.step import Wanted, assemble, forward, propose, wanted_of
from trt_runtime.decoding.trace import Seen, Written
from trt_runtime.errors import DllmError


class Speculating(Generator):
    """A Generator whose calls each verify up to `branches` steps of one row. Raises DllmError if the backend
    accepts fewer rows per call."""

    def __init__(self, backend: Backend, sequences: Iterable[Sequence], branches: int) -> None:
        if backend.max_batch is not None and branches > backend.max_batch:
            raise DllmError(
                f"speculate is {branches}, but the engines support {backend.max_batch} rows per call: lower "
                f"speculate, or build with a larger --max-batch."
            )
        if backend.steps_per_sync > 1:
            raise DllmError("speculate and steps_per_sync cannot be combined: set one of them to 1.")
        self.branches = branches
        super().__init__(backend, sequences)

    def new_cache(self) -> Cache:
        return self.backend.new_cache(len(self.sequences) * self.branches, self.capacity)

    def step(self, instead: Mapping[int, Written] | None = None) -> list[Wanted]:
        """One call for every unfinished row."""
        wanted = wanted_of(dict(enumerate(self.sequences)))
        for row in wanted:
            forced = (instead or {}).get(row.slot)
            if forced is not None or (row.sequence.rules.cache.keeps_cache and row.sequence.opens_block):
                self._one_step(row, forced)
            else:
                self._verify(row.sequence, row.slot * self.branches)
        return wanted

    def _one_step(self, wanted: Wanted, instead: Written | None) -> None:
        """One forward, after which all branches have its keys and values: copied, or else computed in
        each."""
        first = wanted.slot * self.branches
        can_copy = self.backend.copy_slot(self.cache, first, slice(first, first))
        group = [replace(wanted, slot=first + i) for i in range(1 if can_copy else self.branches)]
        wanted.sequence.commit(wanted.forward, propose(group[0], self._call(group), 0), instead)
        if can_copy:
            self.backend.copy_slot(self.cache, first, slice(first + 1, first + self.branches))

    def _verify(self, row: Sequence, first: int) -> None:
        block = row.block
        group = [
            Wanted(first + i, draft, draft.next_forward())
            for i, draft in enumerate([row, *_drafts(row, self.branches - 1)])
        ]
        stats = self._call(group)
        for i, wanted in enumerate(group):
            if row.block != block or (i and not np.array_equal(row.canvas, wanted.sequence.canvas)):
                break
            row.commit(wanted.forward, propose(wanted, stats, i))
            row.num_free += i > 0

    def _call(self, group: list[Wanted]) -> Stats:
        return forward(self.backend, self.cache, group, assemble(group))


def _drafts(row: Sequence, most: int) -> list[Sequence]:
    """The row after its next steps in the current block, as predicted from its last statistics."""
    seen, drafts, last = row.trace[-1].seen if row.trace and row.state.step else None, list[Sequence](), row
    while seen is not None and len(drafts) < most:
        last = last.fork()
        wanted = last.next_forward()
        if not np.isin(wanted.candidates, seen[0]).all():
            break
        last.commit(wanted, _of(seen, wanted.candidates))
        if last.block != row.block:
            break
        drafts.append(last)
    return drafts


def _of(seen: Seen, candidates: Ints) -> RowStats:
    """The statistics of some of the candidates."""
    at, stats = np.searchsorted(seen[0], candidates), seen[1]
    best = None if stats.best is None else stats.best[at]
    return RowStats(stats.token[at], stats.confidence[at], stats.runner_up[at], stats.entropy[at], best)
