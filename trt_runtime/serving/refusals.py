"""Exceptions of a request as OpenAI's errors: the handlers, and the description of what is wrong with a
body."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from trt_runtime.artifact.manifest import finite
from trt_runtime.errors import BackendError, DllmError
from trt_runtime.serving.errors import Failure, body_of, clipped, headers_of, spoken
from trt_runtime.serving.metrics import Metrics
from trt_runtime.serving.neutral import NAMES
from trt_runtime.serving.requests import ChatRequest, CompletionRequest
from trt_runtime.serving.worker import Broken

TOO_DEEP = "the body is nested too deeply: send a flatter one."
_FIELDS = {*ChatRequest.model_fields, *CompletionRequest.model_fields} - NAMES
_KINDS = ("str", "int", "float", "bool", "Mask", "body")


class JsonRequest(Request):
    """A request whose JSON contains only finite numbers: NaN and numbers too large for a float are
    refused."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            try:
                self._json = json.loads(body, parse_constant=finite, parse_float=finite)
            except RecursionError:
                raise HTTPException(400, TOO_DEEP) from None
            except ValueError as error:  # also bytes that are not UTF-8, and numbers with thousands of digits
                raise json.JSONDecodeError(str(error), "", 0) from error
        return self._json


class JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handled(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handled


def _problem(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse(body_of(status, message, param, code), status, dict(headers_of(status)))


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    def answer(
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        more: Mapping[str, str] | None = None,
    ) -> JSONResponse:
        metrics.errors.labels(str(status)).inc()
        response = _problem(status, message, param, code)
        response.headers.update(more or {})
        return response

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
        return answer(400, *problem_of(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), more=error.headers)

    @app.exception_handler(MemoryError)
    async def memory(request: Request, error: MemoryError) -> JSONResponse:
        return answer(
            503, "the server is out of memory for this request: make it smaller, or try again later."
        )

    @app.exception_handler(RecursionError)
    async def deep(request: Request, error: RecursionError) -> JSONResponse:
        return answer(400, TOO_DEEP)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        return answer(500, f"the server failed ({type(error).__name__}): see its log.")


def problem_of(error: RequestValidationError) -> tuple[str, str | None]:
    """A description of what is wrong with a body, and the field's name."""
    errors = error.errors()
    # our own messages say more than 'should be a valid string', and the deepest location says more than the
    # alternatives of what contains it
    first = max(errors, key=lambda one: (one["type"] == "value_error", len(one["loc"])))
    if first["type"] == "json_invalid":
        return "the body is not valid JSON.", None
    if tuple(first["loc"]) == ("body",):
        return "the body is not a JSON object: send one with the fields of the request.", None
    # after a field's name and list positions, a location names the kinds that the value may have
    names = [clipped(str(part), 80) for part in first["loc"] if part not in _KINDS and "[" not in str(part)]
    if names and names[0] in NAMES:
        return f"{names[0]}: not supported by this server: remove it.", names[0]
    name = ".".join(names) or None
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        said = "not supported by this server: remove it"
        if len(names) == 1 and (near := difflib.get_close_matches(names[0], _FIELDS, n=1, cutoff=0.8)):
            return f"{name}: no such field: did you mean '{near[0]}'?", name
    return f"{name or 'the body'}: {said}.", name
