"""A bound on the body of a request, which is read here: no route sees a part of one."""

from __future__ import annotations

import json
from typing import Any

_DRAINED = 16  # times the limit that is read and thrown away, so that a client which only reads when it has sent gets its answer


class Limits:
    """ASGI middleware: a body of more than `most_body` bytes is answered with 413 and not kept."""

    def __init__(self, app: Any, most_body: int) -> None:
        self.app, self.most_body = app, most_body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held, size, more = b"", 0, True
        while more and size <= _DRAINED * self.most_body:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has left
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            held = held + part if size <= self.most_body else b""
        if size > self.most_body:
            await self._refuse(send)
            return
        waiting: list[Any] = [{"type": "http.request", "body": held, "more_body": False}]

        async def replayed() -> Any:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replayed, send)

    async def _refuse(self, send: Any) -> None:
        message = f"the body is larger than {self.most_body} bytes: send less."
        body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})
