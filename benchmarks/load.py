"""Load and faults on the server: throughput beside one-at-a-time serving, and thousands of hostile requests.

    python benchmarks/load.py artifacts/llada-demo --prompts checkpoints/llada-demo/prompts.txt                # throughput, latency
    python benchmarks/load.py artifacts/llada-demo --prompts checkpoints/llada-demo/prompts.txt --faults 10000 # what must not break it

Throughput: three servers over the same artifact, one with --slots and --lanes, and two that serve one answer
at a time (1 slot), on all cores and on one thread, measured in turn, --repeats times, at 1, 4 and 16 clients;
each client asks again as soon as it has its answer. Medians.

Faults: requests that are good, streamed, left at a random moment, malformed, too large, too long, with fields
out of range, or good ones with values and bytes changed at random, by 16 clients. Every good answer must be
the one that the model gives alone; the server must live, with its slots free and its memory where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

sys.path.append(str(Path(__file__).resolve().parents[1]))

from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.measure import examples
from trt_runtime.measure.bench import machine
from trt_runtime.model import load

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = (1, 4, 16)
ONE_THREAD = "one at a time, one thread"


class Server:
    """`dllm-trt serve` in a process of its own."""

    def __init__(self, artifact: Path, slots: int, *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "trt_runtime.cli",
            "serve",
            str(artifact),
            "--port",
            "0",
            "--name",
            "demo",
            "--slots",
            str(slots),
            "--max-length",
            "256",
            *options,
        ]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"DLLM_API_KEY": ""}
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        found = re.search(r"http://\S+?/v1", line)
        if found is None:
            raise SystemExit(f"error: the server did not start: {line.strip()}")
        self.url = found[0]

    def memory(self) -> float:
        """Resident MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def body_of(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": prompt}], **more}


async def throughput(url: str, prompts: list[str], clients: int, count: int) -> dict[str, float]:
    """`count` answers by so many clients at once: tokens per second, and seconds per answer."""
    taken: list[float] = []
    tokens, waiting = 0, iter([prompts[i % len(prompts)] for i in range(count)])

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal tokens
        for prompt in waiting:
            begin = time.perf_counter()
            answer = await http.post(f"{url}/chat/completions", json=body_of(prompt))
            answer.raise_for_status()
            taken.append(time.perf_counter() - begin)
            tokens += answer.json()["usage"]["completion_tokens"]

    async with httpx.AsyncClient(timeout=120) as http:
        begin = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        seconds = time.perf_counter() - begin
    ordered = sorted(taken)
    return {
        "tokens_per_second": tokens / seconds,
        "answers_per_second": count / seconds,
        "p50_ms": 1000 * ordered[len(ordered) // 2],
        "p95_ms": 1000 * ordered[int(0.95 * (len(ordered) - 1))],
    }


def measure(
    artifact: Path, prompts: list[str], slots: int, repeats: int, count: int, options: list[str]
) -> list[dict[str, Any]]:
    servers = {
        "batched": Server(artifact, slots, *options),
        "one at a time": Server(artifact, 1),
        ONE_THREAD: Server(artifact, 1, "--threads", "1"),
    }
    samples: dict[tuple[str, int], list[dict[str, float]]] = {}
    try:
        for repeat in range(repeats + 1):  # the first round warms up
            for clients in CLIENTS:
                for name, server in servers.items():
                    made = asyncio.run(throughput(server.url, prompts, clients, count if repeat else 8))
                    if repeat:
                        samples.setdefault((name, clients), []).append(made)
    finally:
        for server in servers.values():
            server.stop()
    rows = []
    for (name, clients), taken in samples.items():
        row = {key: statistics.median(sample[key] for sample in taken) for key in taken[0]}
        rows.append(
            {
                "server": name,
                "clients": clients,
                **row,
                "all_tokens_per_second": [s["tokens_per_second"] for s in taken],
            }
        )
    for row in rows:
        for name in ("one at a time", ONE_THREAD):
            base = next(r for r in rows if r["server"] == name and r["clients"] == row["clients"])
            row[f"over {name}"] = row["tokens_per_second"] / base["tokens_per_second"]
    return rows


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
    """A good body, with some values replaced, added or left out, or some bytes changed."""
    made = json.loads(json.dumps(body))
    for _ in range(rng.randrange(1, 4)):
        at = (
            rng.choice([made, made, *(m for m in made.get("messages") or [] if isinstance(m, dict))])
            if isinstance(made.get("messages"), list)
            else made
        )
        if rng.random() < 0.25 and at:
            del at[rng.choice(list(at))]
        else:
            at[rng.choice(FIELDS)] = rng.choice(VALUES)
    raw = bytearray(json.dumps(made).encode())
    for _ in range(rng.choice([0, 0, 0, 1, 8])):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


async def one_fault(http: httpx.AsyncClient, url: str, rng: random.Random, expected: dict[str, str]) -> str:
    """One request of a random kind; what came of it. Raises AssertionError for an answer that is wrong."""
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
    """Hostile requests by 16 clients; then whether everything came back."""
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
        held: dict[str, Any] = {}
        for _ in range(100):
            held = (await http.get(server.url.removesuffix("/v1") + "/ready")).json()
            if held.get("open") == 0:
                break
            await asyncio.sleep(0.1)
    return {
        "requests": count,
        "kinds": dict(seen),
        "wrong": wrong[:20],
        "num_wrong": len(wrong),
        "open_at_the_end": held.get("open"),
        "memory_mib": {"at the start": memory[0], "after a quarter": memory[1], "at the end": memory[2]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, help="the directory that an export wrote")
    parser.add_argument("--prompts", type=Path, required=True, help="a file with one prompt per line")
    parser.add_argument("--slots", type=int, default=16, help="of the batched server (default 16)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--count", type=int, default=64, help="answers of a round (default 64)")
    parser.add_argument("--faults", type=int, default=0, help="instead, this many hostile requests")
    parser.add_argument("--seed", type=int, default=0, help="of the hostile requests")
    parser.add_argument("--lanes", type=int, default=2, help="of the batched server (default 2)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    prompts = [line.strip() for line in examples.lines_of(args.prompts)]
    options = ["--lanes", str(args.lanes)]
    report: dict[str, Any] = {"machine": machine(), "slots": args.slots, "lanes": args.lanes}
    if args.faults:
        model = load(args.artifact)
        expected = {
            prompt: model.generate([prompt], GenerationConfig())[0].text or "" for prompt in prompts[:16]
        }
        server = Server(args.artifact, args.slots, *options)
        try:
            report |= asyncio.run(faults(server, expected, args.faults, args.seed))
        finally:
            report["exit_status"] = server.stop()
    else:
        report["rows"] = measure(args.artifact, prompts, args.slots, args.repeats, args.count, options)
    print(json.dumps(report, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.faults and (report["num_wrong"] or report["open_at_the_end"] or report["exit_status"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
