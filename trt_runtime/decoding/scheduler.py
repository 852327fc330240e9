"""Continuous batching: requests join and leave the slots of one cache between forwards.

Each tick makes one call for a group of rows, which may be at different places of their answers: a prefix
pass, a refine step, or the several refine steps that the backend runs before it synchronises
(steps_per_sync), if the policies of all rows in the group can be expressed as commit rules.

1. Requests get slots in the order of their arrival.
2. A tick runs the role (prefix or refine) that most rows want next; if a row has waited more than a few
ticks, it runs that row's forward. Every row that can share the call does.
3. If a refine step skips slots between two of its rows, these slots take part as idle rows: they write beyond
every canvas, and nothing reads what they write.
4. A cancelled request leaves before the next tick; its slot is free at once.

So a row waits at most a few ticks more than the number of slots, and its answer is the same as if it were
decoded alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from trt_runtime.artifact.contract import SPARE_ROWS
from trt_runtime.decoding.backend import Backend
from trt_runtime.decoding.cache_plan import REFINE
from trt_runtime.decoding.running import Loop
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.decoding.step import Wanted, groups
from trt_runtime.errors import DllmError

_STEP = 16  # rows by which a cache grows and shrinks
_PATIENCE = 16  # requests placed while a smaller cache would do, before the cache shrinks
_HELD_BACK = 4  # ticks that a row may wait so that more rows share its forward
_MOST_IDLE = 0.5  # fraction of a refine step's rows: above it, runs of neighbouring slots are cheaper


@dataclass(eq=False)
class Ticket:
    """A request: queued (no slot), placed, or finished. served: the tick of its last forward; waited: the
    largest number of ticks between two of its forwards."""

    sequence: Sequence
    number: int
    slot: int | None = None
    served: int = 0
    waited: int = 0
    is_cancelled: bool = False
    on_step: Callable[[Ticket], None] | None = field(default=None, repr=False)

    @property
    def is_done(self) -> bool:
        return self.is_cancelled or self.sequence.is_finished


class Scheduler:
    """Requests over `slots` slots of one cache, for canvases of up to `max_length`. Not thread-safe: one
    thread ticks.

    spare: rows of the cache beyond the longest canvas, where idle rows write: at least the longest window of
    a refine step that may be shared. Where masked rows cost time (Backend.resized), the cache is only as long
    as the requests in its slots need, up to `max_length` + `spare`.
    """

    def __init__(self, backend: Backend, slots: int, max_length: int, spare: int = SPARE_ROWS) -> None:
        self.backend, self.max_length, self.spare = backend, max_length, spare
        self.cache = backend.new_cache(slots, max_length + spare)
        self.rows: list[Ticket | None] = [None] * slots
        self.queue: deque[Ticket] = deque()
        self.loop = Loop(backend, slots)
        self.tick_number = 0
        self._submitted = self._placed_small = 0

    @property
    def is_idle(self) -> bool:
        return not self.queue and not any(self.rows)

    def submit(self, sequence: Sequence, on_step: Callable[[Ticket], None] | None = None) -> Ticket:
        """Queue a request. on_step: called after each of its forwards. Raises DllmError for a canvas that
        fits no slot."""
        if sequence.length > self.max_length:
            raise DllmError(
                f"the canvas has {sequence.length} tokens, expected at most {self.max_length}: shorten the "
                f"prompt or lower gen_length."
            )
        self._submitted += 1
        ticket = Ticket(sequence, self._submitted, on_step=on_step)
        if not sequence.is_finished:
            self.queue.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Remove a request; does nothing if it is finished."""
        ticket.is_cancelled = not ticket.is_done or ticket.is_cancelled
        if ticket in self.queue:
            self.queue.remove(ticket)
        self._release(ticket)

    def tick(self) -> list[Ticket]:
        """Place waiting requests, make one call (a forward, or several steps), and return the requests that
        it advanced; none if there is nothing to do."""
        self._place_waiting()
        wanted = self.loop.wanted({slot: ticket.sequence for slot, ticket in enumerate(self.rows) if ticket})
        if not wanted:
            return []
        self.tick_number += 1
        group = self._group(wanted)
        self.loop.advance(self.cache, group)
        moved = [ticket for row in group if (ticket := self.rows[row.slot])]
        for ticket in moved:
            ticket.waited = max(ticket.waited, self.tick_number - ticket.served)
            ticket.served = self.tick_number
            if ticket.sequence.is_finished:
                self._release(ticket)
            if ticket.on_step:
                ticket.on_step(ticket)
        return moved

    def _place_waiting(self) -> None:
        """Give free slots to requests in the order of their arrival."""
        for slot in range(len(self.rows)):
            if self.rows[slot] is None and self.queue:
                ticket = self.queue.popleft()
                ticket.slot, ticket.served, self.rows[slot] = slot, self.tick_number, ticket
                self._fit()

    @property
    def _longest(self) -> int:
        return max(ticket.sequence.length for ticket in self.rows if ticket)

    def _fit(self) -> None:
        """After a request was placed: resize the cache to what the requests in slots need. It grows at once,
        and shrinks only after a smaller one would have been enough for _PATIENCE requests."""
        blocks = max(ticket.sequence.rules.block_length or 0 for ticket in self.rows if ticket)
        needed = -(-(self._longest + min(blocks, self.spare)) // _STEP) * _STEP
        self._placed_small = self._placed_small + 1 if needed <= 0.75 * self.cache.capacity else 0
        if needed > self.cache.capacity or self._placed_small == _PATIENCE or self.tick_number == 0:
            self.cache = self.backend.resized(self.cache, needed) or self.cache
            self._placed_small = 0

    def _release(self, ticket: Ticket) -> None:
        if ticket.slot is not None and self.rows[ticket.slot] is ticket:
            self.rows[ticket.slot] = None

    def _group(self, wanted: list[Wanted]) -> list[Wanted]:
        """The rows of this tick: the next row, and those that can share its call."""
        first = self._next(wanted)
        same = [row for row in wanted if row.forward.role == first.forward.role]
        if first.forward.role == REFINE and (apart := self._with_idle_rows(same, first)):
            return apart
        runs = groups(same, self.cache.capacity, self.backend.max_batch)
        return next(run for run in runs if any(row.slot == first.slot for row in run))

    def _next(self, wanted: list[Wanted]) -> Wanted:
        """The row to serve next: the one that has waited longest, if that is more than _HELD_BACK ticks; else
        the one that has waited longest among those that want the more common role."""
        first = min(wanted, key=self._waiting_since)
        if self.tick_number - self._waiting_since(first)[0] > _HELD_BACK:
            return first
        passes = [row for row in wanted if row.forward.is_prefix_pass]
        steps = [row for row in wanted if not row.forward.is_prefix_pass]
        return min(passes if len(passes) >= len(steps) else steps, key=self._waiting_since)

    def _waiting_since(self, row: Wanted) -> tuple[int, int]:
        ticket = self.rows[row.slot]
        assert ticket is not None
        return ticket.served, ticket.number

    def _with_idle_rows(self, same: list[Wanted], first: Wanted) -> list[Wanted]:
        """Refine steps that share a call with idle rows in the slots between them; empty if that is
        impossible or too many rows would be idle."""
        size = max(row.rows for row in same if self._can_share(row, first))
        apart = [row for row in same if row.rows <= size and row.can_stretch(size, self.cache.capacity)]
        span = apart[-1].slot - apart[0].slot + 1 if first in apart else 0
        fits = size <= self.cache.capacity - self._longest and 0 < span <= (self.backend.max_batch or span)
        return apart if fits and len(apart) >= (1 - _MOST_IDLE) * span else []

    def _can_share(self, row: Wanted, first: Wanted) -> bool:
        rows = max(row.rows, first.rows)
        return row.can_stretch(rows, self.cache.capacity) and first.can_stretch(rows, self.cache.capacity)
