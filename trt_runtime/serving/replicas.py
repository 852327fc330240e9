"""Several servers behind one address: a front (front.py) passes requests on to replicas, which Ray Serve
starts, watches and replaces.

    client -> Front (this process: limits, API key, retries) -> Ray Serve's choice of a replica -> the
    application of app.py

1. If a replica dies, its requests that are not yet streaming are retried on another one. 2. SIGHUP replaces
the replicas one after another, each after it has answered its open requests: this is how a new
   artifact at the same path is loaded.
3. Limits are per replica: each has its own slots and queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from trt_runtime.artifact import manifest
from trt_runtime.backends import BACKENDS
from trt_runtime.errors import DllmError
from trt_runtime.serving.front import METRICS_PATH, ForwardedRequest, Front

_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_OBJECT_STORE = 100 << 20  # bytes; nothing large passes through it


@dataclass(frozen=True)
class Setup:
    """What a replica opens: an artifact on a backend with its options."""

    artifact: str
    backend: str
    options: dict[str, Any]


class Replica:
    """The application in a process of Ray's. Called with a request, it yields (status, headers), then pieces
    of the body."""

    def __init__(self, setup: Setup, options: Any) -> None:
        from trt_runtime.model import load
        from trt_runtime.serving.app import create_app

        self.app = create_app(load(setup.artifact, setup.backend, **setup.options), options)
        self.app.state.worker.start()

    def check_health(self) -> None:
        """Called by Ray; raises if this replica must be replaced."""
        if (trouble := self.app.state.trouble()) is not None:
            raise RuntimeError(trouble)

    async def __call__(self, request: ForwardedRequest) -> AsyncIterator[Any]:
        sent: asyncio.Queue[Any] = asyncio.Queue()
        waiting = [{"type": "http.request", "body": request.body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Any:
            if waiting:
                return waiting.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self.app(_scope(request), receive, sent.put)
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
        finally:  # also when the client has disconnected
            gone.set()


def _scope(request: ForwardedRequest) -> dict[str, Any]:
    # in this version of ASGI, `receive` tells an application that its client has disconnected
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "root_path": "",
        "query_string": request.query,
        "headers": request.headers,
        "client": None,
        "server": None,
        "state": {},
    }


def run(setup: Setup, options: Any, host: str, port: int, count: int) -> int:
    """Serve with `count` replicas until a signal, on a Ray started here or the one at RAY_ADDRESS. Returns
    the exit status. Raises DllmError."""
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
            f"cannot connect to Ray at '{where}' ({str(error).splitlines()[0]}): check RAY_ADDRESS, or unset "
            f"it."
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
    """The Ray resources of a replica. Raises DllmError if `count` of them do not fit, because Ray would wait
    for ever."""
    on_gpu = not BACKENDS.find(setup.backend).is_on_cpu(setup.options)
    kind, each = ("GPU", 1.0) if on_gpu else ("CPU", float(setup.options.get("threads", 1) * lanes))
    have = ray.cluster_resources().get(kind, 0.0)  # type: ignore[no-untyped-call]
    if count * each > have:
        change = "fewer replicas" if on_gpu else "fewer replicas, --lanes or --threads"
        raise DllmError(
            f"{count} replicas need {count * each:g} {kind}s, but Ray has {have:g}: use {change}."
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
    )  # the front checks these

    def deploy() -> Any:
        return serve.run(deployment.bind(setup, behind), name=name, route_prefix=None)

    listening = listen(host, port)
    try:
        front = Front(deploy, name, options.timeout)
    except (RayError, RayServeException, RuntimeError) as error:
        raise DllmError(
            f"the replicas could not start ({str(error).strip().splitlines()[-1]}): serve without --ray to "
            f"see why."
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
