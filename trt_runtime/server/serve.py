"""The server as a process: uvicorn over the application. SIGTERM ends it when what is under way has been answered."""

from __future__ import annotations

import signal
import socket
import sys
from dataclasses import replace

import uvicorn

from trt_runtime.errors import DllmError
from trt_runtime.model import Model
from trt_runtime.server.answers import Options
from trt_runtime.server.app import create_app

__all__ = ["Options", "run"]


def run(model: Model, options: Options, host: str, port: int) -> None:
    """Serve until a signal. Raises DllmError where the address cannot be had."""
    only_local = host in ("127.0.0.1", "localhost", "::1")
    try:
        app = create_app(model, replace(options, only_local=only_local))
    except MemoryError as error:
        raise DllmError(
            f"{options.slots} slots do not fit into memory: serve with fewer --slots or a smaller --max-length."
        ) from error
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512)
    except OSError as error:
        raise DllmError(f"cannot listen on {host}:{port} ({error.strerror or error}): give another --host or --port.") from error
    where = f"[{host}]" if ":" in host else host
    print(
        f"{options.name} on http://{where}:{listening.getsockname()[1]}/v1 ({model.backend.name}, {options.slots} slots)",
        file=sys.stderr,
        flush=True,
    )
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn drains, then raises the signal again: the end is a good one
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(options.timeout) + 1, timeout_keep_alive=10,
                            limit_concurrency=256 + 4 * (options.slots + options.most_queued))  # fmt: skip
    uvicorn.Server(config).run(sockets=[listening])
