"""Files and directories that several processes may write, and that a signal or a crash may interrupt. Linux;
standard library only.

A file is replaced completely or not at all; a process that reads, changes and writes it back holds a lock
while it does. A directory is built next to its destination and moved there in one step.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from trt_runtime.errors import DllmError

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # of renameat2(2)
_UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # a file system or kernel without this rename
_ENDINGS = ("SIGTERM", "SIGHUP", "SIGQUIT")


def end_on_signals() -> None:
    """Let the signals that end a process raise SystemExit, so that unfinished work is cleaned up. Ignored
    signals (nohup) stay ignored; outside the main thread nothing is done."""
    if threading.current_thread() is not threading.main_thread():
        return
    for name in _ENDINGS:
        number = getattr(signal, name)
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    for name in _ENDINGS:  # a second signal does not interrupt the cleanup
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    raise SystemExit(128 + number)


def replace(path: Path, data: bytes) -> None:
    """Write or replace a file, completely or not at all, even after a power loss or with concurrent
    writers."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync(path.parent)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory; other processes that want it wait. On a file system without locks nothing
    is locked."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def sealed(out: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary directory next to `out`, which replaces it when the block succeeds and is removed when it
    fails. Whatever ends the process at whatever moment, `out` is the complete old directory or the complete
    new one. Leftovers of killed processes are removed. Raises DllmError if `out` appeared in the meantime and
    `overwrite` is false."""
    out = resolved(out)
    prefix = f".{out.name}.partial-"
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.parent):  # so that nobody takes the new directory for abandoned
        _remove_abandoned(out.parent, prefix)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        directory = temporary / "artifact"
        directory.mkdir()
        yield directory
        _take_place(directory, out, overwrite)
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


def resolved(path: Path) -> Path:
    """The path with its links resolved. Raises DllmError for circular links."""
    try:
        return path.resolve()
    except (RuntimeError, OSError) as error:  # Python before 3.13: RuntimeError
        raise DllmError(
            f"{path}: contains circular symbolic links ({error}): choose another path."
        ) from error


def _take_place(sealed: Path, out: Path, overwrite: bool) -> None:
    if not _is_there(out):
        try:
            _rename(sealed, out, _NOREPLACE)
            _sync(out.parent)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    if not overwrite and any(out.iterdir()):
        raise DllmError(
            f"{out}: written by another process in the meantime, left unchanged: choose another OUT, or "
            f"add --overwrite."
        )
    _rename(sealed, out, _EXCHANGE)  # the old directory is now where it gets removed
    _sync(out.parent)


def _rename(source: Path, target: Path, flag: int) -> None:
    """renameat2(2); on a file system without it, the same in steps that are undone if one of them fails."""
    number = _renameat2(source, target, flag)
    if number == 0:
        return
    if number not in _UNKNOWN:
        raise OSError(number, os.strerror(number), str(target))
    if flag == _NOREPLACE:
        if _is_there(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)
        return
    aside = source.with_name(source.name + ".old")
    try:
        target.rename(aside)
        source.rename(target)
    except BaseException:
        if _is_there(aside) and not _is_there(target):
            aside.rename(target)
        raise


def _renameat2(source: Path, target: Path, flag: int) -> int:
    """0, or the error number."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return errno.ENOSYS
    done = call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flag))
    return 0 if done == 0 else ctypes.get_errno()


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove temporary directories whose processes, which hold a lock on them, have died."""
    for path in parent.glob(f"{_escaped(prefix)}*"):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _sync(directory: Path) -> None:
    """Make a rename in a directory survive a power loss, if the file system can."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
