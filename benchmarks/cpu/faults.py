"""Thousands of hostile requests: good, streamed, abandoned, malformed, too large, out of range, or fuzzed."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
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


async def one_fault(http: httpx.AsyncClient, url: str, rng: random.Random, expected: dict[str, str]) -> str:
    """Send one request of a random kind and return its outcome. Raises AssertionError on a wrong answer."""
    kind = rng.choice(["good", "good", "stream", "leave", "leave stream", "bad", "fuzz"])
    prompt = rng.choice(list(expected))
    where = f"{url}/chat/completions"
    if kind == "bad":
        content, status = rng.choice(BAD)
        raw = content if isinstance(content, bytes) else json.dumps(body_of(prompt) | content).encode()
        answer = await http.post(where, content=raw, headers={"content-type": "application/json"})
        assert answer.status_code == status and answer.json()["error"]["message"], (
            content,
            answer.status_code,
            answer.text[:200],
        )
    elif kind == "fuzz":
        raw = fuzzed(body_of(prompt, max_tokens=8), rng)
        answer = await http.post(
            where.replace("/chat", rng.choice(["", "/chat"])),
            content=raw,
            headers={"content-type": "application/json"},
        )
        assert answer.status_code in (200, 400, 404, 429), (raw[:500], answer.status_code, answer.text[:200])
        assert answer.status_code == 200 or answer.json()["error"]["message"], raw[:500]
    elif kind == "good":
        answer = await http.post(where, json=body_of(prompt))
        if answer.status_code == 429:
            return "full"
        assert answer.json()["choices"][0]["message"]["content"] == expected[prompt], (
            prompt,
            answer.text[:300],
        )
    elif kind == "leave":
        try:
            await http.post(where, json=body_of(prompt, policy="fixed"), timeout=rng.uniform(0.001, 0.05))
        except httpx.TimeoutException:
            return kind
    else:
        text, most = "", rng.randrange(1, 12) if kind == "leave stream" else 10**6
        async with http.stream("POST", where, json=body_of(prompt, stream=True)) as answer:
            if answer.status_code == 429:
                return "full"
            async for line in answer.aiter_lines():
                most -= 1
                if not most:
                    return kind
                if line.startswith("data: {"):
                    text += "".join(
                        choice["delta"].get("content", "") for choice in json.loads(line[6:])["choices"]
                    )
        assert text == expected[prompt], (prompt, text)
    return kind


async def faults(server: Server, expected: dict[str, str], count: int, seed: int) -> dict[str, Any]:
    """Send `count` hostile requests from 16 clients, then check that every slot and the memory are free."""
    rng, seen, wrong, left = random.Random(seed), Counter[str](), [], count

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            try:
                seen[await one_fault(http, server.url, rng, expected)] += 1
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
