"""The routes of an OpenAI-compatible server: check, submit, and turn updates into answers or server-sent
events.

    request -> Sequence -> worker's scheduler -> updates -> text, cut at stop strings -> JSON, or chunks as
    blocks are finished

Every error has OpenAI's form: {"error": {"message", "type", "param", "code"}}; 400 names the unsupported or
invalid field.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from trt_runtime import __version__
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.plans import names_for
from trt_runtime.errors import DllmError
from trt_runtime.model import Model
from trt_runtime.serving.answers import CHAT, TEXT, Answer, ServeOptions, check_count
from trt_runtime.serving.cors import allow
from trt_runtime.serving.errors import Failure, is_fault
from trt_runtime.serving.limits import Limits
from trt_runtime.serving.metrics import Metrics
from trt_runtime.serving.preparing import Preparing
from trt_runtime.serving.prompts import prepare
from trt_runtime.serving.refusals import JsonRoute, add_error_handlers
from trt_runtime.serving.requests import ChatRequest, Common, CompletionRequest
from trt_runtime.serving.room import longest_of
from trt_runtime.serving.schema import RESPONSES, STREAMS, describe_responses
from trt_runtime.serving.streams import Streamed, whole
from trt_runtime.serving.worker import Broken, Worker

STOP_SECONDS = 2.0  # time that the current forward may take when the server stops
_PAGE = Path(__file__).with_name("page.html")
# the page is one file: its own style and script, and requests to this server
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)


def create_app(model: Model, options: ServeOptions) -> FastAPI:
    """The application over an opened model. The worker runs from startup to shutdown. Raises DllmError."""
    metrics = Metrics()
    longest = longest_of(model, options.slots, options.max_length, options.memory_share)
    worker = Worker(
        model,
        metrics,
        slots=options.slots,
        max_length=longest,
        most_queued=options.most_queued,
        lanes=options.lanes,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop, STOP_SECONDS)

    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        title="dllm-trt",
        version=__version__,
        description=(__doc__ or "").split("\n")[0],
        lifespan=lifespan,
    )
    app.router.route_class = JsonRoute
    app.state.worker = worker
    describe_responses(app, options.name)
    app.add_middleware(
        Limits,
        most_body=options.most_body,
        api_key=options.api_key,
        only_local=options.only_local,
        timeout=options.timeout,
        most_open=most_open(options),
        count=lambda status: metrics.errors.labels(str(status)).inc(),
    )
    allow(app, options.cors)
    preparing = Preparing(seconds=options.prompt_seconds)
    add_error_handlers(app, metrics)
    app.state.trouble = lambda: _trouble(worker, options, preparing)
    _status(app, worker, options)
    _models(app, worker.model, options, metrics)
    _completions(app, worker, options, preparing)
    return app


def most_open(options: ServeOptions) -> int:
    """The number of requests that may be open at a time: those with a slot or a place in the queue, and some
    that are about to be refused."""
    return 256 + 4 * (options.slots + options.most_queued)


def _trouble(worker: Worker, options: ServeOptions, preparing: Preparing) -> str | None:
    """Why requests are no longer answered; None if they are."""
    if not worker.is_alive:
        return "the worker is not running: restart the server."
    if (taken := worker.longest_forward()) > options.timeout:
        return f"a forward has been running for {taken:.0f} s: restart the server."
    return "the threads that prepare prompts are stuck: restart the server." if preparing.is_stuck else None


def _status(app: FastAPI, worker: Worker, options: ServeOptions) -> None:
    @app.get("/health", responses=RESPONSES)
    async def health() -> dict[str, str]:
        """Whether the process is alive."""
        return {"status": "ok"}

    @app.get("/ready", responses=RESPONSES)
    async def ready() -> dict[str, Any]:
        """Whether the server accepts and answers requests."""
        if (trouble := app.state.trouble()) is not None:
            raise Failure(503, trouble)
        return {"status": "ready", "open": worker.num_open, "slots": options.slots}

    @app.get("/version", responses=RESPONSES)
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _caches(model: Model) -> list[str]:
    """The cache plans that decode with this model's other defaults."""
    names = []
    for name in names_for(model.manifest.decoding.attention):
        with contextlib.suppress(DllmError):
            GenerationConfig(cache=name).resolved(model.manifest)
            names.append(name)
    return names


def _models(app: FastAPI, model: Model, options: ServeOptions, metrics: Metrics) -> None:
    facts: dict[str, Any] = {"id": options.name, "object": "model", "created": 0, "owned_by": "dllm-trt"}
    facts["caches"] = _caches(model)  # not OpenAI's: the page offers them

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _POLICY})

    @app.get("/examples", include_in_schema=False)
    async def examples() -> dict[str, Any]:
        """Prompts that the page offers."""
        return {"examples": list(options.examples)}

    @app.get("/metrics", response_class=PlainTextResponse, responses=RESPONSES)
    async def prometheus() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(metrics.registry).decode(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses=RESPONSES)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [facts]}

    @app.get("/v1/models/{name:path}", responses=RESPONSES)
    async def one(name: str) -> dict[str, Any]:
        if not name:
            return await models()
        _check_model(name.removesuffix("/"), options)
        return facts


def _completions(app: FastAPI, worker: Worker, options: ServeOptions, preparing: Preparing) -> None:
    model = worker.model

    async def answered(kind: str, body: Common, request: Request, prompts: int = 1) -> Response:
        check_count(worker, prompts * body.choices)
        rows = await preparing.run(prepare, model, body, worker.max_length)
        return await _answer(Answer(kind, body, rows, worker, options), request)

    @app.post("/v1/chat/completions", response_model=None, responses=RESPONSES | STREAMS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation."""
        _check_model(body.model, options)
        if model.tokenizer is None or not model.tokenizer.has_chat_template:
            raise Failure(400, "this model has no chat template: use /v1/completions.", "messages")
        return await answered(CHAT, body, request)

    @app.post("/v1/completions", response_model=None, responses=RESPONSES | STREAMS)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue a text, or fill a gap or a template."""
        _check_model(body.model, options)
        if (body.prompt is None) == (body.template is None):
            raise Failure(400, "expected either prompt or template, not both or neither.", "prompt")
        return await answered(TEXT, body, request, max(1, len(body.prompts())))


def _check_model(name: str | None, options: ServeOptions) -> None:
    if name is not None and name != options.name:
        raise Failure(
            404,
            f"model is '{name[:80]}', but this server has only '{options.name}'.",
            "model",
            "model_not_found",
        )


async def _answer(answer: Answer, request: Request) -> Response:
    answer.submit()
    if answer.body.is_stream:
        return Streamed(answer)
    gone = asyncio.create_task(_until_gone(request))
    work = asyncio.create_task(whole(answer))
    try:
        await asyncio.wait({gone, work}, timeout=answer.options.timeout, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return JSONResponse(work.result(), headers=answer.headers)
        if not gone.done():
            answer.cancel("timeout")
        raise Failure(
            499 if gone.done() else 504,
            f"no answer within {answer.options.timeout:g} s: lower max_tokens, or try again.",
        )
    except BaseException as error:
        if isinstance(error, Exception) or not is_fault(error):
            raise
        raise Broken("the tokenizer failed: see the server's log.") from error
    finally:
        answer.release()
        for task in (gone, work):
            task.cancel()


async def _until_gone(request: Request) -> None:
    """Wait until the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
