"""Connections of uvicorn with limits: how many, and how long and how large the head of a request may be."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from trt_runtime.serving.errors import encoded, headers_of

ABORT = "dllm_trt.abort"  # key in a scope: a function that drops the connection and everything unsent
_RESERVED = 64  # descriptors kept for files and threads
_MOST_HEAD = 64 << 10  # bytes of a head, or of anything else that is not body: extensions of chunks, trailers
_REASONS = {400: "Bad Request", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


def protocol(most: int, header_seconds: float) -> type[asyncio.Protocol]:
    """A connection class that allows at most `most` connections, closing the oldest idle ones to make room,
    and gives each request's head `header_seconds`."""
    return type("Connection", (_Connection,), {"most": most, "header_seconds": header_seconds})


def room_for(most: int) -> int:
    """How many of the `most` connections wanted are possible with the file descriptors there are, after
    raising their limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + 2 * _RESERVED
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, soft - _RESERVED))


class _Connection(HttpToolsProtocol):
    most = 1 << 16
    header_seconds = 10.0
    _deadline: asyncio.TimerHandle | None = None
    _running: Any = (
        None  # the request being answered; if several arrived at once, `cycle` is the last of them
    )
    _pending = 0  # bytes since the last complete head, body part or end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.born = self.loop.time()
        if len(self.connections) > self.most and not self._make_room():
            self._refuse(503, f"{self.most} connections are already open: try again later.")
            return
        self._expect_head()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._pending += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._pending > _MOST_HEAD:
            self._refuse(
                431, f"the request head is larger than {_MOST_HEAD} bytes: send fewer or shorter headers."
            )
        elif self._is_idle:
            self._expect_head()  # something arrived that is not a complete head

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope[ABORT] = self.transport.abort

    def on_headers_complete(self) -> None:
        self._head_came()
        self._pending = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._pending = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "not a valid HTTP/1.1 request: send plain HTTP, without TLS.")

    def _refuse(self, status: int, message: str) -> None:
        """End the connection with an error in OpenAI's form, or without one while another answer is being
        sent."""
        if not self._is_idle:
            self.transport.abort()
            return
        said = encoded(status, message)
        headers = {
            **headers_of(status),
            "connection": "close",
            "content-type": "application/json",
            "content-length": len(said),
        }
        lines = [
            f"HTTP/1.1 {status} {_REASONS[status]}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + said)
        self.transport.close()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self.transport.close)

    def _head_came(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _make_room(self) -> bool:
        others: list[Any] = [other for other in self.connections if other is not self]
        idle = [other for other in others if other._is_idle]
        if idle:
            min(idle, key=lambda other: other.born).transport.abort()
        return bool(idle)
