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
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_runtime.decoding.backend import Backend, Cache, Stats, Window
from trt_runtime.decoding.device_commit import proposed_mask
from trt_runtime.decoding.policies.base import BlockState, Bools, CommitRule, Floats, Ints
from trt_runtime.decoding.policies.schedules import quota
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.decoding.step import Wanted, advance, forward, index_of, propose, slots_of, window_of
from trt_runtime.decoding.trace import Seen, Step, Written

_NO_QUOTA = 1  # of a step after the schedule's last


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
        number = self.rule.number + len(self.calls)
        return max(1, self.quotas[number]) if number < len(self.quotas) else _NO_QUOTA


class _Table:
    """The inputs of steps of one width, a row for every slot; int64. is_open [N, S]: the masks that a row may
    commit; left [N]: how many; value [N], float64: of a threshold or factor."""

    def __init__(self, slots: int, size: int) -> None:
        self.ids, self.positions, self.row_len = (np.ones((slots, size), np.int64) for _ in range(3))
        self.start, self.kv_len, self.left = (np.zeros(slots, np.int64) for _ in range(3))
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
        self.left[slot], self.value[slot] = self.is_open[slot].sum(), row.rule.value

    def rest(self, slot: int, capacity: int, no_mask: int) -> None:
        """The inputs of an idle row, which writes beyond every canvas."""
        self.ids[slot], self.positions[slot], self.row_len[slot] = no_mask, 0, 1
        self.start[slot], self.kv_len[slot], self.left[slot] = capacity - self.ids.shape[1], 1, 0
        self.is_open[slot] = False

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
    """What rows of one width commit in a call. slots [B]: their slots, idle ones included; stats [B, R], of
    `candidates` [B, R]; left: how many of these a row has."""

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

    def chosen(self, rows: list[_Running], at: list[int]) -> Bools:
        """The candidates [B, R] that are committed, by the rules of policies/. at: the indices of the rows in
        the call."""
        size, values = self.candidates.shape[1], self.table.value[self.slots]
        is_there = np.arange(size) < np.array(self.left)[:, None]
        sure = np.where(is_there, self.stats.confidence[:, :size], -np.inf)
        kinds = {row.rule.kind for row in rows}
        if kinds == {"threshold"}:
            return _certain(sure, values) & is_there
        order = np.argsort(-sure, axis=1, kind="stable")
        lines, counts = np.arange(len(sure))[:, None], np.zeros(len(sure), np.int64)
        if "factor" in kinds:
            counts = _accepted(sure[lines, order], values)
        for row, index in zip(rows, at, strict=True):
            if row.rule.kind == "fixed":
                counts[index] = row.count()
        chosen = np.zeros(sure.shape, np.bool_)
        chosen[lines, order] = np.arange(size) < counts[:, None]
        if "threshold" in kinds:
            those = [index for row, index in zip(rows, at, strict=True) if row.rule.kind == "threshold"]
            chosen[those] = _certain(sure[those], values[those])
        return np.asarray(chosen & is_there)

    def commit(self, rows: list[_Running], at: list[int]) -> None:
        """Commit what is chosen, in the table and in the rows. at: as in `chosen`."""
        chosen, table, rules = self.chosen(rows, at), self.table, rows[0].sequence.rules
        index, column = np.nonzero(chosen)
        token, position = self.stats.token[index, column], self.candidates[index, column]
        if (token == rules.mask_token_id).any():
            raise proposed_mask()
        slots = self.slots[index]
        table.ids[slots, position] = token
        table.is_open[slots, position] = False
        counts = chosen.sum(1)
        table.left[self.slots] -= counts
        left, ends = table.left[self.slots].tolist(), counts.cumsum().tolist()
        position = position + table.start[slots]
        with_end = set(index[_is_any(token, rules.eos_token_ids)].tolist()) if self.may_end(rows) else ()
        for row, i in zip(rows, at, strict=True):
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

    @staticmethod
    def may_end(rows: list[_Running]) -> bool:
        """Whether an end token may end one of the rows."""
        return any(row.sequence.rules.stop_at_eos for row in rows)

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
        elif not instead and len(rows) == len(group) and len({wanted.rows for wanted in group}) == 1:
            self._advance(cache, rows)
        else:
            self._advance_mixed(cache, group, rows, instead or {})

    def _advance(self, cache: Cache, rows: list[_Running]) -> None:
        """One step of rows in the middle of a block, all of one width."""
        group = [row.wanted for row in rows]
        first, slots, rules = group[0].forward, slots_of(group), rows[0].sequence.rules
        table, count = self._tables[first.rows], slots.stop - slots.start
        if count > len(rows):
            for slot in set(range(slots.start, slots.stop)) - {row.slot for row in rows}:
                table.rest(slot, cache.capacity, int(rules.mask_token_id == 0))
        candidates = table.candidates(slots)
        is_checked = count == len(rows) and all(row.capacity == cache.capacity for row in rows)
        window = Window(
            table.ids[slots].copy(),  # copies, because the table changes, and a window may be kept
            table.positions[slots].copy(),
            table.start[slots].copy(),
            table.kv_len[slots].copy(),
            np.maximum(candidates - rules.logit_shift, 0) if rules.logit_shift else candidates,
            None if first.row_len is None else table.row_len[slots].copy(),
            is_checked,
        )
        stats = self.backend.forward(first.role, cache, slots, window)
        left = table.left[slots].tolist()
        call = _Call(table, np.arange(slots.start, slots.stop), candidates, stats, left)
        call.commit(rows, [row.slot - slots.start for row in rows])
        for row in rows:
            row.capacity = cache.capacity

    def _advance_mixed(
        self, cache: Cache, group: list[Wanted], rows: list[_Running], instead: Mapping[int, Written]
    ) -> None:
        """One call for rows in the middle of a block and others, or of several widths."""
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
            call = _Call(table, slots, table.candidates(slots), part, table.left[slots].tolist())
            call.commit(those, list(range(len(those))))

    def _now(self, wanted: Wanted) -> Wanted:
        """The next step of a row in the middle of a block, with its candidates as they are now."""
        is_open = self._tables[wanted.rows].is_open[wanted.slot]
        candidates = wanted.forward.start + np.flatnonzero(is_open)
        return replace(wanted, forward=replace(wanted.forward, candidates=candidates))


def _is_any(token: Ints, of: tuple[int, ...]) -> Bools:
    """Which tokens [n] are one of a few."""
    is_one = np.zeros(len(token), np.bool_)
    for each in of:
        is_one |= token == each
    return is_one


def _certain(sure: Floats, value: npt.NDArray[Any]) -> Bools:
    """The best of each row [B, R], and every other of at least `value` [B]."""
    chosen = sure >= value.astype(np.float32)[:, None]
    chosen[np.arange(len(sure)), sure.argmax(1)] = True
    return np.asarray(chosen)


def _accepted(ordered: Floats, value: npt.NDArray[Any]) -> Ints:
    """The n of policies.confidence.Factor for each row [B], from its confidences in order [B, R]."""
    size = ordered.shape[1]
    is_accepted = np.arange(2, size + 2) * (1 - ordered).astype(np.float64) < value[:, None]
    last = size - is_accepted[:, ::-1].argmax(1)
    return np.where(is_accepted.any(1), last, 1)
