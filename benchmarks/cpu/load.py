"""Load and faults on the server: throughput compared with serving one request at a time, and thousands of
hostile requests.

    python benchmarks/cpu/load.py ARTIFACT --prompts FILE                    # throughput and latency
    python benchmarks/cpu/load.py ARTIFACT --prompts FILE --faults 10000     # hostile requests

Throughput: three servers over the same artifact, one with --slots and --lanes, and two that serve one answer
at a time (1 slot), on all cores and on one thread, measured in turn, --repeats times, at 1, 4 and 16 clients.
Each client sends its next request when it has its answer. Medians.

Faults: requests that are good, streamed, abandoned at a random moment, malformed, too large, too long, with
fields out of range, or fuzzed, by 16 clients (faults.py). Every good answer must equal the model's unbatched
answer; the server must stay alive, free all its slots and not grow in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.append(str(Path(__file__).resolve().parents[2]))

from faults import faults
from served import Server, body_of

from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.measure import examples
from trt_runtime.measure.bench import machine
from trt_runtime.model import load

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = (1, 4, 16)
ONE_THREAD = "one at a time, one thread"


async def throughput(url: str, prompts: list[str], clients: int, count: int) -> dict[str, float]:
    """`count` answers by concurrent clients: tokens and answers per second, and ms per answer."""
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
                    sample = asyncio.run(throughput(server.url, prompts, clients, count if repeat else 8))
                    if repeat:
                        samples.setdefault((name, clients), []).append(sample)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, help="the directory that an export wrote")
    parser.add_argument("--prompts", type=Path, required=True, help="a file with one prompt per line")
    parser.add_argument("--slots", type=int, default=16, help="slots of the batched server (default 16)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--count", type=int, default=64, help="answers per round (default 64)")
    parser.add_argument("--faults", type=int, default=0, help="send this many hostile requests instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of the hostile requests (default 0)")
    parser.add_argument("--lanes", type=int, default=2, help="lanes of the batched server (default 2)")
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
