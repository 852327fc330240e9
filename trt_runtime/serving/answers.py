"""One open request: its rows as jobs, and how their updates become an answer or server-sent events
(streams.py)."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trt_runtime import __version__
from trt_runtime.model import Update
from trt_runtime.serving.errors import Failure
from trt_runtime.serving.mailbox import Mailbox
from trt_runtime.serving.prompts import PreparedRows
from trt_runtime.serving.requests import Common
from trt_runtime.serving.room import SHARE
from trt_runtime.serving.stops import Cutter
from trt_runtime.serving.worker import Busy, Event, Job, Worker

CHAT, TEXT = "chat.completion", "text_completion"
SEED_HEADER = "x-dllm-seed"


@dataclass(frozen=True)
class ServeOptions:
    """Options of a server. Times are in seconds, sizes in bytes.

    max_length: tokens of the longest canvas (None: as long as memory allows). api_key: a key, or several,
    that clients must send. cors: origins whose pages may send requests. examples: prompts that the page
    offers. header_seconds, prompt_seconds: time limits for receiving a request's head and for preparing its
    token ids. memory_share: share of the free memory that caches may take. only_local: refuse requests that
    name another host than this machine.
    """

    name: str
    slots: int = 8
    lanes: int = 1
    max_length: int | None = None
    most_queued: int = 64
    api_key: str | tuple[str, ...] | None = None
    most_body: int = 1 << 20
    timeout: float = 300.0
    only_local: bool = False
    cors: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    header_seconds: float = 10.0
    prompt_seconds: float = 10.0
    memory_share: float = SHARE


def check_count(worker: Worker, count: int) -> None:
    """Raise Failure, before any work is done, if a request asks for more answers than slots and queue can
    ever hold together."""
    if count > (most := worker.slots + worker.most_queued):
        raise Failure(
            429,
            f"the request has {count} answers, slots and queue hold {most}: lower n or send fewer prompts.",
            code="queue_full",
        )


class Answer:
    """An open request: its rows as jobs, and how their text becomes an answer."""

    def __init__(
        self, kind: str, body: Common, prepared: PreparedRows, worker: Worker, options: ServeOptions
    ) -> None:
        self.kind, self.body, self.rows, self.seed, self.worker, self.options = (
            kind,
            body,
            prepared.rows,
            prepared.seed,
            worker,
            options,
        )
        self.id = f"{'chatcmpl' if kind == CHAT else 'cmpl'}-{uuid.uuid4().hex[:24]}"
        self.created, self.cutter = int(time.time()), Cutter(body.stops(), worker.model.tokenizer)
        self.jobs: list[Job] = []
        self.mailbox = Mailbox()
        self.done = [(0, 0)] * len(self.rows)  # tokens and forwards of each choice
        self.committed = [0] * len(self.rows)
        self.edits = 0

    def submit(self) -> None:
        """Queue all choices, or none. Raises Failure if the server is full."""
        loop, wants_updates = asyncio.get_running_loop(), self.body.is_stream or bool(self.body.stops())

        def to(index: int) -> Callable[[Event], None]:
            def deliver(event: Event) -> None:
                # the event loop has ended: nobody is listening any more
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(self.mailbox.put, index, event)

            return deliver

        self.jobs = [
            Job(row.sequence, to(index), wants_updates, is_held=True) for index, row in enumerate(self.rows)
        ]
        try:
            self.worker.submit(self.jobs)
        except Busy:
            raise Failure(429, "the queue is full: try again later.", code="queue_full") from None

    def cancel(self, why: str = "left") -> None:
        for job in self.jobs:
            if job.is_open:
                self.worker.cancel(job, why)

    def release(self) -> None:
        """Cancel what is still running, and count the answer as delivered."""
        self.cancel()
        self.worker.release(self.jobs)

    def _count(self, index: int, update: Update, text: str, stopped: bool) -> None:
        """Record the tokens and forwards of a choice. Unless it is finished, another thread still changes the
        row."""
        row, tokenizer = self.rows[index], self.worker.model.tokenizer
        self.committed[index] += len(update.changed) - len(update.edited)
        self.edits += len(update.edited)
        if stopped and tokenizer is not None:
            self.done[index] = (len(tokenizer.encode(text)) if text else 0, update.nfe)
        elif update.finished:
            self.done[index] = (
                row.gaps if row.shown is not None else row.sequence.num_useful,
                row.sequence.nfe,
            )

    def usage(self) -> dict[str, int]:
        """Tokens, forwards (nfe), and the tokens that were committed, which is the number of forwards at one
        token per forward."""
        prompt = sum({row.prompt: row.prompt_tokens for row in self.rows}.values())
        tokens, nfe = sum(tokens for tokens, _ in self.done), sum(nfe for _, nfe in self.done)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "nfe": nfe,
            "committed_tokens": sum(self.committed),
            **({"edits": self.edits} if any(row.sequence.rules.editing for row in self.rows) else {}),
        }

    def show(self, index: int, update: Update) -> tuple[str, bool]:
        """The text of a choice that may be shown, and whether a stop string ended it; the text is counted."""
        text, ids = update.committed or "", update.tokens[: update.settled]
        if (shown := self.rows[index].shown) is not None:
            ids = self.rows[index].sequence.canvas[shown].tolist() if update.finished else []
            text = self.worker.model.tokenizer.decode(ids) if self.worker.model.tokenizer is not None else ""
        text, stopped = self.cutter.cut(text, ids, is_last=update.finished)
        self._count(index, update, text, stopped)
        return text, stopped

    def reason(self, index: int, stopped: bool) -> str:
        row = self.rows[index]
        ended = row.shown is not None or row.sequence.num_useful < row.sequence.rules.gen_length
        return "stop" if stopped or ended else "length"

    def choice(self, index: int, text: str, reason: str | None, *, chunk: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if self.kind == TEXT:
            return choice | {"text": text}
        if chunk:
            return choice | {"delta": {"content": text} if text else {}}
        return choice | {"message": {"role": "assistant", "content": text, "refusal": None}}

    def provisional(self, index: int, update: Update) -> dict[str, Any]:
        """The canvas after a forward: cells (position, text, confidence) of the tokens that it committed."""
        pieces = [self.worker.model.piece(update.tokens[i]) if i >= 0 else "" for i in update.changed]
        return {
            "index": index,
            "committed": update.committed,
            "text": update.provisional,
            "nfe": update.nfe,
            "kind": update.kind,
            "block": list(update.block),
            "length": len(update.tokens),
            "tokens": update.tokens,
            "cells": list(zip(update.changed, pieces, update.confidence, strict=True)),
            **({"edited": update.edited} if update.edited else {}),
        }

    @property
    def fingerprint(self) -> str:
        return f"dllm-trt-{__version__}" + (f"-seed-{self.seed}" if self.seed is not None else "")

    @property
    def headers(self) -> dict[str, str]:
        return {SEED_HEADER: str(self.seed)} if self.seed is not None else {}

    def envelope(self, kind: str, **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.options.name,
            "system_fingerprint": self.fingerprint,
            **more,
        }
