"""One call for a group of rows: which rows can share it, its inputs, and what each row commits from the
statistics. The loop (generator.py), continuous batching (scheduler.py) and speculation (speculation.py) all
advance rows by the functions of this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np

from trt_runtime.artifact.contract import ROLES
from trt_runtime.decoding.backend import Backend, Cache, Stats, Window
from trt_runtime.decoding.cache_plan import Forward
from trt_runtime.decoding.policies.base import CommitRule, RowStats
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.decoding.trace import Written


@dataclass(frozen=True)
class Wanted:
    """The next forward of the row in a slot. rows: of its window."""

    slot: int
    sequence: Sequence
    forward: Forward
    rows: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", self.forward.rows)

    def can_stretch(self, rows: int, capacity: int) -> bool:
        """Whether the window can be padded to `rows`: only beyond the last valid row, and within the
        cache."""
        is_last = self.forward.start + self.rows == self.forward.kv_len
        return rows == self.rows or (is_last and self.forward.start + rows <= capacity)


def wanted_of(rows: Mapping[int, Sequence]) -> list[Wanted]:
    """The next forward of every unfinished row; `rows` by slot."""
    return [Wanted(slot, row, row.next_forward()) for slot, row in rows.items() if not row.is_finished]


def slots_of(group: list[Wanted]) -> slice:
    """The slots from a group's first row to its last."""
    return slice(group[0].slot, group[-1].slot + 1)


def advance(
    backend: Backend,
    cache: Cache,
    group: list[Wanted],
    window: Window,
    instead: Mapping[int, Written] | None = None,
) -> None:
    """One call for the group, after which each of its rows commits: one forward, or the several refine steps
    that the backend runs before the host synchronises, if all rows have commit rules. Rows advance only here.

    window: has a row for every slot from the group's first to its last; idle rows have no mask. instead: what
    to write in place of a slot's own choice (Sequence.commit).
    """
    rules = _commit_rules(backend, group) if not instead else None
    if rules is not None:
        _several_steps(backend, cache, group, window, rules)
        return
    stats = forward(backend, cache, group, window)
    for wanted in group:
        wanted.sequence.commit(
            wanted.forward, propose(wanted, stats, index_of(wanted, group)), (instead or {}).get(wanted.slot)
        )


def forward(backend: Backend, cache: Cache, group: list[Wanted], window: Window) -> Stats:
    """The statistics of one forward of a group; commits nothing."""
    want_logits = any(wanted.sequence.rules.sampler.needs_logits for wanted in group)
    return backend.forward(group[0].forward.role, cache, slots_of(group), window, want_logits=want_logits)


def index_of(wanted: Wanted, group: list[Wanted]) -> int:
    """The index of a row of the group in its call."""
    return wanted.slot - group[0].slot


def _commit_rules(backend: Backend, group: list[Wanted]) -> list[CommitRule] | None:
    """The rules by which the backend may run several steps of a group in one call; None if it runs one at a
    time, or a row has no rule."""
    if backend.steps_per_sync == 1:
        return None
    rules = [rule for wanted in group if (rule := wanted.sequence.commit_rule(wanted.forward)) is not None]
    return rules if len(rules) == len(group) else None


def _several_steps(
    backend: Backend, cache: Cache, group: list[Wanted], window: Window, rules: list[CommitRule]
) -> None:
    """Several steps of the rows' blocks in one call; each row then applies its own steps, and stops where it
    would have stopped alone. window: has a row for every slot, including those of other rows, which have no
    mask and commit nothing."""
    at = [index_of(wanted, group) for wanted in group]
    columns = np.arange(max(rule.limit for rule in rules))
    shift = group[0].sequence.rules.logit_shift
    logit_rows = np.minimum(np.maximum(columns - shift, 0), window.input_ids.shape[1] - 1)
    every = [CommitRule("threshold", 1, 1.0)] * len(window.input_ids)
    for index, rule in zip(at, rules, strict=True):
        every[index] = rule
    committed = backend.refine_steps(
        cache, slots_of(group), replace(window, logit_rows=np.tile(logit_rows, (len(every), 1))), every
    )
    for index, wanted in zip(at, group, strict=True):
        ids, step = committed.ids[index], committed.step[index]
        for number in range(int(step.max()) + 1):
            chosen = np.flatnonzero(step == number)
            wanted.sequence.follow(wanted.forward.start + chosen, ids[chosen])
            if wanted.sequence.is_finished:
                break


def groups(wanted: list[Wanted], capacity: int, max_batch: int | None = None) -> Iterator[list[Wanted]]:
    """Groups of at most `max_batch` neighbouring slots that can share one call: the same role, and windows
    that can be padded to the same number of rows."""
    for role in sorted({row.forward.role for row in wanted}, key=ROLES.index):
        group: list[Wanted] = []
        size = 0  # rows of the group's longest window
        for row in wanted:
            if row.forward.role != role:
                continue
            rows = max(size, row.rows)
            is_next = group and row.slot == group[-1].slot + 1 and len(group) != max_batch
            changed = group if rows != size else []  # the others fit already
            if group and not (
                is_next and all(member.can_stretch(rows, capacity) for member in (*changed, row))
            ):
                yield group
                group, rows = [], row.rows
            group.append(row)
            size = rows
        if group:
            yield group


def assemble(group: list[Wanted]) -> Window:
    """The inputs of a call, int64. Shorter rows are padded at their end, beyond their kv_len."""
    size = max(row.rows for row in group)
    wanted_rows = max(1, *(len(row.forward.asked) for row in group))
    ids = np.zeros((len(group), size), np.int64)
    # prefix graphs of earlier exports recognise padding by its positions, which must not be below kv_len
    position_ids = np.tile(np.arange(size, dtype=np.int64), (len(group), 1))
    logit_rows = np.zeros((len(group), wanted_rows), np.int64)
    start = np.array([row.forward.start for row in group], np.int64)
    for i, row in enumerate(group):
        position_ids[i, : row.rows] = row.forward.positions
        ids[i, : row.rows] = row.sequence.canvas[row.forward.positions]
        logit_rows[i, : len(row.forward.asked)] = row.forward.logit_rows(row.sequence.rules.logit_shift)
    kv_len = np.array([row.forward.kv_len for row in group], np.int64)
    if group[0].forward.row_len is None:
        return Window(ids, position_ids, start, kv_len, logit_rows)
    row_len = np.ones((len(group), size), np.int64)
    for i, row in enumerate(group):
        assert row.forward.row_len is not None
        row_len[i, : row.rows] = row.forward.row_len
    return Window(ids, position_ids, start, kv_len, logit_rows, row_len)


def window_of(group: list[Wanted], capacity: int) -> Window:
    """The inputs of a call for a group, with idle rows in the slots between its rows: they write beyond every
    canvas, and nothing reads what they write. capacity: rows of the cache."""
    inputs, slots = assemble(group), slots_of(group)
    count = slots.stop - slots.start
    if len(group) == count:
        return inputs
    at, size = [index_of(row, group) for row in group], inputs.input_ids.shape[1]
    no_mask = int(group[0].sequence.rules.mask_token_id == 0)
    full = Window(
        np.full((count, size), no_mask, np.int64),
        np.zeros((count, size), np.int64),
        np.full(count, capacity - size),
        np.ones(count, np.int64),
        np.zeros((count, inputs.logit_rows.shape[1]), np.int64),
        None if inputs.row_len is None else np.ones((count, size), np.int64),
    )
    for item in fields(Window):
        if isinstance(array := getattr(full, item.name), np.ndarray):
            array[at] = getattr(inputs, item.name)
    return full


def propose(wanted: Wanted, stats: Stats, index: int) -> RowStats:
    """The statistics of what a row asks for; with a temperature or filters, those of proposals sampled from
    its logits."""
    count, rules = len(wanted.forward.asked), wanted.sequence.rules
    row = stats.row(index, count)
    if not rules.sampler.needs_logits or wanted.forward.is_forced:
        return row
    assert stats.logits is not None
    return rules.sampler.propose(stats.logits[index, :count], row, rules.mask_token_id, wanted.sequence.rng)
