"""The loop over rows: the file to read first.

    each step:  what does every row want next?  ->  group the rows that can share a call  ->  run
                ->  let each row commit

A row's cache plan (cache_plan.py) decides what it wants next: a prefix pass at a block's start, a refine step
inside a block. Rows occupy slots of one cache, start and finish independently, and cannot affect one another:
padding is masked, and never overwrites a valid row. One call for a group of rows: step.py; for rows in the
middle of a block, running.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from trt_runtime.decoding.backend import Backend, Cache
from trt_runtime.decoding.running import Loop
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.decoding.step import Wanted, groups
from trt_runtime.decoding.trace import Written


class Generator:
    """Rows in the slots of one cache. `step` advances every unfinished row by one forward."""

    def __init__(self, backend: Backend, sequences: Iterable[Sequence]) -> None:
        self.backend = backend
        self.sequences = list(sequences)
        self.capacity = max(sequence.length for sequence in self.sequences)
        self.cache: Cache = self.new_cache()
        self.loop = Loop(backend, len(self.sequences))

    def new_cache(self) -> Cache:
        return self.backend.new_cache(len(self.sequences), self.capacity)

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)

    def step(self, instead: Mapping[int, Written] | None = None) -> list[Wanted]:
        """One forward for every unfinished row, or the several steps that its backend runs in one call.
        Returns the steps of each. instead: what to write in place of a slot's own choice (Sequence.commit).
        """
        wanted = self.loop.wanted(dict(enumerate(self.sequences)))
        for group in groups(wanted, self.capacity, self.backend.max_batch):
            self.loop.advance(self.cache, group, instead)
        return wanted

    def run(self) -> None:
        """Step until every row is finished."""
        while not self.is_finished:
            self.step()
