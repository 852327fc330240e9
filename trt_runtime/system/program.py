"""How every command begins and ends: usable standard streams, and errors of one line.

Imports nothing heavy, so that an interrupt during the imports of a command is one line too.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from trt_runtime.errors import DllmError

INTERRUPTED = 130


def run(
    work: Callable[[list[str] | None], int],
    argv: list[str] | None,
    *,
    aftermath: str = "",
    advice: str = "check the path, disk space and permissions",
) -> int:
    """Run a command; returns the exit status: 0 success, 1 a mismatch or an error, 2 wrong usage, 130
    interrupted. work: receives argv and returns the status. aftermath: what an interrupt leaves behind, in
    words. advice: for errors of the operating system."""
    try:
        _open_standard_streams()
        status = work(argv)
        sys.stdout.flush()
        if argv is None:
            _ignore_ctrl_c()
        return status
    except SystemExit:
        raise
    except BaseException as error:  # Rust's panics are not Exceptions
        if any(isinstance(cause, KeyboardInterrupt) for cause in chain_of(error)):
            return _interrupted(aftermath, is_process=argv is None)
        said = _said(error, advice)
        if said is None:
            raise
        if said:
            _complain(f"error: {said}")
        return 1


def _said(error: BaseException, advice: str) -> str | None:
    """The message for an error, in one line; empty if the reader of the output is gone; None for a bug of
    this program."""
    text, said = " ".join(str(error).split()), None
    if isinstance(error, BrokenPipeError):
        said = ""
    elif isinstance(error, DllmError):
        said = text
    elif (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or _ran_out(error, text)
    ):
        about = f" ({text[:200]})" if text else ""
        said = f"out of memory{about}: lower the lengths, the batch or the slots, or use a larger machine."
    elif isinstance(error, UnicodeError):
        said = f"cannot read or write a text ({text}): use UTF-8 (PYTHONUTF8=1)."
    elif isinstance(error, OSError):
        where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else "output"
        said = f"{where}: {error.strerror or text}: {advice}."
    elif (
        isinstance(error, RuntimeError) and "Symlink loop" in text
    ):  # what pathlib makes of ELOOP before Python 3.13
        where = text.removeprefix("Symlink loop from ").strip("'")
        said = f"{where}: a circular symbolic link: give another path."
    elif type(error).__name__ == "PanicException":
        said = (
            f"a Rust library failed ({text[:200]}): it cannot process this text or tokenizer.json: try "
            f"another one."
        )
    return said


def _ran_out(error: BaseException, text: str) -> bool:
    """Whether a library's message says that memory ran out."""
    words = ("bad_alloc", "Failed to allocate memory", "can't allocate memory", "out of memory")
    return isinstance(error, Exception) and any(word.lower() in text.lower() for word in words)


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


@contextlib.contextmanager
def importing(*, at_once: bool = False) -> Iterator[None]:
    """A context for heavy imports: a Ctrl-C inside it takes effect after it, because C++ libraries abort if
    an exception interrupts their import. at_once: end the process instead; only if there is nothing to clean
    up yet."""
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        if at_once:
            _complain("interrupted")
            os._exit(INTERRUPTED)
        came.append(number)

    is_ours = gets_ctrl_c()
    if is_ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def gets_ctrl_c() -> bool:
    """Whether Ctrl-C raises KeyboardInterrupt here, so that it may be handled differently: in the main
    thread, if nobody else handles it."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _interrupted(aftermath: str, *, is_process: bool) -> int:
    if is_process:
        _ignore_ctrl_c()
    _complain(f"interrupted{f': {aftermath}' if aftermath else ''}")
    return INTERRUPTED


def _ignore_ctrl_c() -> None:
    """At the end of the process: a Ctrl-C now has nothing left to stop."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _complain(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # closed, full or gone: the exit status reports it
        print(line, file=sys.stderr, flush=True)


class _Closed(io.TextIOBase):
    """Replaces a standard stream that was closed before the program began; using it is an error."""

    def __init__(self, what: str, advice: str) -> None:
        self.what, self.advice = what, advice

    def _refuse(self) -> DllmError:
        return DllmError(f"standard {self.what} is closed: {self.advice}.")

    def readline(self, size: int | None = -1) -> str:  # type: ignore[override]
        raise self._refuse()

    def read(self, size: int | None = -1) -> str:
        raise self._refuse()

    def write(self, text: str) -> int:
        raise self._refuse()

    def isatty(self) -> bool:
        return False


def _open_standard_streams() -> None:
    """Replace closed standard streams, so that no file gets their descriptors and receives what libraries
    write there."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(number, True)
        os.close(number)
    if sys.stdin is None:
        sys.stdin = _Closed("input", "redirect a file to it, or give prompts as arguments")
    if sys.stdout is None:
        sys.stdout = _Closed("output", "redirect it to a file, or to /dev/null if nothing is wanted")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 # for as long as the program runs
