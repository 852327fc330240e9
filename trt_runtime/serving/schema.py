"""The responses of the routes in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

_REFUSALS = {
    400: "a field that is missing, invalid or unsupported",
    401: "the API key is missing or wrong",
    403: "the Host header names another machine",
    404: "no such model or path",
    408: "the body did not arrive in time",
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
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": said, "content": {"application/json": {"schema": _ERROR}}}
    for status, said in _REFUSALS.items()
}
STREAMS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "an answer, or with stream: true server-sent events",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


def describe_responses(app: FastAPI, name: str) -> None:
    """Make the OpenAPI document describe the actual responses: this model's name, errors in OpenAI's form,
    and no 422 of FastAPI."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for operation in (operation for path in document["paths"].values() for operation in path.values()):
            operation["responses"].pop("422", None)
        for schema in document["components"]["schemas"].values():
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"]["enum"] = [name]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
