"""A command on a pseudo-terminal, and the terminal itself: pyte, which keeps the screen and what scrolled out
of it."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time

import pyte


class Terminal:
    """A screen of `columns` x `lines`. `feed` takes what a program writes; `text` is everything visible,
    including what scrolled out."""

    def __init__(self, columns=60, lines=10):
        self.screen = pyte.HistoryScreen(columns, lines, history=100_000, ratio=0.5)
        self.stream, self.decoder = pyte.Stream(self.screen), codecs.getincrementaldecoder("utf-8")("replace")
        self.received = ""

    def feed(self, data: bytes) -> None:
        text = self.decoder.decode(data)
        self.received += text
        self.stream.feed(text)

    def rows(self) -> list[str]:
        above = [
            "".join(row[x].data for x in range(max(row, default=-1) + 1)) for row in self.screen.history.top
        ]
        return [row.rstrip() for row in [*above, *self.screen.display]]

    def text(self) -> str:
        return "\n".join(self.rows()).strip("\n")


class Session:
    """A program on a terminal."""

    def __init__(self, *command, columns=60, lines=10, **environment):
        self.terminal = Terminal(columns, lines)
        self.master, slave = pty.openpty()
        self._set_size(columns, lines)
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            close_fds=True,
            start_new_session=True,
            env=inherited | {"TERM": "linux", "OMP_NUM_THREADS": "1"} | environment,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 # so that Ctrl-C and Ctrl-D work
        )
        os.close(slave)

    def _set_size(self, columns, lines):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns, lines):
        """Resize as a window manager does: the terminal first, then the program is notified."""
        self.terminal.screen.resize(lines, columns)
        self._set_size(columns, lines)

    def send(self, text):
        os.write(self.master, text.encode())

    def interrupt(self):
        os.killpg(self.process.pid, signal.SIGINT)

    def until(self, condition, seconds=60):
        """Feed the terminal until `condition(terminal)`, or without a condition until the program ends."""
        deadline = time.monotonic() + seconds
        while not (condition and condition(self.terminal)):
            ready = select.select([self.master], [], [], 0.1)[0]
            try:
                data = os.read(self.master, 1 << 16) if ready else None
            except OSError:  # the program has closed it
                data = b""
            if data == b"":
                break
            self.terminal.feed(data or b"")
            assert time.monotonic() < deadline, self.terminal.text()
        assert condition is None or condition(self.terminal), self.terminal.text()

    def end(self):
        """Wait for the program to end; returns its exit status."""
        self.until(None)
        os.close(self.master)
        return self.process.wait(60)
