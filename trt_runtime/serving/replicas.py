"""Several servers behind one address: a front that passes requests on to replicas, which Ray Serve starts,
watches and replaces.

    client -> Front (this process: limits, API key, retries) -> Ray Serve's choice of a replica -> the
    application of app.py

1. A replica that dies takes nothing with it that had not begun to stream: the front asks another one. 2.
SIGHUP replaces the replicas one after another, each when it has answered what it has: a new artifact in the
old place is taken up. 3. Limits hold a replica: each has its slots and its queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException, ReplicaUnavailableError

from trt_runtime.artifact import manifest
from trt_runtime.backends import BACKENDS
from trt_runtime.errors import DllmError
from trt_runtime.serving.errors import encoded, headers_of

METRICS_PATH = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's name for where processes put what they count
_LOG = logging.getLogger(__name__)
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_OBJECT_STORE = 100 << 20  # bytes; nothing large passes through it
_RETRY_SECONDS = 0.2


@dataclass(frozen=True)
class Setup:
    """What a replica opens: an artifact on a backend with its options."""

    artifact: str
    backend: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A request on its way to a replica."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Replica:
    """The application in a process of Ray's. Called with a request, it yields (status, headers), then pieces
    of the body."""

    def __init__(self, setup: Setup, options: Any) -> None:
        from trt_runtime.model import load
        from trt_runtime.serving.app import create_app

        self.app = create_app(load(setup.artifact, setup.backend, **setup.options), options)
        self.app.state.worker.start()

    def check_health(self) -> None:
        """Called by Ray. Raises if this replica is to be replaced."""
        if (trouble := self.app.state.trouble()) is not None:
            raise RuntimeError(trouble)

    async def __call__(self, asked: Asked) -> AsyncIterator[Any]:
        sent: asyncio.Queue[Any] = asyncio.Queue()
        waiting = [{"type": "http.request", "body": asked.body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Any:
            if waiting:
                return waiting.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self.app(_scope(asked), receive, sent.put)
            finally:
                sent.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    yield message["status"], list(message["headers"])
                elif message["body"]:
                    yield message["body"]
            await task
        finally:  # also when the client has left
            gone.set()


def _scope(asked: Asked) -> dict[str, Any]:
    # of this version of ASGI, an application is told of a client that leaves by `receive`
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "root_path": "",
        "query_string": asked.query,
        "headers": asked.headers,
        "client": None,
        "server": None,
        "state": {},
    }


class Front:
    """An ASGI application that passes requests on. `deploy` starts the replicas, or replaces them, and
    returns what is to be called."""

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
            body = (await receive())["body"]  # Limits has the whole of it
            asked = Asked(scope["method"], scope["path"], scope["query_string"], list(scope["headers"]), body)
            self.num_open += 1
            work = asyncio.create_task(self._pass_on(asked, send))
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
        """From startup to shutdown: SIGHUP begins a rolling restart."""
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
            print("the replicas are replaced", file=sys.stderr, flush=True)
        except Exception:
            _LOG.exception("the replicas could not be replaced")

    async def _pass_on(self, asked: Asked, send: Any) -> None:
        """Ask replicas until one has answered; once an answer has begun, what ends it ends it."""
        deadline, begun = time.monotonic() + self.timeout, False
        while True:
            answer = self.handle.remote(asked)
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
                if not begun and head is not None:  # an answer without a body: a redirect
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
                    "a replica was lost in an answer that had %s: %s",
                    "begun" if begun else "not begun",
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
        await send({"type": "http.response.body", "body": b"data: " + _error(500, said) + b"\n\n"})

    async def health(self) -> tuple[int, str, bytes]:
        return 200, "application/json", b'{"status":"ok"}'

    async def ready(self) -> tuple[int, str, bytes]:
        """Whether a replica takes requests."""
        found = (await asyncio.to_thread(serve.status)).applications.get(self.name)
        states = {
            str(state): count
            for one in (found.deployments if found else {}).values()
            for state, count in one.replica_states.items()
        }
        if not states.get("RUNNING"):
            return 503, "application/json", _error(503, "no replica is running: try again.")
        return (
            200,
            "application/json",
            json.dumps({"status": "ready", "open": self.num_open, "replicas": states}).encode(),
        )

    async def metrics(self) -> tuple[int, str, bytes]:
        """What all replicas have counted, the lost ones included."""
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


def _error(status: int, message: str, code: str | None = None) -> bytes:
    return encoded(status, message, code)


async def _send(send: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_error(send: Any, status: int, message: str, code: str | None = None) -> None:
    headers = [
        (b"content-type", b"application/json"),
        *((name.encode(), value.encode()) for name, value in headers_of(status).items()),
    ]
    await _send(send, status, headers, _error(status, message, code))


def run(setup: Setup, options: Any, host: str, port: int, count: int) -> int:
    """Serve with `count` replicas until a signal, on a Ray that is started here, or on the one at
    RAY_ADDRESS. Returns the exit status. Raises DllmError."""
    manifest.load(Path(setup.artifact))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    where = os.environ.get("RAY_ADDRESS", "local")
    try:
        ray.init(
            address=where,
            include_dashboard=False if where == "local" else None,
            logging_level=logging.WARNING,
            object_store_memory=_OBJECT_STORE if where == "local" else None,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise DllmError(
            f"Ray cannot be had at '{where}' ({str(error).splitlines()[0]}): check RAY_ADDRESS, or leave it "
            f"out."
        ) from error
    with tempfile.TemporaryDirectory(prefix="dllm-metrics-") as folder, contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        os.environ[METRICS_PATH] = folder  # before prometheus_client is imported
        needs = _resources(setup, count, options.lanes)
        serve.start(proxy_location="Disabled", logging_config=_QUIET)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        name = f"dllm-trt-{os.getpid()}"
        stack.callback(serve.shutdown if where == "local" else lambda: serve.delete(name))
        return _serve(setup, options, host, port, count, name, needs)


def _resources(setup: Setup, count: int, lanes: int) -> dict[str, float]:
    """What a replica takes of Ray's resources. Raises DllmError where so many do not fit: Ray would wait for
    ever."""
    on_gpu = not BACKENDS.find(setup.backend).is_on_cpu(setup.options)
    kind, each = ("GPU", 1.0) if on_gpu else ("CPU", float(setup.options.get("threads", 1) * lanes))
    have = ray.cluster_resources().get(kind, 0.0)  # type: ignore[no-untyped-call]
    if count * each > have:
        change = "fewer replicas" if on_gpu else "fewer replicas, --lanes or --threads"
        raise DllmError(
            f"{count} replicas take {count * each:g} {kind}s, Ray has {have:g}: ask for {change}."
        )
    return {"num_gpus": 1.0, "num_cpus": 1.0} if on_gpu else {"num_cpus": each}


def _serve(
    setup: Setup, options: Any, host: str, port: int, count: int, name: str, needs: dict[str, float]
) -> int:
    from trt_runtime.serving.app import most_open
    from trt_runtime.serving.cors import allowed
    from trt_runtime.serving.limits import Limits
    from trt_runtime.serving.metrics import Metrics
    from trt_runtime.serving.process import is_local, listen, run_app

    metrics, most = Metrics(), options.slots + options.most_queued
    environment = {METRICS_PATH: os.environ[METRICS_PATH]}
    deployment: Any = serve.deployment(
        Replica,
        num_replicas=count,
        max_ongoing_requests=most,
        max_queued_requests=most,
        health_check_period_s=1,
        logging_config=_QUIET,
        graceful_shutdown_timeout_s=options.timeout,
        ray_actor_options={**needs, "runtime_env": {"env_vars": environment}},
    )
    behind = replace(
        options,
        api_key=None,
        only_local=False,
        cors=(),
        memory_share=options.memory_share / (1 if "num_gpus" in needs else count),
    )  # the front has asked already

    def deploy() -> Any:
        return serve.run(deployment.bind(setup, behind), name=name, route_prefix=None)

    listening = listen(host, port)
    try:
        front = Front(deploy, name, options.timeout)
    except (RayError, RayServeException, RuntimeError) as error:
        raise DllmError(
            f"the replicas do not start ({str(error).strip().splitlines()[-1]}): serve without --ray to see "
            f"why."
        ) from error
    limits = Limits(
        front,
        most_body=options.most_body,
        api_key=options.api_key,
        only_local=is_local(host),
        timeout=options.timeout,
        most_open=most_open(replace(options, slots=count * most, most_queued=0)),
        count=lambda status: metrics.errors.labels(str(status)).inc(),
    )
    said = f"{options.name} ({setup.backend}, {count} replicas of {options.slots} slots)"
    return run_app(allowed(limits, options.cors), listening, said, options, count * most)
