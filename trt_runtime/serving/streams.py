"""An answer as one JSON object, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

from trt_runtime.model import Update
from trt_runtime.serving.answers import CHAT, TEXT, Answer
from trt_runtime.serving.errors import body_of, is_fault
from trt_runtime.serving.worker import Broken


async def whole(answer: Answer) -> dict[str, Any]:
    """The answer as one JSON object. Raises what ended it."""
    texts, stopped, left = [""] * len(answer.jobs), [False] * len(answer.jobs), len(answer.jobs)
    while left:
        index, update = await answer.mailbox.get()
        if update is None:
            left -= 1
        elif not stopped[index]:
            texts[index], stopped[index] = answer.show(index, update)
            if stopped[index]:
                answer.worker.cancel(answer.jobs[index], "stop")
    choices = [
        answer.choice(index, text, answer.reason(index, stopped[index]), chunk=False)
        for index, text in enumerate(texts)
    ]
    return answer.envelope(answer.kind, choices=choices, usage=answer.usage())


async def _updates(answer: Answer) -> AsyncIterator[tuple[int, Update]]:
    """The updates of all choices as they arrive. Raises what ended one of them, or TimeoutError."""
    left, deadline = len(answer.jobs), time.monotonic() + answer.options.timeout
    while left:
        index, update = await asyncio.wait_for(answer.mailbox.get(), max(0.0, deadline - time.monotonic()))
        if update is None:
            left -= 1
        else:
            yield index, update


class _Choices:
    """The choices of a stream: what was sent of each."""

    def __init__(self, answer: Answer) -> None:
        count = len(answer.jobs)
        self.answer = answer
        self.sent, self.is_stopped, self.has_begun = [""] * count, [False] * count, [False] * count

    def role(self, index: int) -> list[dict[str, Any]]:
        """The chunk of a chat that names the role, before the first text. It is sent only once there is an
        update: until then, a lost replica's request can be retried."""
        if self.answer.kind != CHAT or self.has_begun[index]:
            return []
        self.has_begun[index] = True
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "finish_reason": None, "logprobs": None}]

    def text(self, index: int, update: Update) -> list[dict[str, Any]]:
        """The chunks of an update: new text, and the reason of the end. Raises Broken for text that changed
        after it was sent."""
        answer = self.answer
        text, self.is_stopped[index] = answer.show(index, update)
        if not text.startswith(self.sent[index]):
            raise Broken("a later token changed text that was already sent: retry without stream.")
        chunks = []
        if len(text) > len(self.sent[index]):
            chunks.append(answer.choice(index, text[len(self.sent[index]) :], None, chunk=True))
            self.sent[index] = text
        if self.is_stopped[index] or update.finished:
            reason = answer.reason(index, self.is_stopped[index])
            chunks.append(answer.choice(index, "", reason, chunk=True))
            answer.worker.cancel(answer.jobs[index], "stop")
        return chunks


async def events(answer: Answer) -> AsyncIterator[str]:
    """Server-sent events: the text of each choice as its blocks are finished. An error is an event too,
    because the status has been sent already."""
    options = answer.body.stream_options
    kind = "chat.completion.chunk" if answer.kind == CHAT else TEXT
    choices = _Choices(answer)

    def event(**more: Any) -> str:
        return f"data: {json.dumps(answer.envelope(kind, **more))}\n\n"

    try:
        async for index, update in _updates(answer):
            for chunk in choices.role(index):
                yield event(choices=[chunk])
            if choices.is_stopped[index]:
                continue
            if options is not None and options.provisional:
                yield event(choices=[], provisional=answer.provisional(index, update))
            for chunk in choices.text(index, update):
                yield event(choices=[chunk])
        if options is not None and options.include_usage:
            yield event(choices=[], usage=answer.usage())
        answer.release()
        yield "data: [DONE]\n\n"
    except BaseException as error:
        if not is_fault(error):
            raise
        yield f"data: {json.dumps(_failed(answer, error))}\n\n"


def _failed(answer: Answer, error: BaseException) -> dict[str, Any]:
    is_late = isinstance(error, (TimeoutError, asyncio.TimeoutError))
    message = f"no answer within {answer.options.timeout:g} s" if is_late else str(error)
    answer.worker.metrics.errors.labels("stream").inc()
    answer.cancel("timeout" if is_late else "failed")
    return body_of(500, message)


class Streamed(StreamingResponse):
    """A response of events, which cancels its answer however it ends, also if the client disconnects before
    the first event."""

    def __init__(self, answer: Answer) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **answer.headers}
        super().__init__(events(answer), media_type="text/event-stream", headers=headers)
        self.answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.release()
