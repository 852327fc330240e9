"""The server as a process: uvicorn over the application. SIGTERM ends it when what is under way has been answered."""

from __future__ import annotations

import signal
import socket
import sys
from dataclasses import replace
from typing import Any

import uvicorn

from trt_runtime.errors import DllmError
from trt_runtime.model import Model
from trt_runtime.server.answers import Options
from trt_runtime.server.app import create_app

__all__ = ["Options", "is_local", "listen", "run", "run_app"]


def run(model: Model, options: Options, host: str, port: int) -> None:
    """Serve until a signal. Raises DllmError where the address cannot be had."""
    try:
        app = create_app(model, replace(options, only_local=is_local(host)))
    except MemoryError as error:
        raise DllmError(
            f"{options.slots} slots do not fit into memory: serve with fewer --slots or a smaller --max-length."
        ) from error
    said = f"{options.name} ({model.backend.name}, {options.slots} slots)"
    run_app(app, listen(host, port), said, options.timeout, options.slots + options.most_queued)


def is_local(host: str) -> bool:
    return host in ("127.0.0.1", "localhost", "::1")


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one. Raises DllmError."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512)
    except OSError as error:
        raise DllmError(f"cannot listen on {host}:{port} ({error.strerror or error}): give another --host or --port.") from error


def run_app(app: Any, listening: socket.socket, said: str, timeout: float, most: int) -> None:
    """Serve until a signal, which ends it when what is under way is answered, at the latest after `timeout` s.

    said: what is served, told with the address. most: answers that may be under way.
    """
    host, port = listening.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(timeout) + 1, timeout_keep_alive=10,
                            limit_concurrency=256 + 4 * most)  # fmt: skip
    server = uvicorn.Server(config)
    # before uvicorn listens to signals one ends it at once; afterwards it drains, then raises the signal again: the end is a good one
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    print(f"http://{where}:{port}/v1 serves {said}", file=sys.stderr, flush=True)
    server.run(sockets=[listening])
