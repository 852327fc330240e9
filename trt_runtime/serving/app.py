"""The routes of an OpenAI-compatible server: check, submit, and turn updates into answers or server-sent
events.

    request -> Sequence -> worker's scheduler -> updates -> text, cut at stop strings -> JSON, or chunks as
    blocks are finished

Every error is OpenAI's: {"error": {"message", "type", "param", "code"}}; 400 names the field that is not
honoured.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from trt_runtime import __version__
from trt_runtime.artifact.manifest import finite
from trt_runtime.errors import BackendError, DllmError
from trt_runtime.model import Model
from trt_runtime.serving.answers import CHAT, TEXT, Answer, ServeOptions, check_count
from trt_runtime.serving.cors import allow
from trt_runtime.serving.errors import Failure, body_of, clipped, headers_of, is_fault, spoken
from trt_runtime.serving.limits import Limits
from trt_runtime.serving.metrics import Metrics
from trt_runtime.serving.neutral import NAMES
from trt_runtime.serving.preparing import Preparing
from trt_runtime.serving.prompts import asked
from trt_runtime.serving.requests import ChatRequest, Common, CompletionRequest
from trt_runtime.serving.room import longest_of
from trt_runtime.serving.streams import Streamed, whole
from trt_runtime.serving.worker import Broken, Worker

STOP_SECONDS = 2.0  # that a forward under way may take at the end
_REFUSALS = {
    400: "a field that is missing, wrong or not honoured",
    401: "no key, or a wrong one",
    403: "another host's name",
    404: "no such model or path",
    408: "the body did not come",
    413: "the body is too large",
    429: "the queue is full",
    500: "a forward failed",
    503: "the server is stopping, or stuck",
    504: "no answer in time",
}
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": said, "content": {"application/json": {"schema": _ERROR}}}
    for status, said in _REFUSALS.items()
}
_STREAMS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "an answer, or with stream: true server-sent events",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}
_TOO_DEEP = "the body is nested too deeply: send a flatter one."
_FIELDS = {*ChatRequest.model_fields, *CompletionRequest.model_fields} - NAMES
_KINDS = ("str", "int", "float", "bool", "Mask", "body")
_PAGE = Path(__file__).with_name("page.html")
# the page is one file: its own style and script, and requests to this server
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)


class _Json(Request):
    """A request whose JSON has no numbers but JSON's: NaN and what is too large for a float are none."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            try:
                self._json = json.loads(body, parse_constant=finite, parse_float=finite)
            except RecursionError:
                raise HTTPException(400, _TOO_DEEP) from None
            except ValueError as error:  # also bytes that are no UTF-8, and numbers of thousands of digits
                raise json.JSONDecodeError(str(error), "", 0) from error
        return self._json


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handled(request: Request) -> Response:
            return await handler(_Json(request.scope, request.receive))

        return handled


def create_app(model: Model, options: ServeOptions) -> FastAPI:
    """The application over an opened model. The worker lives from startup to shutdown. Raises DllmError."""
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
    app.router.route_class = _Route
    app.state.worker = worker
    _document(app, options.name)
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
    _errors(app, metrics)
    app.state.trouble = lambda: _trouble(worker, options, preparing)
    _status(app, worker, options)
    _models(app, options, metrics)
    _completions(app, worker, options, preparing)
    return app


def most_open(options: ServeOptions) -> int:
    """Requests that may be open at a time: those that have a place, and some that are refused."""
    return 256 + 4 * (options.slots + options.most_queued)


def _document(app: FastAPI, name: str) -> None:
    """The OpenAPI document says what is answered: this model, refusals in OpenAI's form, and not FastAPI's
    422."""
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


def _problem(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse(body_of(status, message, param, code), status, dict(headers_of(status)))


def _errors(app: FastAPI, metrics: Metrics) -> None:
    def answer(
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        more: Mapping[str, str] | None = None,
    ) -> JSONResponse:
        metrics.errors.labels(str(status)).inc()
        made = _problem(status, message, param, code)
        made.headers.update(more or {})
        return made

    @app.exception_handler(Broken)
    async def broken(request: Request, error: Broken) -> JSONResponse:
        return answer(error.status, str(error))

    @app.exception_handler(Failure)
    async def failure(request: Request, error: Failure) -> JSONResponse:
        return answer(error.status, error.message, error.param, error.code)

    @app.exception_handler(BackendError)
    async def failed(request: Request, error: BackendError) -> JSONResponse:
        return answer(500, spoken(error))

    @app.exception_handler(DllmError)
    async def refused(request: Request, error: DllmError) -> JSONResponse:
        return answer(400, spoken(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(400, *_said(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), more=error.headers)

    @app.exception_handler(MemoryError)
    async def memory(request: Request, error: MemoryError) -> JSONResponse:
        return answer(503, "the server has no memory for this request: ask for less, or try again later.")

    @app.exception_handler(RecursionError)
    async def deep(request: Request, error: RecursionError) -> JSONResponse:
        return answer(400, _TOO_DEEP)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        return answer(500, f"the server failed ({type(error).__name__}): its log says more.")


def _said(error: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with a body, and the field."""
    found = error.errors()
    # ours says more than 'should be a valid string', and what lies deepest more than what it stands in might
    # have been instead
    first = max(found, key=lambda one: (one["type"] == "value_error", len(one["loc"])))
    if first["type"] == "json_invalid":
        return "the body is not JSON.", None
    if tuple(first["loc"]) == ("body",):
        return "the body is not a JSON object: send one with the fields of the request.", None
    # what stands behind a field's name and places in lists are the kinds that a value may have
    names = [clipped(str(part), 80) for part in first["loc"] if part not in _KINDS and "[" not in str(part)]
    if names and names[0] in NAMES:
        return f"{names[0]}: this server does not honour it: leave it out.", names[0]
    name = ".".join(names) or None
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        said = "this server does not honour it: leave it out"
        if len(names) == 1 and (near := difflib.get_close_matches(names[0], _FIELDS, n=1, cutoff=0.8)):
            return f"{name}: no such field: did you mean '{near[0]}'?", name
    return f"{name or 'the body'}: {said}.", name


def _trouble(worker: Worker, options: ServeOptions, preparing: Preparing) -> str | None:
    """Why no request is answered any more; None while all is well."""
    if not worker.is_alive:
        return "the worker is not running."
    if (taken := worker.longest_forward()) > options.timeout:
        return f"a forward has been running for {taken:.0f} s: start the server again."
    return (
        "the threads that prepare prompts do not end: start the server again." if preparing.is_stuck else None
    )


def _status(app: FastAPI, worker: Worker, options: ServeOptions) -> None:
    @app.get("/health", responses=_RESPONSES)
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/ready", responses=_RESPONSES)
    async def ready() -> dict[str, Any]:
        """Whether it takes requests, and answers them."""
        if (trouble := app.state.trouble()) is not None:
            raise Failure(503, trouble)
        return {"status": "ready", "open": worker.num_open, "slots": options.slots}

    @app.get("/version", responses=_RESPONSES)
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _models(app: FastAPI, options: ServeOptions, metrics: Metrics) -> None:
    facts = {"id": options.name, "object": "model", "created": 0, "owned_by": "dllm-trt"}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _POLICY})

    @app.get("/examples", include_in_schema=False)
    async def examples() -> dict[str, Any]:
        """Prompts that the page offers."""
        return {"examples": list(options.examples)}

    @app.get("/metrics", response_class=PlainTextResponse, responses=_RESPONSES)
    async def prometheus() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(metrics.registry).decode(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses=_RESPONSES)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [facts]}

    @app.get("/v1/models/{name:path}", responses=_RESPONSES)
    async def one(name: str) -> dict[str, Any]:
        if not name:
            return await models()
        _check_model(name.removesuffix("/"), options)
        return facts


def _completions(app: FastAPI, worker: Worker, options: ServeOptions, preparing: Preparing) -> None:
    model = worker.model

    async def answered(kind: str, body: Common, request: Request, prompts: int = 1) -> Response:
        check_count(worker, prompts * body.choices)
        rows = await preparing.run(asked, model, body, worker.max_length)
        return await _answer(Answer(kind, body, rows, worker, options), request)

    @app.post("/v1/chat/completions", response_model=None, responses=_RESPONSES | _STREAMS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """A conversation, continued."""
        _check_model(body.model, options)
        if model.tokenizer is None or not model.tokenizer.has_chat_template:
            raise Failure(400, "this model has no chat template: use /v1/completions.", "messages")
        return await answered(CHAT, body, request)

    @app.post("/v1/completions", response_model=None, responses=_RESPONSES | _STREAMS)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """A text, continued; or a gap, or a template, filled."""
        _check_model(body.model, options)
        if (body.prompt is None) == (body.template is None):
            raise Failure(400, "give prompt or template, one of them.", "prompt")
        return await answered(TEXT, body, request, max(1, len(body.prompts())))


def _check_model(name: str | None, options: ServeOptions) -> None:
    if name is not None and name != options.name:
        raise Failure(
            404, f"model is '{name[:80]}', this server has '{options.name}'.", "model", "model_not_found"
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
        raise Broken("the tokenizer failed: the server's log says more.") from error
    finally:
        answer.release()
        for task in (gone, work):
            task.cancel()


async def _until_gone(request: Request) -> None:
    """Until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
