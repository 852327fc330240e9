"""Work before an answer is queued, in threads with a time limit: a chat template is a program that came with
a checkpoint, and a long text takes long to tokenise."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from trt_runtime.errors import DllmError
from trt_runtime.serving.errors import Failure, is_fault

T = TypeVar("T")
MOST_THREADS, SECONDS = 4, 10.0


class _Expired(Exception):
    """Raised inside a thread that has run out of time."""


class Preparing:
    """At most `most` threads, each for at most `seconds`. A thread that takes longer is stopped in its Python
    code; one that cannot be stopped keeps its place, and `is_stuck` is true once such threads have taken all
    places."""

    def __init__(self, most: int = MOST_THREADS, seconds: float = SECONDS) -> None:
        self.most, self.seconds = most, seconds
        self._places = asyncio.Semaphore(most)
        self._late: set[threading.Thread] = set()

    @property
    def is_stuck(self) -> bool:
        return sum(thread.is_alive() for thread in self._late) >= self.most

    async def run(self, function: Callable[..., T], *given: Any) -> T:
        """Run function(*given) in a thread. Raises what it raises, or Failure if it does not end in time."""
        begin = asyncio.get_running_loop().time()
        try:
            await asyncio.wait_for(self._places.acquire(), self.seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise Failure(503, "the server is busy preparing other prompts: try again later.") from None
        done, thread = self._started(function, given)
        left = self.seconds - (asyncio.get_running_loop().time() - begin)
        try:
            await asyncio.wait({done}, timeout=max(0.1, left))
            if not done.done():
                raise Failure(
                    504, f"the prompt was not prepared within {self.seconds:g} s: shorten it, or try again."
                )
            return done.result()
        finally:
            if not done.done():
                done.cancel()
                self._late = {late for late in self._late if late.is_alive()} | {thread}
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Expired)
                )

    def _started(
        self, function: Callable[..., T], given: tuple[Any, ...]
    ) -> tuple[asyncio.Future[T], threading.Thread]:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def finish(tell: Callable[[Any], None], what: Any) -> None:
            self._places.release()
            if not done.done():
                tell(what)

        def work() -> None:
            tell: tuple[Callable[[Any], None], Any]
            try:
                tell = done.set_result, function(*given)
            except BaseException as error:
                tell = done.set_exception, error if isinstance(error, Exception) else _tamed(error)
            while True:
                with contextlib.suppress(RuntimeError):  # the event loop has ended
                    try:
                        loop.call_soon_threadsafe(finish, *tell)
                    except _Expired:
                        continue
                return

        thread = threading.Thread(target=work, name="dllm-trt prompt", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._places.release()
            raise Failure(503, "no thread is free to prepare the prompt: try again later.") from error
        return done, thread


def _tamed(error: BaseException) -> Exception:
    if is_fault(error):
        return DllmError("the tokenizer failed on this text: change it, or give the prompt as token ids.")
    return RuntimeError(f"{type(error).__name__} in a thread that prepares prompts")
