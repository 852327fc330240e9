"""Updates on their way from a worker's thread to a client that may read slowly: the number of waiting updates
is bounded."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import replace

from trt_runtime.model import Update
from trt_runtime.serving.worker import Event

_MOST, _MOST_TOKENS = 64, 1 << 16  # waiting updates per choice; tokens in them


class Mailbox:
    """Events of an answer's choices, in order. If a choice has many unread updates, later ones are merged
    into the newest: no committed token is lost, only intermediate states. For one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, list[Event]]] = deque()
        self._unread: Counter[int] = Counter()
        self._newest: dict[int, list[Event]] = {}
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, index: int, event: Event) -> None:
        if isinstance(event, Update):
            most = max(1, min(_MOST, _MOST_TOKENS // max(1, len(event.tokens))))
            if self._unread[index] >= most:
                newest = self._newest[index]
                assert isinstance(newest[0], Update)
                newest[0] = _merged(newest[0], event)
                return
            self._unread[index] += 1
        entry = [event]
        self._newest[index] = entry
        self._waiting.append((index, entry))
        self._filled.set()

    async def get(self) -> tuple[int, Update | None]:
        """The next update of a choice, None at its end. Raises the exception that ended one of them."""
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()
        index, (event,) = self._waiting.popleft()
        if isinstance(event, Update):
            self._unread[index] -= 1
        if isinstance(event, Exception):
            raise event
        return index, event


def _merged(old: Update, new: Update) -> Update:
    return replace(
        new,
        changed=old.changed + new.changed,
        confidence=old.confidence + new.confidence,
        edited=old.edited + new.edited,
    )
