"""The thread that owns the model: requests go in, updates come out. Everything else in the server runs on the event loop."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from trt_runtime.errors import DllmError
from trt_runtime.model import Model, Update
from trt_runtime.scheduler import Scheduler, Ticket
from trt_runtime.sequence import Sequence
from trt_runtime.server.metrics import Metrics

Event = Update | Exception | None
_LOG = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full."""


class Broken(Exception):
    """What a client is told when a forward failed; the log says more."""

    status = 500


class Stopping(Broken):
    """The server is at its end."""

    status = 503


@dataclass(eq=False)
class Job:
    """One answer under way. `deliver` is called in the worker's thread with its updates, then with None, or with an exception;
    `wants_updates`: each update, else the last alone."""

    sequence: Sequence
    deliver: Callable[[Event], None]
    wants_updates: bool
    ticket: Ticket | None = None
    block: tuple[int, int] | None = None
    told: int = 0
    blocks: int = 0
    begin: float = field(default_factory=time.perf_counter)
    last: float = 0.0
    is_open: bool = True


class Worker:
    """A model behind a scheduler in a thread. `submit` and `cancel` may be called from the event loop."""

    def __init__(self, model: Model, metrics: Metrics, *, slots: int, max_length: int, most_queued: int) -> None:
        self.model, self.metrics = model, metrics
        self.slots, self.max_length, self.most_queued = slots, max_length, most_queued
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open: set[Job] = set()
        self._lock = threading.Lock()
        self._scheduler = Scheduler(model.backend, slots, max_length)
        self._thread = threading.Thread(target=self._run, name="dllm-trt worker", daemon=True)
        metrics.slots.set(slots)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; jobs that are open get an error."""
        self._commands.put(None)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_open(self) -> int:
        return len(self._open)

    def submit(self, jobs: list[Job]) -> None:
        """Queue answers. Raises Busy if the queue would grow too long, DllmError for one that no slot holds, Stopping at the end."""
        if not self.is_alive:
            raise Stopping("the server is stopping: try again.")
        for job in jobs:
            if job.sequence.length > self.max_length:
                raise DllmError(
                    f"prompt and answer are {job.sequence.length} tokens, this server takes {self.max_length}: shorten the prompt, "
                    "lower max_tokens, or serve with a larger --max-length."
                )
        with self._lock:
            if len(self._open) + len(jobs) > self.slots + self.most_queued:
                raise Busy
            self._open.update(jobs)
        for job in jobs:
            self._commands.put(lambda job=job: self._place(job))  # type: ignore[misc]

    def cancel(self, job: Job, why: str = "left") -> None:
        """Give an answer up; its slot is free at the next tick. Nothing if it is done. why: left, stop (a stop string) or timeout."""
        self._commands.put(lambda: self._cancel(job, why))

    def _place(self, job: Job) -> None:
        if not job.is_open:
            return
        job.block = job.sequence.block
        job.ticket = self._scheduler.submit(job.sequence, lambda ticket: self._stepped(job))
        if job.sequence.is_finished:
            self._close(job, None)

    def _cancel(self, job: Job, why: str) -> None:
        if job.is_open:
            self.metrics.requests.labels(why).inc()
            self.metrics.cancelled.inc(why == "left")
        if job.ticket is not None:
            self._scheduler.cancel(job.ticket)
        self._close(job, None)

    def _stepped(self, job: Job) -> None:
        try:
            self._step(job)
        except Exception:  # of one answer: the others go on
            self._fail(job)

    def _fail(self, job: Job) -> None:
        """End an answer for the exception that is being handled."""
        _LOG.exception("an answer failed")
        self.metrics.requests.labels("failed").inc()
        if job.ticket is not None:
            self._scheduler.cancel(job.ticket)
        self._close(job, Broken("the model failed in a forward: the server's log says more."))

    def _step(self, job: Job) -> None:
        row, metrics = job.sequence, self.metrics
        metrics.forwards.labels(row.trace[-1].kind).inc()
        metrics.committed.inc(len(row.trace[-1].positions))
        is_new = row.block != job.block
        now = time.perf_counter()
        if is_new:
            (metrics.first_block if not job.blocks else metrics.between_blocks).observe(now - (job.last or job.begin))
            job.last, job.blocks = now, job.blocks + 1
        if job.wants_updates or row.is_finished:
            assert job.block is not None
            job.deliver(self.model.update_of(row, job.block, job.told))
            job.told = row.nfe
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

    def _run(self) -> None:
        try:
            while self._drain():
                try:
                    self._scheduler.tick()
                except Exception:  # a forward failed: the rows in slots are lost, those that wait and the server are not
                    for job in self._jobs():
                        if job.ticket is not None and job.ticket.slot is not None:
                            self._fail(job)
        finally:
            for job in self._jobs():
                self._close(job, Stopping("the server is stopping: try again."))

    def _jobs(self) -> list[Job]:
        with self._lock:
            return list(self._open)

    def _drain(self) -> bool:
        """Follow the commands that wait; with nothing to do, wait for one. False to end."""
        while True:
            self.metrics.queued.set(len(self._scheduler.queue))
            self.metrics.busy.set(sum(row is not None for row in self._scheduler.rows))
            try:
                command = self._commands.get(block=self._scheduler.is_idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            try:
                command()
            except Exception:
                _LOG.exception("a command failed")
