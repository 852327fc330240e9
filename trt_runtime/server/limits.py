"""What is decided before a route sees a request, as plain ASGI middleware: who may ask, and how large and how slow a body may be."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable
from typing import Any

_DRAINED = 16  # times the limit that is read and thrown away, so that a client which only reads when it has sent gets its answer
_BODY_SECONDS = 30.0
_LOCAL = {"localhost", "127.0.0.1", "[::1]"}
_PUBLIC = {"/", "/health", "/ready"}


class Limits:
    """A body of more than `most_body` bytes is answered with 413, one that does not come with 408. With `only_local`, requests to another
    name than this machine's are refused: a page in a browser may have such a name point here. With `api_key`, all but _PUBLIC ask for it.
    `count` is told the status of every refusal.
    """

    def __init__(self, app: Any, most_body: int, api_key: str | None, only_local: bool, count: Callable[[int], None]) -> None:
        self.app, self.most_body, self.only_local, self.count = app, most_body, only_local, count
        self.key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if (
            self.only_local
            and headers.get(b"host", b"").decode("latin-1").rsplit(":", 1 if b":" in headers.get(b"host", b"") else 0)[0]
            not in _LOCAL
        ):
            await self._refuse(
                send, 403, "this server answers to localhost alone: serve with --host to have it elsewhere.", "permission_error"
            )
            return
        if self.key is not None and scope["path"] not in _PUBLIC and not self._has_key(headers.get(b"authorization", b"")):
            await self._refuse(
                send,
                401,
                "the API key is missing or wrong: send 'Authorization: Bearer KEY'.",
                "authentication_error",
                "invalid_api_key",
            )
            return
        try:
            body = await asyncio.wait_for(self._body(receive), _BODY_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):
            await self._refuse(send, 408, f"the body did not come within {_BODY_SECONDS:g} s.")
            return
        if body is None:
            return
        if len(body) > self.most_body:
            await self._refuse(send, 413, f"the body is larger than {self.most_body} bytes: send less.")
            return
        waiting: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Any:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replayed, send)

    def _has_key(self, given: bytes) -> bool:
        scheme, _, key = given.partition(b" ")
        assert self.key is not None
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key)

    async def _body(self, receive: Any) -> bytes | None:
        """The body; of one that is too large a part that is; None if the client has left."""
        held, size, more = b"", 0, True
        while more and size <= _DRAINED * self.most_body:
            message = await receive()
            if message["type"] != "http.request":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            held = (held + part)[: self.most_body + 1]
        return held

    async def _refuse(
        self, send: Any, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None
    ) -> None:
        self.count(status)
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(b"connection", b"close")] if status in (408, 413) else []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
