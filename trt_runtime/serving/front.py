"""The front of a server with replicas: an ASGI application that passes requests on, and asks another replica
if one is lost."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException, ReplicaUnavailableError

from trt_runtime.serving.errors import encoded, headers_of

# prometheus_client's name for the directory where processes store their counts
METRICS_PATH = "PROMETHEUS_MULTIPROC_DIR"
_LOG = logging.getLogger(__name__)
_RETRY_SECONDS = 0.2


@dataclass(frozen=True)
class ForwardedRequest:
    """A request on its way to a replica."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Front:
    """An ASGI application that forwards requests to replicas. deploy: starts or replaces the replicas, and
    returns the handle to call."""

    def __init__(self, deploy: Callable[[], Any], name: str, timeout: float) -> None:
        self.deploy, self.name, self.timeout = deploy, name, timeout
        self.handle = deploy().options(stream=True)
        self.num_open = 0
        self._restart: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["path"] in _OWN:
            status, kind, body = await _OWN[scope["path"]](self)
            await _send(send, status, [(b"content-type", kind.encode())], body)
        else:
            body = (await receive())["body"]  # Limits has already received all of it
            request = ForwardedRequest(
                scope["method"], scope["path"], scope["query_string"], list(scope["headers"]), body
            )
            self.num_open += 1
            work = asyncio.create_task(self._pass_on(request, send))
            gone = asyncio.create_task(_until_gone(receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    work.result()
            finally:
                self.num_open -= 1
                work.cancel()
                gone.cancel()

    async def _live(self, receive: Any, send: Any) -> None:
        """From startup to shutdown; SIGHUP starts a rolling restart."""
        await receive()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._begin_restart)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    def _begin_restart(self) -> None:
        if self._restart is None or self._restart.done():
            self._restart = asyncio.create_task(self._restarted())

    async def _restarted(self) -> None:
        print("replacing the replicas", file=sys.stderr, flush=True)
        try:
            await asyncio.to_thread(self.deploy)
            print("replaced the replicas", file=sys.stderr, flush=True)
        except Exception:
            _LOG.exception("the replicas could not be replaced")

    async def _pass_on(self, request: ForwardedRequest, send: Any) -> None:
        """Ask replicas until one answers. Once an answer has begun, its failure is final."""
        deadline, begun = time.monotonic() + self.timeout, False
        while True:
            answer = self.handle.remote(request)
            try:
                head: Any = None
                async for part in answer:
                    if head is None:
                        head = part
                        continue
                    if not begun:
                        await send({"type": "http.response.start", "status": head[0], "headers": head[1]})
                        begun = True
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                if not begun and head is not None:  # an answer without a body, such as a redirect
                    await send({"type": "http.response.start", "status": head[0], "headers": head[1]})
                await send({"type": "http.response.body", "body": b""})
                return
            except asyncio.CancelledError:
                answer.cancel()
                raise
            except BackPressureError:
                await _send_error(send, 429, "the queue is full: try again later.", "queue_full")
                return
            except (RayActorError, ReplicaUnavailableError, TaskCancelledError) as error:
                _LOG.warning(
                    "a replica was lost %s its answer: %s",
                    "during" if begun else "before",
                    type(error).__name__,
                )
                if begun or time.monotonic() > deadline:
                    await self._lost(send, begun)
                    return
                await asyncio.sleep(_RETRY_SECONDS)
            except (RayError, RayServeException):
                _LOG.exception("a replica failed")
                await self._lost(send, begun)
                return

    async def _lost(self, send: Any, begun: bool) -> None:
        said = "the replica that answered was lost: try again."
        if not begun:
            await _send_error(send, 503, said)
            return
        await send({"type": "http.response.body", "body": b"data: " + encoded(500, said) + b"\n\n"})

    async def health(self) -> tuple[int, str, bytes]:
        return 200, "application/json", b'{"status":"ok"}'

    async def ready(self) -> tuple[int, str, bytes]:
        """Whether a replica accepts requests."""
        application = (await asyncio.to_thread(serve.status)).applications.get(self.name)
        states = {
            str(state): count
            for one in (application.deployments if application else {}).values()
            for state, count in one.replica_states.items()
        }
        if not states.get("RUNNING"):
            return 503, "application/json", encoded(503, "no replica is running: try again.")
        return (
            200,
            "application/json",
            json.dumps({"status": "ready", "open": self.num_open, "replicas": states}).encode(),
        )

    async def metrics(self) -> tuple[int, str, bytes]:
        """The counts of all replicas, including lost ones."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, multiprocess

        where = Path(os.environ[METRICS_PATH])
        for file in where.glob("gauge_live*.db"):
            if not Path(f"/proc/{(pid := int(file.stem.rsplit('_', 1)[1]))}").exists():
                multiprocess.mark_process_dead(pid, str(where))  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, str(where))  # type: ignore[no-untyped-call]
        return 200, CONTENT_TYPE_LATEST, generate_latest(registry)


_OWN = {"/health": Front.health, "/ready": Front.ready, "/metrics": Front.metrics}


async def _until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_error(send: Any, status: int, message: str, code: str | None = None) -> None:
    headers = [
        (b"content-type", b"application/json"),
        *((name.encode(), value.encode()) for name, value in headers_of(status).items()),
    ]
    await _send(send, status, headers, encoded(status, message, code))
