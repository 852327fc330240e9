"""Thousands of hostile requests: good, streamed, abandoned, malformed, too large, out of range, or fuzzed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx
from served import Server, body_of

BAD: list[tuple[bytes | dict[str, Any], int]] = [
    (b"{", 400),
    (b"\x00\xff", 400),
    (b"[" * 5000, 400),
    (b"{" + b" " * (1 << 20) + b"}", 413),
    ({"model": "gpt"}, 404),
    ({"tools": [{}]}, 400),
    ({"max_tokens": 1.5}, 400),
    ({"max_tokens": -1}, 400),
    ({"threshold": 7}, 400),
    (b'{"temperature": NaN}', 400),
    ({"messages": []}, 400),
    ({"n": 99}, 400),
    ({"seed": -3}, 400),
    ({"stop": [""]}, 400),
    ({"cache": "all"}, 400),
    ({"policy": "x" * 1000}, 400),
    ({"messages": [{"role": "user", "content": "clean hall with mop " * 400}]}, 400),
    ({"messages": [{"role": "user", "content": 7}]}, 400),
]
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    3,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "\u0000",
    "\ud800",
    "x" * 3000,
    [],
    [[]],
    ["a"],
    {},
    {"mask": 2},
    {"a": {"b": [1]}},
    2**70,
    0.5,
]
FIELDS = (
    "model",
    "messages",
    "prompt",
    "template",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "threshold",
    "policy",
    "factor",
    "steps",
    "block_length",
    "cache",
    "echo",
    "logprobs",
    "user",
    "tools",
    "role",
    "content",
)


def fuzzed(body: dict[str, Any], rng: random.Random) -> bytes:
    """A valid body with some values replaced, added or removed, or some bytes changed."""
    changed = json.loads(json.dumps(body))
    for _ in range(rng.randrange(1, 4)):
        at = (
            rng.choice([changed, changed, *(m for m in changed.get("messages") or [] if isinstance(m, dict))])
            if isinstance(changed.get("messages"), list)
            else changed
        )
        if rng.random() < 0.25 and at:
            del at[rng.choice(list(at))]
        else:
            at[rng.choice(FIELDS)] = rng.choice(VALUES)
    raw = bytearray(json.dumps(changed).encode())
    for _ in range(rng.choice([0, 0, 0, 1, 8])):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


@dataclass
class Attack:
    """Requests to one server, at random. expected: the answer to each prompt, decoded alone."""

    http: httpx.AsyncClient
    url: str
    rng: random.Random
    expected: dict[str, str]

    async def one(self) -> str:
        """Send one request of a random kind and return its outcome. Raises AssertionError on a wrong
        answer."""
        kinds = {
            "good": self._good,
            "stream": self._stream,
            "leave": self._leave,
            "leave stream": self._leave_stream,
            "bad": self._bad,
            "fuzz": self._fuzz,
        }
        kind = self.rng.choice(["good", *kinds])  # good twice as often
        return await kinds[kind](self.rng.choice(list(self.expected))) or kind

    async def _post(self, raw: bytes, path: str = "/chat/completions") -> httpx.Response:
        return await self.http.post(
            f"{self.url}{path}", content=raw, headers={"content-type": "application/json"}
        )

    async def _good(self, prompt: str) -> str | None:
        answer = await self._post(json.dumps(body_of(prompt)).encode())
        if answer.status_code == 429:
            return "full"
        text = answer.json()["choices"][0]["message"]["content"]
        assert text == self.expected[prompt], (prompt, answer.text[:300])
        return None

    async def _bad(self, prompt: str) -> None:
        content, status = self.rng.choice(BAD)
        raw = content if isinstance(content, bytes) else json.dumps(body_of(prompt) | content).encode()
        answer = await self._post(raw)
        assert answer.status_code == status and answer.json()["error"]["message"], (
            content,
            answer.status_code,
            answer.text[:200],
        )

    async def _fuzz(self, prompt: str) -> None:
        raw = fuzzed(body_of(prompt, max_tokens=8), self.rng)
        answer = await self._post(raw, self.rng.choice(["/completions", "/chat/completions"]))
        assert answer.status_code in (200, 400, 404, 429), (raw[:500], answer.status_code, answer.text[:200])
        assert answer.status_code == 200 or answer.json()["error"]["message"], raw[:500]

    async def _leave(self, prompt: str) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            await self.http.post(
                f"{self.url}/chat/completions",
                json=body_of(prompt, policy="fixed"),
                timeout=self.rng.uniform(0.001, 0.05),
            )

    async def _stream(self, prompt: str) -> str | None:
        text = await self._streamed(prompt, lines=10**6)
        if text is None:
            return "full"
        assert text == self.expected[prompt], (prompt, text)
        return None

    async def _leave_stream(self, prompt: str) -> str | None:
        return "full" if await self._streamed(prompt, self.rng.randrange(1, 12)) is None else None

    async def _streamed(self, prompt: str, lines: int) -> str | None:
        """The text in the first `lines` lines of a stream, after which the client leaves; None for a 429."""
        text, body = "", body_of(prompt, stream=True)
        async with self.http.stream("POST", f"{self.url}/chat/completions", json=body) as answer:
            if answer.status_code == 429:
                return None
            async for line in answer.aiter_lines():
                lines -= 1
                if not lines:
                    return text
                if line.startswith("data: {"):
                    text += "".join(
                        choice["delta"].get("content", "") for choice in json.loads(line[6:])["choices"]
                    )
        return text


async def faults(server: Server, expected: dict[str, str], count: int, seed: int) -> dict[str, Any]:
    """Send `count` hostile requests from 16 clients, then check that every slot and the memory are free."""
    rng, seen, wrong, left = random.Random(seed), Counter[str](), [], count

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            try:
                seen[await Attack(http, server.url, rng, expected).one()] += 1
            except AssertionError as error:
                wrong.append(str(error)[:500])
            except httpx.HTTPError as error:
                wrong.append(f"{type(error).__name__}: {error}")

    memory = [server.memory()]
    async with httpx.AsyncClient(timeout=120) as http:
        for part in (count // 4, count - count // 4):  # the first quarter fills pools and caches
            left = part
            await asyncio.gather(*(client(http) for _ in range(16)))
            memory.append(server.memory())
        ready: dict[str, Any] = {}
        for _ in range(100):
            ready = (await http.get(server.url.removesuffix("/v1") + "/ready")).json()
            if ready.get("open") == 0:
                break
            await asyncio.sleep(0.1)
    return {
        "requests": count,
        "kinds": dict(seen),
        "wrong": wrong[:20],
        "num_wrong": len(wrong),
        "open_at_the_end": ready.get("open"),
        "memory_mib": {"at the start": memory[0], "after a quarter": memory[1], "at the end": memory[2]},
    }
