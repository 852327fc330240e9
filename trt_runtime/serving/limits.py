"""Limits that apply before a route sees a request, as plain ASGI middleware: who may ask, how many at a time,
how large and how slow a request may be."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Callable
from typing import Any

from trt_runtime.serving.connections import ABORT
from trt_runtime.serving.errors import encoded, headers_of

# how many times the limit is read and discarded, so that a client that reads only after sending gets its
# answer
_DRAINED = 16
_BODY_SECONDS = 30.0
_LATE_SECONDS = 5.0  # after the time limit of an answer: time to send the rest of it
_PUBLIC = {"/", "/health", "/ready"}
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::\d*)?")


class Limits:
    """Answers a body of more than `most_body` bytes with 413, a body that does not arrive with 408, and more
    than `most_open` requests at a time with 503. A request that takes more than `timeout` seconds (and a
    little) after its body arrived is cut off, because its client does not read.

    only_local: refuse requests whose Host header names another machine, because a web page can make such a
    name resolve to this address (DNS rebinding). keys: all paths but _PUBLIC require one of them. count:
    called with the status of every refusal.
    """

    def __init__(
        self,
        app: Any,
        *,
        most_body: int,
        api_key: str | tuple[str, ...] | None,
        only_local: bool,
        count: Callable[[int], None],
        timeout: float = 86_400.0,
        most_open: int = 1 << 16,
    ) -> None:
        self.app, self.most_body, self.only_local, self.count = app, most_body, only_local, count
        self.timeout, self.most_open, self.num_open = timeout, most_open, 0
        self.keys = [key.encode() for key in ((api_key,) if isinstance(api_key, str) else api_key or ())]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self.only_local and not is_local_name(headers.get(b"host", b"").decode("latin-1")):
            said = (
                "this server accepts only requests to localhost: start it with --host to make it reachable "
                "from other machines."
            )
            await self._refuse(send, 403, said)
        elif (
            self.keys
            and scope["path"] not in _PUBLIC
            and not self._has_key(headers.get(b"authorization", b""))
        ):
            said = "the API key is missing or wrong: send 'Authorization: Bearer KEY'."
            await self._refuse(send, 401, said, "invalid_api_key")
        elif self.num_open >= self.most_open and scope["path"] not in _PUBLIC:
            await self._refuse(
                send,
                503,
                f"{self.most_open} requests are already open: try again later.",
                "too_many_requests",
            )
        else:
            self.num_open += 1
            try:
                await self._pass_on(scope, receive, send)
            finally:
                self.num_open -= 1

    async def _pass_on(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            body = await asyncio.wait_for(self._body(receive), _BODY_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):
            await self._refuse(
                send, 408, f"the request body did not arrive within {_BODY_SECONDS:g} s: try again."
            )
            return
        if body is None:
            return
        if len(body) > self.most_body:
            await self._refuse(
                send, 413, f"the request body is larger than {self.most_body} bytes: send a smaller one."
            )
            return
        waiting: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Any:
            return waiting.pop() if waiting else await receive()

        work = asyncio.ensure_future(self.app(_plain(scope), replayed, send))
        try:
            await asyncio.wait({work}, timeout=self.timeout + _LATE_SECONDS)
            if work.done():
                work.result()
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
                if ABORT in scope:
                    scope[ABORT]()
                    await asyncio.sleep(0)  # until the connection has processed it

    def _has_key(self, given: bytes) -> bool:
        scheme, _, key = given.partition(b" ")
        # compare with all of them, so that the time reveals nothing
        equal = [hmac.compare_digest(key.strip(), known) for known in self.keys]
        return scheme.lower() == b"bearer" and any(equal)

    async def _body(self, receive: Any) -> bytes | None:
        """The body; if it is too large, a part that is too large as well; None if the client has
        disconnected."""
        received, size, more = bytearray(), 0, True
        while more and size <= _DRAINED * self.most_body:
            message = await receive()
            if message["type"] != "http.request":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            received += part[: self.most_body + 1 - len(received)]
        return bytes(received)

    async def _refuse(self, send: Any, status: int, message: str, code: str | None = None) -> None:
        self.count(status)
        body = encoded(status, message, code)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.encode(), value.encode()) for name, value in headers_of(status).items()]
        headers += [(b"connection", b"close")] if status in (408, 413, 503) else []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def is_local_name(host: str) -> bool:
    """Whether a Host header names this machine: localhost or a loopback address, with or without a port."""
    match = _HOST.fullmatch(host.strip())
    name = match[1].lower().removesuffix(".") if match else ""
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _plain(scope: Any) -> Any:
    """The request as the routes expect it: the body is JSON whatever its declared type, and HEAD is handled
    as GET, whose body the connection drops."""
    if scope["method"] == "HEAD":
        return scope | {"method": "GET"}
    if scope["method"] != "POST":
        return scope
    others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return scope | {"headers": [*others, (b"content-type", b"application/json")]}
