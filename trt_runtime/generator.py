"""The loop over rows: the file to read first.

    each step:  what does every row want next?  ->  group the rows that can share a forward  ->  run  ->  let each row commit

A row at a block's start wants a prefix pass, a row inside a block a refine step (sequence.py). Rows stand in slots of one
cache, join and finish on their own, and never see one another: padding is masked, and never written over a valid row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from trt_runtime.backends.base import Backend, Cache, Stats, Window
from trt_runtime.policies import CommitRule, RowStats
from trt_runtime.sequence import Forward, Sequence, Written


@dataclass(frozen=True)
class Wanted:
    """The forward that the row in a slot wants next."""

    slot: int
    sequence: Sequence
    forward: Forward

    @property
    def rows(self) -> int:
        return self.forward.rows

    def can_stretch(self, rows: int, capacity: int) -> bool:
        """Whether the window may be padded to `rows`: only past the last valid row, and within the cache."""
        is_last = self.forward.start + self.rows == self.forward.kv_len
        return rows == self.rows or (is_last and self.forward.start + rows <= capacity)


class Generator:
    """Rows in the slots of one cache. `step` advances every unfinished row by one forward."""

    def __init__(self, backend: Backend, sequences: Iterable[Sequence]) -> None:
        self.backend = backend
        self.sequences = list(sequences)
        self.capacity = max(sequence.length for sequence in self.sequences)
        self.cache: Cache = self.new_cache()

    def new_cache(self) -> Cache:
        return self.backend.new_cache(len(self.sequences), self.capacity)

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)

    def step(self, instead: Mapping[int, Written] | None = None) -> list[Wanted]:
        """One forward for every unfinished row, or the several steps that its backend makes in one call. Returns what was done for
        each. `instead`: what to write in place of a slot's own choice (Sequence.commit)."""
        wanted = [Wanted(i, row, row.next_forward()) for i, row in enumerate(self.sequences) if not row.is_finished]
        for group in groups(wanted, self.capacity, self.backend.max_batch):
            self._run(group, instead or {})
        return wanted

    def run(self) -> None:
        """Step until every row is finished."""
        while not self.is_finished:
            self.step()

    def _run(self, group: list[Wanted], instead: Mapping[int, Written]) -> None:
        rules = commit_rules(self.backend, group) if not instead else None
        if rules is not None:
            run_steps(self.backend, self.cache, group, assemble(group), rules)
        else:
            run_group(self.backend, self.cache, group, assemble(group), instead)


def slots_of(group: list[Wanted]) -> slice:
    """The slots from a group's first row to its last."""
    return slice(group[0].slot, group[-1].slot + 1)


def run_group(
    backend: Backend, cache: Cache, group: list[Wanted], window: Window, instead: Mapping[int, Written] | None = None
) -> None:
    """One forward over the group's slots, after which each of its rows commits. `window` has a row for every slot, the group's or not."""
    slots, forced = slots_of(group), instead or {}
    call = backend.prefix if group[0].forward.is_prefix_pass else backend.refine
    want_logits = any(wanted.sequence.rules.sampler.needs_logits for wanted in group)
    stats = call(cache, slots, window, want_logits=want_logits)
    for wanted in group:
        row = propose(wanted, stats, wanted.slot - slots.start)
        wanted.sequence.commit(wanted.forward, row, forced.get(wanted.slot))


def commit_rules(backend: Backend, group: list[Wanted]) -> list[CommitRule] | None:
    """The rules by which the backend may make several steps of a group in one call; None where it takes one at a time, or a row has no rule."""
    if backend.steps_per_look == 1:
        return None
    rules = [rule for wanted in group if (rule := wanted.sequence.commit_rule(wanted.forward)) is not None]
    return rules if len(rules) == len(group) else None


def run_steps(backend: Backend, cache: Cache, group: list[Wanted], window: Window, rules: list[CommitRule]) -> None:
    """Several steps of the rows' blocks in one call; each row then follows its own, and ends where it would have ended.

    `window` has a row for every slot, the group's or not: rows that are not hold no mask, and commit nothing.
    """
    slots = slots_of(group)
    at = [wanted.slot - slots.start for wanted in group]
    columns = np.arange(max(rule.limit for rule in rules))
    shift = group[0].sequence.rules.logit_shift
    logit_rows = np.minimum(np.maximum(columns - shift, 0), window.input_ids.shape[1] - 1)
    every = [CommitRule("threshold", 1, 1.0)] * len(window.input_ids)
    for index, rule in zip(at, rules, strict=True):
        every[index] = rule
    made = backend.refine_steps(cache, slots, replace(window, logit_rows=np.tile(logit_rows, (len(every), 1))), every)
    for index, wanted in zip(at, group, strict=True):
        ids, step = made.ids[index], made.step[index]
        for number in range(int(step.max()) + 1):
            chosen = np.flatnonzero(step == number)
            wanted.sequence.follow(wanted.forward.start + chosen, ids[chosen])
            if wanted.sequence.is_finished:
                break


def groups(wanted: list[Wanted], capacity: int, max_batch: int | None = None) -> Iterator[list[Wanted]]:
    """Runs of at most `max_batch` neighbouring slots that can share one call: the same role, and windows that can take one number of
    rows."""
    for is_prefix_pass in (True, False):
        group: list[Wanted] = []
        for row in (w for w in wanted if w.forward.is_prefix_pass == is_prefix_pass):
            together = [*group, row]
            rows = max(member.rows for member in together)
            is_next = group and row.slot == group[-1].slot + 1 and len(group) != max_batch
            if group and not (is_next and all(member.can_stretch(rows, capacity) for member in together)):
                yield group
                together = [row]
            group = together
        if group:
            yield group


def assemble(group: list[Wanted]) -> Window:
    """The inputs of a call, int64. Rows shorter than the longest are padded at their end, beyond their kv_len."""
    size = max(row.rows for row in group)
    wanted_rows = max(len(row.forward.candidates) for row in group)
    ids = np.zeros((len(group), size), np.int64)
    # prefix graphs of earlier exports tell padding by its positions: it must not lie before kv_len
    position_ids = np.tile(np.arange(size, dtype=np.int64), (len(group), 1))
    logit_rows = np.zeros((len(group), wanted_rows), np.int64)
    start = np.array([row.forward.start for row in group], np.int64)
    for i, row in enumerate(group):
        position_ids[i, : row.rows] = row.forward.positions
        ids[i, : row.rows] = row.sequence.canvas[row.forward.positions]
        logit_rows[i, : len(row.forward.candidates)] = row.forward.logit_rows(row.sequence.rules.logit_shift)
    kv_len = np.array([row.forward.kv_len for row in group], np.int64)
    return Window(ids, position_ids, start, kv_len, logit_rows)


def propose(wanted: Wanted, stats: Stats, index: int) -> RowStats:
    """The statistics of a row's candidates; with a temperature or filters, of proposals drawn from its logits."""
    count, rules = len(wanted.forward.candidates), wanted.sequence.rules
    row = stats.row(index, count)
    if not rules.sampler.needs_logits:
        return row
    assert stats.logits is not None
    return rules.sampler.propose(stats.logits[index, :count], row, rules.mask_token_id, wanted.sequence.rng)
