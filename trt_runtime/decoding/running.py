"""Rows in the middle of a block: the inputs of their refine steps are prepared once, when the row comes to
its first step, and the rows of a call commit together, on arrays.

All refine steps of a block compute the same window, and a policy that is data (CommitRule) needs nothing of
the row but its masks. So a step changes only the tokens of the window, the masks, and the rows of the window
that are asked for. Everything else (other policies, sampling, token editing, a block's first forward) goes
row by row, through step.py; a row may change from one to the other after any forward.

Shape letters: N slots, B rows of a call, S rows of the window, R columns of the statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from trt_runtime.decoding.backend import Backend, Cache, Stats, Window
from trt_runtime.decoding.device_commit import KINDS, choose, proposed_mask
from trt_runtime.decoding.policies.base import BlockState, Bools, CommitRule, Floats, Ints
from trt_runtime.decoding.policies.schedules import planned, quota
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.decoding.step import Wanted, advance, forward, index_of, propose, slots_of, window_of
from trt_runtime.decoding.trace import Seen, Step, Written


@dataclass(eq=False)
class _Running:
    """A row between two steps of a block. wanted: its first step, which differs from the next one in its
    candidates only. block: its range; state: before that step. quotas: of a fixed schedule. may_be_done:
    whether the block can be done before its last mask is gone. calls: each step, as a call and the row's
    index in it. capacity: of the cache for which its inputs were checked."""

    sequence: Sequence
    wanted: Wanted
    rule: CommitRule
    block: tuple[int, int]
    state: BlockState
    quotas: list[int]
    may_be_done: bool
    num_steps: int  # of the trace, after the last of these steps
    calls: list[tuple[_Call, int]] = field(default_factory=list)
    capacity: int = 0

    @property
    def slot(self) -> int:
        return self.wanted.slot

    @property
    def is_current(self) -> bool:
        """Whether nothing else has advanced the row."""
        return self.sequence.history.count == self.num_steps and self.sequence.block is self.block

    def count(self) -> int:
        """How many positions a fixed schedule commits next."""
        return planned(self.quotas, self.rule.number + len(self.calls))


class _Table:
    """The inputs of steps of one width, a row for every slot; int64. is_open [N, S]: the masks that a row may
    commit; left [N]: how many; kind, value [N]: of the rows' rules (device_commit.choose)."""

    def __init__(self, slots: int, size: int) -> None:
        self.ids, self.positions, self.row_len = (np.ones((slots, size), np.int64) for _ in range(3))
        self.start, self.kv_len, self.left, self.kind = (np.zeros(slots, np.int64) for _ in range(4))
        self.is_open, self.value = np.zeros((slots, size), np.bool_), np.zeros(slots)

    def enter(self, row: _Running) -> None:
        """Prepare the inputs of a row."""
        slot, forward, canvas = row.wanted.slot, row.wanted.forward, row.sequence.canvas
        positions = forward.positions
        self.ids[slot], self.positions[slot] = canvas[positions], positions
        self.start[slot], self.kv_len[slot] = forward.start, forward.kv_len
        self.row_len[slot] = 1 if forward.row_len is None else forward.row_len
        self.is_open[slot] = self.ids[slot] == row.sequence.rules.mask_token_id
        self.is_open[slot, row.rule.limit :] = False
        self.left[slot] = self.is_open[slot].sum()
        self.kind[slot], self.value[slot] = KINDS[row.rule.kind], row.rule.value

    def candidates(self, slots: slice | Ints) -> Ints:
        """The window's rows that may be committed [B, R], from the left; columns after a row's last are 0."""
        rows, columns = np.nonzero(self.is_open[slots])
        left = self.left[slots]
        if len(left) == 1:
            return columns[None]
        order = np.zeros((len(left), int(left.max())), np.int64)
        order[rows, np.arange(len(rows)) - np.repeat(np.cumsum(left) - left, left)] = columns
        return order


@dataclass(frozen=True, eq=False)
class _Call:
    """What rows of one width commit in a call. slots [B]: their slots; stats [B, R], of `candidates` [B, R];
    left: how many of these a row has."""

    table: _Table
    slots: Ints
    candidates: Ints
    stats: Stats
    left: list[int]

    def candidates_of(self, row: _Running, index: int) -> tuple[Ints, Floats]:
        """A row's candidates, as positions, and their confidence."""
        count = self.left[index]
        positions = self.candidates[index, :count] + row.wanted.forward.start
        return positions, self.stats.confidence[index, :count]

    def seen(self, row: _Running, index: int, number: int) -> Seen:
        """What a row's policy chose from, in its step `number`."""
        (positions, _), sequence = self.candidates_of(row, index), row.sequence
        state = row.state.after([call.candidates_of(row, at) for call, at in row.calls[:number]])
        uniform, rng = sequence.uniform[positions], sequence.rng
        state = replace(state, positions=positions, uniform=uniform, rng=rng)
        return positions, self.stats.row(index, len(positions)), state

    def chosen(self, rows: list[_Running]) -> Bools:
        """The candidates [B, R] that are committed."""
        size, table = self.candidates.shape[1], self.table
        is_there = np.arange(size) < np.array(self.left)[:, None]
        sure = np.where(is_there, self.stats.confidence[:, :size], -np.inf)
        counts = np.array([row.count() for row in rows])
        return choose(sure, table.kind[self.slots], table.value[self.slots], counts)

    def commit(self, rows: list[_Running]) -> None:
        """Commit what is chosen, in the table and in the rows."""
        chosen, table, rules = self.chosen(rows), self.table, rows[0].sequence.rules
        index, column = np.nonzero(chosen)
        token, position = self.stats.token[index, column], self.candidates[index, column]
        if (token == rules.mask_token_id).any():
            raise proposed_mask(rules.mask_token_id)
        slots = self.slots[index]
        table.ids[slots, position] = token
        table.is_open[slots, position] = False
        counts = chosen.sum(1)
        table.left[self.slots] -= counts
        left, ends = table.left[self.slots].tolist(), counts.cumsum().tolist()
        position = position + table.start[slots]
        eos = rules.eos_token_ids
        with_end = {i for i, each in zip(index.tolist(), token.tolist(), strict=True) if each in eos}
        for i, row in enumerate(rows):
            written = slice(ends[i - 1] if i else 0, ends[i])
            where, tokens = position[written], token[written]
            number = len(row.calls)
            row.calls.append((self, i))
            row.num_steps += 1
            row.sequence.follow_step(
                partial(self.step, row, i, number, where, tokens),
                where,
                tokens,
                may_be_done=not left[i] or row.may_be_done,
                has_end=i in with_end,
            )

    def step(self, row: _Running, index: int, number: int, positions: Ints, tokens: Ints) -> Step:
        """A row's step, for its trace."""
        forward, seen = row.wanted.forward, partial(self.seen, row, index, number)
        return Step(forward.kind, forward.start, forward.rows, positions.tolist(), tokens.tolist(), seen)


class Loop:
    """Advances the rows in the slots of a cache; the one place that knows which of them are in the middle of
    a block."""

    def __init__(self, backend: Backend, slots: int) -> None:
        self.backend, self.slots = backend, slots
        self._rows: dict[int, _Running] = {}
        self._tables: dict[int, _Table] = {}

    def wanted(self, rows: Mapping[int, Sequence]) -> list[Wanted]:
        """The next forward of every unfinished row; `rows` by slot. Of rows in the middle of a block, the
        candidates may be those of an earlier step."""
        return [self._wanted(slot, row) for slot, row in rows.items() if not row.is_finished]

    def _wanted(self, slot: int, sequence: Sequence) -> Wanted:
        row = self._rows.get(slot)
        if row is not None and row.sequence is sequence and row.is_current:
            return row.wanted
        wanted = Wanted(slot, sequence, sequence.next_forward())
        rule = sequence.commit_rule(wanted.forward) if self.backend.steps_per_sync == 1 else None
        if rule is None or not len(wanted.forward.candidates) or sequence.is_forced:
            self._rows.pop(slot, None)
            return wanted
        assert sequence.block is not None
        self._rows[slot] = row = _Running(
            sequence,
            wanted,
            rule,
            sequence.block,
            sequence.state,
            list(quota(rule.masks, rule.steps)) if rule.kind == "fixed" else [],
            may_be_done=sequence.block[1] > sequence.end,
            num_steps=sequence.history.count,
        )
        if wanted.rows not in self._tables:
            self._tables[wanted.rows] = _Table(self.slots, wanted.rows)
        self._tables[wanted.rows].enter(row)
        return wanted

    def advance(
        self, cache: Cache, group: list[Wanted], instead: Mapping[int, Written] | None = None
    ) -> None:
        """One call for a group of `wanted`, after which each of its rows commits. Slots between two of its
        rows are idle. instead: what to write in place of a slot's own choice (Sequence.commit)."""
        rows = [row for wanted in group if (row := self._rows.get(wanted.slot)) and row.wanted is wanted]
        if not rows:
            advance(self.backend, cache, group, window_of(group, cache.capacity), instead)
        elif not instead and self._are_alike(group, rows):
            self._advance(cache, rows)
        else:
            self._advance_mixed(cache, group, rows, instead or {})

    @staticmethod
    def _are_alike(group: list[Wanted], rows: list[_Running]) -> bool:
        """Whether a group consists of rows in the middle of a block, of one width, without a slot between."""
        slots = slots_of(group)
        return slots.stop - slots.start == len(rows) and len({wanted.rows for wanted in group}) == 1

    def _advance(self, cache: Cache, rows: list[_Running]) -> None:
        """One step of rows in the middle of a block that are alike."""
        first, rules = rows[0].wanted.forward, rows[0].sequence.rules
        table, slots = self._tables[first.rows], slice(rows[0].slot, rows[-1].slot + 1)
        candidates = table.candidates(slots)
        window = Window(
            table.ids[slots].copy(),  # copies, because the table changes, and a window may be kept
            table.positions[slots].copy(),
            table.start[slots].copy(),
            table.kv_len[slots].copy(),
            np.maximum(candidates - rules.logit_shift, 0) if rules.logit_shift else candidates,
            None if first.row_len is None else table.row_len[slots].copy(),
            is_checked=all(row.capacity == cache.capacity for row in rows),
        )
        stats = self.backend.forward(first.role, cache, slots, window)
        numbers = np.arange(slots.start, slots.stop)
        _Call(table, numbers, candidates, stats, table.left[slots].tolist()).commit(rows)
        for row in rows:
            row.capacity = cache.capacity

    def _advance_mixed(
        self, cache: Cache, group: list[Wanted], rows: list[_Running], instead: Mapping[int, Written]
    ) -> None:
        """One call for rows in the middle of a block and others, of several widths, or not side by side."""
        running = {row.slot: row for row in rows}
        group = [self._now(wanted) if wanted.slot in running else wanted for wanted in group]
        stats = forward(self.backend, cache, group, window_of(group, cache.capacity))
        by_width: dict[int, list[_Running]] = {}
        for wanted in group:
            row = running.get(wanted.slot)
            if row is not None and wanted.slot not in instead:
                by_width.setdefault(wanted.rows, []).append(row)
                continue
            statistics = propose(wanted, stats, index_of(wanted, group))
            wanted.sequence.commit(wanted.forward, statistics, instead.get(wanted.slot))
        for size, those in by_width.items():
            table, slots = self._tables[size], np.array([row.slot for row in those])
            part = stats.part(slots - group[0].slot)
            left = table.left[slots].tolist()
            _Call(table, slots, table.candidates(slots), part, left).commit(those)

    def _now(self, wanted: Wanted) -> Wanted:
        """The next step of a row in the middle of a block, with its candidates as they are now."""
        is_open = self._tables[wanted.rows].is_open[wanted.slot]
        candidates = wanted.forward.start + np.flatnonzero(is_open)
        return replace(wanted, forward=replace(wanted.forward, candidates=candidates))
