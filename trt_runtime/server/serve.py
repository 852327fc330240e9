"""The server as a process: uvicorn over the application. SIGTERM ends it when what is under way has been answered."""

from __future__ import annotations

import signal
import socket
import sys

import uvicorn

from trt_runtime.errors import DllmError
from trt_runtime.model import Model
from trt_runtime.server.answers import Options
from trt_runtime.server.app import create_app

__all__ = ["Options", "run"]


def run(model: Model, options: Options, host: str, port: int) -> None:
    """Serve until a signal. Raises DllmError where the address cannot be had."""
    app = create_app(model, options)
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
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(options.timeout) + 1, timeout_keep_alive=10)
    uvicorn.Server(config).run(sockets=[listening])
