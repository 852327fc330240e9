"""The server as a process: uvicorn running the application. On a signal it answers the open requests, up to a
time limit, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from trt_runtime.artifact import manifest as manifests
from trt_runtime.errors import DllmError
from trt_runtime.measure.examples import read
from trt_runtime.model import Model
from trt_runtime.serving import cors
from trt_runtime.serving.answers import ServeOptions
from trt_runtime.serving.app import STOP_SECONDS, create_app, most_open
from trt_runtime.serving.connections import protocol, room_for
from trt_runtime.serving.limits import is_local_name
from trt_runtime.system.program import INTERRUPTED

__all__ = ["ServeOptions", "Server", "cors", "examples", "is_local", "listen", "run", "run_app"]

_LATE_SECONDS = 5.0  # after the time limit of the answers: the process then exits even if something is stuck
_HURRY_SECONDS = 5.0  # the same after a second signal
_KEEP_ALIVE = 10
_MOST_EXAMPLES, _LONGEST_EXAMPLE, _SHOWN = (
    1 << 16,
    1000,
    3,
)  # bytes of a file that is read without being named; characters; prompts on the page


def run(model: Model, options: ServeOptions, host: str, port: int) -> int:
    """Serve until a signal; returns the exit status. Raises DllmError if the address or the memory is not
    available."""
    try:
        app = create_app(model, replace(options, only_local=is_local(host)))
    except MemoryError as error:
        raise DllmError(
            f"could not allocate the caches of {options.slots} slots: serve with fewer --slots or a smaller "
            f"--max-length."
        ) from error
    longest, most = app.state.worker.max_length, model.manifest.model.max_length
    why = (
        ""
        if options.max_length is not None or longest == most
        else f" of the model's {most:,}, limited by half of the free memory"
    )
    said = f"{options.name} ({model.backend.name}, {options.slots} slots of {longest:,} tokens{why})"
    status = run_app(app, listen(host, port), said, options, options.slots + options.most_queued)
    if not app.state.worker.stop(STOP_SECONDS):
        end("a forward is stuck: the process exits without waiting for it")
    return status


def examples(artifact: Path, given: Path | None) -> tuple[str, ...]:
    """Prompts for the page: those of a file with one prompt per line, else of prompts.txt next to the
    artifact's checkpoint, if this machine has it. Raises DllmError for a file that was named and cannot be
    used."""
    file = given
    if file is None:
        source = manifests.load(artifact).source.get("checkpoint")
        file = Path(source) / "prompts.txt" if isinstance(source, str) else None
        if file is None or not file.is_file() or file.stat().st_size > _MOST_EXAMPLES:
            return ()
    try:
        prompts = [example.prompt for example in read(file) if isinstance(example.prompt, str)]
    except DllmError:
        if given is not None:
            raise
        return ()
    return tuple(prompt for prompt in prompts if len(prompt) <= _LONGEST_EXAMPLE)[:_SHOWN]


def is_local(host: str) -> bool:
    """Whether a listening address is reachable from this machine only."""
    return is_local_name(f"[{host}]" if ":" in host else host)


def listen(host: str, port: int) -> socket.socket:
    """A socket listening at an address; port 0 picks a free one. Raises DllmError."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512
        )
    except OSError as error:
        raise DllmError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): give another --host or --port."
        ) from error


def end(said: str) -> None:
    """Exit immediately, with a line on standard error, because something is stuck."""
    print(f"error: {said}.", file=sys.stderr, flush=True)
    os._exit(1)


class Server(uvicorn.Server):
    """Uvicorn's server without tracebacks. The first signal ends it once all requests are answered, at the
    latest after `timeout` seconds; a second SIGINT ends it at once. If threads keep the process alive, it is
    ended a little later."""

    def __init__(self, app: Any, options: ServeOptions) -> None:
        connection = protocol(room_for(4 * most_open(options)), options.header_seconds)
        config = uvicorn.Config(
            app,
            log_level="warning",
            http=connection,
            ws="none",
            timeout_graceful_shutdown=int(options.timeout) + 1,
            timeout_keep_alive=_KEEP_ALIVE,
        )
        super().__init__(config)
        self.timeout, self.is_interrupted = options.timeout, False
        logging.getLogger("uvicorn.error").addFilter(_tells)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        yield  # and no other handler afterwards: the process is ending

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        is_second = self.should_exit and sig == signal.SIGINT
        self.is_interrupted |= sig == signal.SIGINT
        self.should_exit, self.force_exit = True, self.force_exit or is_second
        left = _HURRY_SECONDS if is_second else int(self.timeout) + 1 + _LATE_SECONDS
        timer = threading.Timer(
            left, end, ["a thread or task is stuck: the process exits without waiting for it"]
        )
        timer.daemon = True
        timer.start()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_Calm())
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn skips it then
            await self.lifespan.shutdown()


class _Calm:
    """The event loop's error handler: the same message at most once per second. Without free descriptors,
    every attempt to accept a connection is an error."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        said, now = str(context.get("message")), time.monotonic()
        if now - self.last.get(said, -1.0) >= 1.0:
            self.last = {other: last for other, last in self.last.items() if now - last < 1.0} | {said: now}
            loop.default_exception_handler(context)


def _tells(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's log is worth showing: tasks cancelled at the end are not."""
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    return not isinstance(error, asyncio.CancelledError)


def run_app(app: Any, listening: socket.socket, said: str, options: ServeOptions, most: int) -> int:
    """Serve until a signal, then answer the open requests within the options' timeout. Returns the exit
    status. said: what is served, printed with the address; most: requests that may be open."""
    host, port = listening.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    server = Server(app, replace(options, slots=most, most_queued=0))
    # until uvicorn handles signals, the first one ends the process, and two do not tear its half-built event
    # loop down
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    if not is_local(host) and not options.api_key:
        print(
            f"warning: {where} is open to other machines, and no API key is required: give --api-key, or "
            f"DLLM_API_KEY.",
            file=sys.stderr,
        )
    print(f"http://{where}:{port}/v1 serves {said}", file=sys.stderr, flush=True)
    server.run(sockets=[listening])
    return INTERRUPTED if server.is_interrupted else 0
