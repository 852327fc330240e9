"""The threads that own the model: requests go in, updates come out. The rest of the server runs on the event
loop.

Each lane is a thread with a scheduler of its own. On a CPU, several lanes of one thread each do more than one
lane whose matrix products are split over several threads. A request stays in its lane.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from trt_runtime.decoding.scheduler import Scheduler, Ticket
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.errors import DllmError
from trt_runtime.model import Model, Update
from trt_runtime.serving.errors import is_fault
from trt_runtime.serving.metrics import Metrics

Event = Update | Exception | None
_LOG = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full."""


class Broken(Exception):
    """The client's view of a failed forward; the log has the details."""

    status = 500


class Stopping(Broken):
    """The server is stopping."""

    status = 503


class Lane:
    """A scheduler in a thread of its own, which runs commands from other threads; None ends it."""

    def __init__(self, scheduler: Scheduler, run: Callable[[Lane], None], name: str) -> None:
        self.scheduler = scheduler
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=run, args=(self,), name=name, daemon=True)
        self.busy_since: float | None = None  # when the current forward began, by time.monotonic


@dataclass(eq=False)
class Job:
    """One open answer. deliver: called in the worker's thread with its updates, then with None or an
    exception; wants_updates: every update, or only the last; is_held: it counts as open until `release`,
    so that slow readers count too."""

    sequence: Sequence
    deliver: Callable[[Event], None]
    wants_updates: bool
    lane: Lane | None = None
    ticket: Ticket | None = None
    block: tuple[int, int] | None = None
    told: int = 0
    blocks: int = 0
    counted: int = 0
    begin: float = field(default_factory=time.perf_counter)
    last: float = 0.0
    is_open: bool = True
    is_held: bool = False


class Worker:
    """A model behind schedulers in threads. `submit` and `cancel` may be called from the event loop. Raises
    DllmError if several lanes are asked for and the backend allows one call at a time."""

    def __init__(
        self, model: Model, metrics: Metrics, *, slots: int, max_length: int, most_queued: int, lanes: int = 1
    ) -> None:
        if lanes > 1 and not model.backend.is_concurrent:
            raise DllmError(
                f"--lanes is {lanes}, but the backend {model.backend.name} supports one call at a time: "
                f"remove it."
            )
        if lanes > slots:
            raise DllmError(f"--lanes is {lanes} with {slots} slots, expected at most one per slot.")
        self.model, self.metrics = model, metrics
        self.slots, self.max_length, self.most_queued = slots, max_length, most_queued
        self._open: set[Job] = set()
        self._held: set[Job] = set()
        self._lock = threading.Lock()
        self._lanes = [
            Lane(
                Scheduler(model.backend, slots * (i + 1) // lanes - slots * i // lanes, max_length),
                self._run,
                f"dllm-trt lane {i}",
            )
            for i in range(lanes)
        ]
        metrics.slots.set(slots)

    def start(self) -> None:
        for lane in self._lanes:
            lane.thread.start()

    def stop(self, seconds: float | None = None) -> bool:
        """End the threads; open jobs get an error. False if one does not end within `seconds`."""
        begun = [lane for lane in self._lanes if lane.thread.ident is not None]
        for lane in begun:
            lane.commands.put(None)
        deadline = None if seconds is None else time.monotonic() + seconds
        for lane in begun:
            lane.thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(lane.thread.is_alive() for lane in begun)

    def longest_forward(self) -> float:
        """Seconds that the longest of the current forwards has taken so far."""
        begun = [since for lane in self._lanes if (since := lane.busy_since) is not None]
        return max((time.monotonic() - since for since in begun), default=0.0)

    @property
    def is_alive(self) -> bool:
        return all(lane.thread.is_alive() for lane in self._lanes)

    @property
    def num_open(self) -> int:
        """Answers that are not finished, or not delivered."""
        with self._lock:
            return len(self._open | self._held)

    def release(self, jobs: list[Job]) -> None:
        """A held answer is delivered, or given up."""
        with self._lock:
            self._held.difference_update(jobs)

    def submit(self, jobs: list[Job]) -> None:
        """Queue answers. Raises Busy if the queue would grow too long, DllmError for one that fits no slot,
        Stopping at the end."""
        if not self.is_alive:
            raise Stopping("the server is stopping: try again.")
        for job in jobs:
            if job.sequence.length > self.max_length:
                raise DllmError(
                    f"prompt and answer have {job.sequence.length} tokens, expected at most "
                    f"{self.max_length}: shorten the prompt, or lower max_tokens."
                )
        with self._lock:
            if len(self._open | self._held) + len(jobs) > self.slots + self.most_queued:
                raise Busy
            self._held.update(job for job in jobs if job.is_held)
            for job in jobs:
                open_in = Counter(other.lane for other in self._open)
                job.lane = min(self._lanes, key=lambda lane: open_in[lane] / len(lane.scheduler.rows))
                self._open.add(job)
        for job in jobs:
            assert job.lane is not None
            job.lane.commands.put(lambda job=job: self._place(job))  # type: ignore[misc]

    def cancel(self, job: Job, why: str = "left") -> None:
        """Cancel an answer; its slot is free at the next tick. Does nothing if it is finished. why: left,
        stop (a stop string) or timeout."""
        if job.lane is not None:
            job.lane.commands.put(lambda: self._cancel(job, why))

    def _place(self, job: Job) -> None:
        if not job.is_open:
            return
        job.block = job.sequence.block
        assert job.lane is not None
        job.ticket = job.lane.scheduler.submit(job.sequence, lambda ticket: self._stepped(job))
        if job.sequence.is_finished:
            self._close(job, None)

    def _cancel(self, job: Job, why: str) -> None:
        if job.is_open:
            self.metrics.requests.labels(why).inc()
            self.metrics.cancelled.inc(why == "left")
        self._leave(job)
        self._close(job, None)

    def _leave(self, job: Job) -> None:
        if job.ticket is not None and job.lane is not None:
            job.lane.scheduler.cancel(job.ticket)

    def _stepped(self, job: Job) -> None:
        try:
            self._step(job)
        except BaseException as error:
            if not is_fault(error):
                raise
            self._fail(job)  # an error of one answer: the others continue

    def _fail(self, job: Job) -> None:
        """End an answer because of the exception being handled."""
        _LOG.exception("an answer failed")
        self.metrics.requests.labels("failed").inc()
        self._leave(job)
        self._close(job, Broken("a forward of the model failed: see the server's log."))

    def _step(self, job: Job) -> None:
        row, metrics = job.sequence, self.metrics
        for step in row.trace[job.counted :]:  # one, or those that the device ran before it synchronised
            metrics.forwards.labels(step.kind).inc()
            metrics.committed.inc(len(step.positions))
        job.counted = len(row.trace)
        is_new = row.block != job.block
        now = time.perf_counter()
        if is_new:
            (metrics.first_block if not job.blocks else metrics.between_blocks).observe(
                now - (job.last or job.begin)
            )
            job.last, job.blocks = now, job.blocks + 1
        if job.wants_updates or row.is_finished:
            assert job.block is not None
            job.deliver(self.model.update_of(row, job.block, job.told))
            job.told = len(row.trace)
        job.block = row.block
        if row.is_finished:
            metrics.requests.labels("done").inc()
            metrics.tokens_per_forward.observe(row.num_useful / max(1, row.nfe))
            self._close(job, None)

    def _close(self, job: Job, end: Exception | None) -> None:
        if job.is_open:
            job.is_open = False
            with self._lock:
                self._open.discard(job)
            job.deliver(end)

    def _run(self, lane: Lane) -> None:
        try:
            while self._drain(lane):
                try:
                    lane.busy_since = time.monotonic()
                    lane.scheduler.tick()
                except BaseException as error:
                    if not is_fault(error):
                        raise
                    # a forward failed: the rows in slots are lost; waiting rows and the server are not
                    for job in self._jobs(lane):
                        if job.ticket is not None and job.ticket.slot is not None:
                            self._fail(job)
                finally:
                    lane.busy_since = None
        finally:
            for job in self._jobs(lane):
                self._close(job, Stopping("the server is stopping: try again."))

    def _jobs(self, lane: Lane) -> list[Job]:
        with self._lock:
            return [job for job in self._open if job.lane is lane]

    def _drain(self, lane: Lane) -> bool:
        """Run the waiting commands; if there is nothing to do, wait for one. False ends the thread."""
        while True:
            self.metrics.queued.set(sum(len(each.scheduler.queue) for each in self._lanes))
            self.metrics.busy.set(sum(row is not None for each in self._lanes for row in each.scheduler.rows))
            try:
                command = lane.commands.get(block=lane.scheduler.is_idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            try:
                command()
            except Exception:
                _LOG.exception("a command failed")
