"""Connections as uvicorn has them, bounded in number and in the time that a request's head may take."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from trt_runtime.server.errors import body_of

ABORT = "dllm_trt.abort"  # of a scope: a function that drops the connection with what is unsent
_RESERVED = 64  # descriptors for files and threads


def protocol(most: int, header_seconds: float) -> type[asyncio.Protocol]:
    """A connection's class: at most `most` at a time, of which the idle ones make room, the oldest first; each request's head within `header_seconds`."""
    return type("Connection", (_Connection,), {"most": most, "header_seconds": header_seconds})


def room_for(most: int) -> int:
    """How many connections to have at a time, of the `most` that are wanted: as many as there are file descriptors for, whose limit is raised."""
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

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.born = self.loop.time()
        if len(self.connections) > self.most and not self._make_room():
            said = json.dumps(body_of(503, f"{self.most} connections are open already: try again later."))
            head = f"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {len(said)}"
            transport.write(f"{head}\r\n\r\n{said}".encode())
            transport.close()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._is_idle and not self.transport.is_closing():
            self._expect_head()  # something came that is no whole head

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope[ABORT] = self.transport.abort

    def on_headers_complete(self) -> None:
        self._head_came()
        super().on_headers_complete()

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
