"""The routes of an OpenAI-compatible server: check, submit, and turn updates into answers or server-sent events.

    request -> Sequence -> worker's scheduler -> updates -> text, cut at stop strings -> JSON, or chunks as blocks are finished

Every error is OpenAI's: {"error": {"message", "type", "param", "code"}}; 400 names the field that is not honoured.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from trt_runtime import __version__
from trt_runtime.config import GenerationConfig
from trt_runtime.errors import DllmError
from trt_runtime.model import Model
from trt_runtime.sequence import Sequence
from trt_runtime.server.answers import CHAT, TEXT, Answer, Failure, Options, events, whole
from trt_runtime.server.limits import Limits
from trt_runtime.server.metrics import Metrics
from trt_runtime.server.requests import ChatRequest, Common, CompletionRequest, Mask
from trt_runtime.server.worker import Broken, Worker

RETRY_SECONDS = 1
_REFUSALS = {400: "a field that is missing, wrong or not honoured", 401: "no key, or a wrong one", 403: "another host's name", 404: "no such model or path",
             408: "the body did not come", 413: "the body is too large", 429: "the queue is full", 500: "a forward failed", 503: "the server is stopping",
             504: "no answer in time"}  # fmt: skip
_ERROR: dict[str, Any] = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object", "required": ["message", "type"], "properties": {
    "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}}}}  # fmt: skip
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": said, "content": {"application/json": {"schema": _ERROR}}} for status, said in _REFUSALS.items()
}
_STREAMS: dict[int | str, dict[str, Any]] = {200: {"description": "an answer, or with stream: true server-sent events",
                                                   "content": {"application/json": {}, "text/event-stream": {}}}}  # fmt: skip
_KINDS = ("str", "int", "float", "bool", "Mask")
_PAGE = Path(__file__).with_name("page.html")
# the page is one file: its own style and script, and requests to this server
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"


def create_app(model: Model, options: Options) -> FastAPI:
    """The application over an opened model. The worker lives from startup to shutdown."""
    metrics = Metrics()
    longest = min(options.max_length or model.manifest.model.max_length, model.manifest.model.max_length)
    worker = Worker(model, metrics, slots=options.slots, max_length=longest, most_queued=options.most_queued, lanes=options.lanes)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        title="dllm-trt",
        version=__version__,
        description=(__doc__ or "").split("\n")[0],
        lifespan=lifespan,
    )
    app.state.worker = worker
    _document(app, options.name)
    app.add_middleware(Limits, most_body=options.most_body, api_key=options.api_key, only_local=options.only_local,
                       count=lambda status: metrics.errors.labels(str(status)).inc())  # fmt: skip
    _errors(app, metrics)
    _status(app, worker, options, metrics)
    _completions(app, model, worker, options)
    return app


def _document(app: FastAPI, name: str) -> None:
    """The OpenAPI document says what is answered: this model, refusals in OpenAI's form, and not FastAPI's 422."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        for operation in (operation for path in document["paths"].values() for operation in path.values()):
            operation["responses"].pop("422", None)
        for schema in document["components"]["schemas"].values():
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"]["enum"] = [name]
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _problem(failure: Failure, more: Mapping[str, str] | None = None) -> JSONResponse:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(failure.status, "server_error" if failure.status >= 500 else "invalid_request_error")
    message = failure.message.encode("utf-8", "backslashreplace").decode()  # JSON may bring half of a character
    body = {"error": {"message": message, "type": kind, "param": failure.param, "code": failure.code}}
    headers = {"Retry-After": str(RETRY_SECONDS)} if failure.status in (429, 503) else {}
    return JSONResponse(body, failure.status, headers | dict(more or {}))


def _errors(app: FastAPI, metrics: Metrics) -> None:
    def answer(failure: Failure, more: Mapping[str, str] | None = None) -> JSONResponse:
        metrics.errors.labels(str(failure.status)).inc()
        return _problem(failure, more)

    @app.exception_handler(Broken)
    async def broken(request: Request, error: Broken) -> JSONResponse:
        return answer(Failure(error.status, str(error)))

    @app.exception_handler(Failure)
    async def failure(request: Request, error: Failure) -> JSONResponse:
        return answer(error)

    @app.exception_handler(DllmError)
    async def refused(request: Request, error: DllmError) -> JSONResponse:
        return answer(Failure(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return answer(Failure(400, "the body is not JSON."))
        # what stands behind a field's name and places in lists are the kinds that a value may have
        name = (
            ".".join(str(part) for part in first["loc"] if part != "body" and part not in _KINDS and "[" not in str(part)) or None
        )
        kind = "this server does not honour it: leave it out" if first["type"] == "extra_forbidden" else first["msg"]
        said = f"{name or 'the body'}: {kind}."
        return answer(Failure(400, said, name))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(Failure(error.status_code, str(error.detail)), error.headers)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        return answer(Failure(500, f"the server failed ({type(error).__name__}): its log says more."))


def _status(app: FastAPI, worker: Worker, options: Options, metrics: Metrics) -> None:
    facts = {"id": options.name, "object": "model", "created": 0, "owned_by": "dllm-trt"}

    @app.get("/health", responses=_RESPONSES)
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/ready", responses=_RESPONSES)
    async def ready() -> dict[str, Any]:
        """Whether it takes requests."""
        if not worker.is_alive:
            raise Failure(503, "the worker is not running.")
        return {"status": "ready", "open": worker.num_open, "slots": options.slots}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _POLICY})

    @app.get("/metrics", response_class=PlainTextResponse, responses=_RESPONSES)
    async def prometheus() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(metrics.registry).decode(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses=_RESPONSES)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [facts]}

    @app.get("/v1/models/{name}", responses=_RESPONSES)
    async def one(name: str) -> dict[str, Any]:
        if name != options.name:
            raise Failure(404, f"model is '{name[:80]}', this server has '{options.name}'.", "model", "model_not_found")
        return facts


def _completions(app: FastAPI, model: Model, worker: Worker, options: Options) -> None:
    @app.post("/v1/chat/completions", response_model=None, responses=_RESPONSES | _STREAMS)
    async def chat(body: ChatRequest, request: Request) -> JSONResponse | StreamingResponse:
        """A conversation, continued."""
        _check_model(body, options)
        if model.tokenizer is None or not model.tokenizer.has_chat_template:
            raise Failure(400, "this model has no chat template: use /v1/completions.", "messages")
        messages = [{"role": item.role, "content": item.content} for item in body.messages]
        rows = await asyncio.to_thread(_rows, model, messages, body, body.config(model.manifest))
        return await _answer(Answer(CHAT, body, rows, worker, options), request)

    @app.post("/v1/completions", response_model=None, responses=_RESPONSES | _STREAMS)
    async def complete(body: CompletionRequest, request: Request) -> JSONResponse | StreamingResponse:
        """A text, continued; or a template, filled."""
        _check_model(body, options)
        if (body.prompt is None) == (body.template is None):
            raise Failure(400, "give prompt or template, one of them.", "prompt")
        if body.template is not None:
            if body.length() is not None or (body.stream_options is not None and body.stream_options.provisional):
                raise Failure(
                    400,
                    "a template says itself how much is filled, and has no provisional text: leave out max_tokens and provisional.",
                    "template",
                )
            ids = await asyncio.to_thread(_template, model, body.template, worker.max_length)
            rows = _rows(model, ids, body, body.config(model.manifest, infill=True))
        else:
            rows = await asyncio.to_thread(_rows, model, body.prompt, body, body.config(model.manifest))
        return await _answer(Answer(TEXT, body, rows, worker, options), request)


def _check_model(body: Common, options: Options) -> None:
    if body.model != options.name:
        raise Failure(404, f"model is '{body.model[:80]}', this server has '{options.name}'.", "model", "model_not_found")


def _rows(model: Model, prompt: Any, body: Common, config: GenerationConfig) -> list[Sequence]:
    body.stops()
    return [
        model.sequence(prompt, replace(config, seed=config.seed + i), raw=body.__class__ is CompletionRequest)
        for i in range(body.n)
    ]


def _template(model: Model, parts: list[str | Mask], longest: int) -> list[int]:
    """Token ids of a template: fixed text, and as many mask tokens as each gap wants. Raises DllmError."""
    if not any(isinstance(part, Mask) for part in parts):
        raise DllmError('template has no gap: give at least one {"mask": N}.')
    if model.tokenizer is None:
        raise DllmError("this model has no tokenizer: templates need one.")
    mask = model.manifest.decoding.mask_token_id
    ids: list[int] = []
    for part in parts:
        if len(ids) + (part.mask if isinstance(part, Mask) else 0) > longest:
            raise DllmError(f"template has more than {longest} tokens, which is what this server takes: shorten it.")
        ids += [mask] * part.mask if isinstance(part, Mask) else model.tokenizer.encode(part) if part else []
    return ids


async def _answer(answer: Answer, request: Request) -> JSONResponse | StreamingResponse:
    answer.submit()
    if answer.body.stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events(answer), media_type="text/event-stream", headers=headers)
    gone = asyncio.create_task(_until_gone(request))
    work = asyncio.create_task(whole(answer))
    try:
        await asyncio.wait({gone, work}, timeout=answer.options.timeout, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return JSONResponse(work.result())
        if not gone.done():
            answer.cancel("timeout")
        raise Failure(
            499 if gone.done() else 504, f"no answer within {answer.options.timeout:g} s: lower max_tokens, or try again."
        )
    finally:
        answer.cancel()
        for task in (gone, work):
            task.cancel()


async def _until_gone(request: Request) -> None:
    """Until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
