"""Progress of long tasks: one line on standard error, rewritten in place, if that is a terminal; nothing
otherwise."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

DELAY = 2.0  # seconds before a task's line appears
_REDRAW, _TICK = 0.1, 1.0  # seconds between two lines, at least and at most

T = TypeVar("T")


class Progress:
    """The progress line of a program. Tasks may be nested: the innermost is shown. quiet: show nothing."""

    def __init__(self, out: TextIO | None = None, *, quiet: bool = False, delay: float = DELAY) -> None:
        self.out = out if out is not None else sys.stderr
        self.delay, self.lock = delay, threading.RLock()
        self.is_shown = not quiet and self.out is not None and self.out.isatty()
        self.tasks: list[Task] = []
        self.has_line, self.last = False, 0.0

    @contextmanager
    def task(self, what: str, total: int | None = None, *, unit: str = "") -> Iterator[Task]:
        """A task that runs inside the block. total: what `advance` counts, in `unit`: 'B' for bytes, '' for
        items."""
        task = self.begin(what, total, unit=unit)
        try:
            yield task
        finally:
            task.end()

    def begin(self, what: str, total: int | None = None, *, unit: str = "") -> Task:
        """A task that runs until its `end`."""
        task = Task(self, what, total, unit)
        with self.lock:
            self.tasks.append(task)
        if self.is_shown:
            threading.Thread(target=self._tick, args=(task,), daemon=True).start()
        return task

    def each(self, items: Collection[T], what: str) -> Iterator[T]:
        """The items, with the number of finished ones shown."""
        with self.task(what, len(items)) as task:
            for item in items:
                yield item
                task.advance()

    def say(self, text: str, out: TextIO | None = None) -> None:
        """Print a line of its own, above the progress line."""
        with self.lock:
            self.clear()
            print(text, file=out, flush=True)

    def clear(self) -> None:
        """Remove the line from the screen."""
        with self.lock:
            if self.has_line:
                self.out.write("\r\x1b[K")
                self.out.flush()
                self.has_line = False

    def draw(self, *, now: bool = False) -> None:
        """Show the innermost task, if it is time to."""
        if not self.is_shown:
            return
        with self.lock:
            moment = time.monotonic()
            task = self.tasks[-1] if self.tasks else None
            if (
                task is None
                or moment - self.tasks[0].began < self.delay
                or (moment - self.last < _REDRAW and not now)
            ):
                return
            from trt_runtime.system.screen import fitted, size_of

            self.last, self.has_line = moment, True
            self.out.write("\r" + fitted(task.line(moment), size_of(self.out)[0] - 1) + "\x1b[K")
            self.out.flush()

    def _tick(self, task: Task) -> None:
        wait = max(0.01, self.delay)
        while not task.ended.wait(wait):
            self.draw(now=True)
            wait = _TICK


class Task:
    """A running task: what it does, how much is done, and since when."""

    def __init__(self, progress: Progress, what: str, total: int | None, unit: str) -> None:
        self.progress, self.what, self.total, self.unit = progress, what, total, unit
        self.done, self.began, self.ended = 0, time.monotonic(), threading.Event()

    def doing(self, what: str) -> None:
        """Set what the task does now."""
        self.what = what
        self.progress.draw()

    def end(self) -> None:
        """The task is finished or abandoned."""
        self.ended.set()
        with self.progress.lock:
            if self in self.progress.tasks:
                self.progress.tasks.remove(self)
            self.progress.clear()

    def advance(self, done: int = 1) -> None:
        """Count further progress."""
        self.done += done
        self.progress.draw()

    def line(self, now: float) -> str:
        """The task in one line, with the seconds since it began."""
        seconds = now - self.began
        if not self.total:
            return f"{self.what} ... {seconds:.0f} s"
        if self.unit == "B":
            rate = f", {self.done / seconds / 1e6:,.0f} MB/s" if seconds > 0 else ""
            done = f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB{rate}"
        else:
            done = f"{self.done} of {self.total}"
        return f"{self.what}: {done} ({100 * self.done // self.total} %), {seconds:.0f} s"


SILENT = Progress(quiet=True)
