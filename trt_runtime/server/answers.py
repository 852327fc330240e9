"""One request under way: its rows as jobs, and how their updates become an answer or server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from trt_runtime.model import Update
from trt_runtime.sequence import Sequence
from trt_runtime.server.requests import Common, CompletionRequest, Mask
from trt_runtime.server.worker import Broken, Busy, Event, Job, Worker

CHAT, TEXT = "chat.completion", "text_completion"


@dataclass(frozen=True)
class Options:
    """Of a server. max_length: tokens of the longest canvas (None: the model's). Times in seconds, sizes in bytes."""

    name: str
    slots: int = 8
    lanes: int = 1
    max_length: int | None = None
    most_queued: int = 64
    api_key: str | None = None
    most_body: int = 1 << 20
    timeout: float = 300.0
    only_local: bool = False


class Failure(Exception):
    """An answer of the HTTP status `status`."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclass
class Answer:
    """A request under way: its rows as jobs, and how their text becomes an answer."""

    kind: str
    body: Common
    rows: list[Sequence]
    worker: Worker
    options: Options

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.kind == CHAT else 'cmpl'}-{uuid.uuid4().hex[:24]}"
        self.created, self.stops = int(time.time()), self.body.stops()
        self.jobs: list[Job] = []
        self.queues: list[asyncio.Queue[Event]] = []
        self.done = [(0, 0)] * len(self.rows)  # tokens and forwards of each choice

    def submit(self) -> None:
        """Queue all choices. Raises Failure where the server is full."""
        loop, wants_updates = asyncio.get_running_loop(), self.body.stream or bool(self.stops)
        self.queues = [asyncio.Queue() for _ in self.rows]

        def to(waiting: asyncio.Queue[Event]) -> Callable[[Event], None]:
            def deliver(event: Event) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens any more
                    loop.call_soon_threadsafe(waiting.put_nowait, event)

            return deliver

        self.jobs = [Job(row, to(waiting), wants_updates) for row, waiting in zip(self.rows, self.queues, strict=True)]
        try:
            self.worker.submit(self.jobs)
        except Busy:
            raise Failure(429, "the queue is full: try again later.", code="queue_full") from None

    def cancel(self, why: str = "left") -> None:
        for job in self.jobs:
            if job.is_open:
                self.worker.cancel(job, why)

    @property
    def is_template(self) -> bool:
        return isinstance(self.body, CompletionRequest) and self.body.template is not None

    def _count(self, index: int, update: Update, text: str, stopped: bool) -> None:
        """Count what a choice took. The row itself still changes in another thread, unless it is finished."""
        row, tokenizer = self.rows[index], self.worker.model.tokenizer
        if stopped and tokenizer is not None:
            self.done[index] = (len(tokenizer.encode(text)) if text else 0, update.nfe)
        elif update.finished:
            self.done[index] = (self.gaps if self.is_template else row.num_useful, row.nfe)

    @property
    def gaps(self) -> int:
        """Tokens that a template leaves to fill."""
        template = self.body.template if isinstance(self.body, CompletionRequest) else None
        return sum(part.mask for part in template or [] if isinstance(part, Mask))

    def usage(self) -> dict[str, int]:
        prompt = self.rows[0].prompt_length - self.gaps
        tokens, nfe = sum(tokens for tokens, _ in self.done), sum(nfe for _, nfe in self.done)
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens, "nfe": nfe}

    def show(self, index: int, update: Update) -> tuple[str, bool]:
        """The text of a choice that may be shown, which is counted; and whether a stop string ended it."""
        text, stopped = self._text_of(index, update)
        self._count(index, update, text, stopped)
        return text, stopped

    def _text_of(self, index: int, update: Update) -> tuple[str, bool]:
        """Finished blocks, cut at the first stop string; and whether one was met. Before the end, what may still become a stop string
        or a character is held back."""
        text, is_last = update.committed or "", update.finished
        if self.is_template:
            text = self.worker.model.text(self.rows[index].canvas) if is_last else ""
        if not is_last:
            text = text.rstrip("\ufffd")
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], True
        if not is_last:
            sizes = (n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
            text = text[: len(text) - max(sizes, default=0)]
        return text, False

    def reason(self, job: Job, stopped: bool) -> str:
        row = job.sequence
        return "stop" if stopped or self.is_template or row.num_useful < row.rules.gen_length else "length"

    def choice(self, index: int, text: str, reason: str | None, *, chunk: bool) -> dict[str, Any]:
        made: dict[str, Any] = {"index": index, "finish_reason": reason}
        if self.kind == TEXT:
            return made | {"text": text, "logprobs": None}
        return made | (
            {"delta": {"content": text} if text else {}} if chunk else {"message": {"role": "assistant", "content": text}}
        )

    def provisional(self, index: int, update: Update) -> dict[str, Any]:
        """The canvas after a forward: cells are (position, text, confidence) of what it committed."""
        pieces = [self.worker.model.piece(update.tokens[i]) if i >= 0 else "" for i in update.changed]
        return {"index": index, "committed": update.committed, "text": update.provisional, "nfe": update.nfe, "kind": update.kind,
                "block": list(update.block), "length": len(update.tokens), "tokens": update.tokens,
                "cells": list(zip(update.changed, pieces, update.confidence, strict=True))}  # fmt: skip

    def envelope(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.options.name, **more}


async def whole(answer: Answer) -> dict[str, Any]:
    """The answer in one piece. Raises what ended it."""
    choices = []
    for index, job in enumerate(answer.jobs):
        text, stopped = "", False
        async for update in _updates(answer.queues[index]):
            text, stopped = answer.show(index, update)
            if stopped:
                answer.worker.cancel(job, "stop")
                break
        choices.append(answer.choice(index, text, answer.reason(job, stopped), chunk=False))
    return answer.envelope(answer.kind, choices=choices, usage=answer.usage())


async def _updates(waiting: asyncio.Queue[Event]) -> AsyncIterator[Update]:
    """A job's updates until it ends. Raises what ended it."""
    while (event := await waiting.get()) is not None:
        if isinstance(event, Exception):
            raise event
        yield event


async def _merged(answer: Answer) -> AsyncIterator[tuple[int, Update]]:
    """The updates of all choices as they come. Raises what ended one of them, or TimeoutError."""
    pending: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def forward(index: int, waiting: asyncio.Queue[Event]) -> None:
        try:
            async for update in _updates(waiting):
                pending.put_nowait((index, update))
            pending.put_nowait((index, None))
        except Exception as error:
            pending.put_nowait((index, error))

    tasks = [asyncio.create_task(forward(index, waiting)) for index, waiting in enumerate(answer.queues)]
    left, deadline = len(tasks), time.monotonic() + answer.options.timeout
    try:
        while left:
            index, update = await asyncio.wait_for(pending.get(), max(0.0, deadline - time.monotonic()))
            if isinstance(update, Exception):
                raise update
            if update is None:
                left -= 1
            else:
                yield index, update
    finally:
        for task in tasks:
            task.cancel()


async def events(answer: Answer) -> AsyncIterator[str]:
    """Server-sent events: text as blocks are finished, choice by choice as it comes. An error is an event: the status is sent."""
    kind, options = "chat.completion.chunk" if answer.kind == CHAT else TEXT, answer.body.stream_options

    def event(**more: Any) -> str:
        return f"data: {json.dumps(answer.envelope(kind, **more))}\n\n"

    sent, stopped, begun = [""] * len(answer.jobs), [False] * len(answer.jobs), [False] * len(answer.jobs)
    try:
        async for index, update in _merged(answer):
            if answer.kind == CHAT and not begun[index]:  # not before: until now, a lost replica loses nothing
                yield event(choices=[{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            begun[index] = True
            if stopped[index]:
                continue
            job = answer.jobs[index]
            text, stopped[index] = answer.show(index, update)
            if options is not None and options.provisional:
                yield event(choices=[], provisional=answer.provisional(index, update))
            if not text.startswith(sent[index]):
                raise Broken("a token changed text that was sent already: ask without stream.")
            if len(text) > len(sent[index]):
                yield event(choices=[answer.choice(index, text[len(sent[index]) :], None, chunk=True)])
                sent[index] = text
            if stopped[index] or update.finished:
                yield event(choices=[answer.choice(index, "", answer.reason(job, stopped[index]), chunk=True)])
                answer.worker.cancel(job, "stop")
        if options is not None and options.include_usage:
            yield event(choices=[], usage=answer.usage())
        yield "data: [DONE]\n\n"
    except Exception as error:
        is_late = isinstance(error, (TimeoutError, asyncio.TimeoutError))
        message = f"no answer within {answer.options.timeout:g} s" if is_late else str(error)
        answer.worker.metrics.errors.labels("stream").inc()
        answer.cancel("timeout" if is_late else "failed")
        yield f"data: {json.dumps({'error': {'message': message, 'type': 'server_error', 'param': None, 'code': None}})}\n\n"
    finally:  # also when the client leaves
        answer.cancel()
