"""Benchmark of the whole system on a CPU: caches, parallel unmasking and quantised artifacts on ONNX Runtime
compared with eager PyTorch; and how forwards grow with prompt, answer, block, batch and threads, compared
with the machine's own limits.

    python benchmarks/cpu/system.py                   # a random LLaDA of 140 M parameters (make bench)
    python benchmarks/cpu/system.py --parts variants --threads 1 --repeats 3
    python benchmarks/cpu/system.py --parts others --llama-cpp BINARY --official DIR

variants   `dllm-trt bench`: all variants in turn, in one process, medians; two tokens per forward (vanilla:
           one), prompt 256, gen_length 128, blocks of 32
scaling    ms of a prefix pass and a refine step, one size changed at a time, fp32 and w8a8 in turn, with the
           roofline: multiplications at the rate of the machine's own matrix products (measured in the same
           run), or reading the weights at the bandwidth of a copy, whichever takes longer
blocks     `dllm-trt bench` of a random SDAR of 132 M parameters (block-causal, a Qwen3 network) beside the
           same loop on eager PyTorch with its cache: two tokens per forward, blocks of 4 and 32
experts    a random LLaDA-MoE of 290 M parameters, dense, with ONNX Runtime's own operators and in PyTorch;
           forwards by rows and by experts (experts.py)
others     llama.cpp's diffusion example in float32 and 8 bits, and the official Fast-dLLM code in eager
           PyTorch, with the same weights, prompt and schedule (others.py). The binary and the checkout are
           the user's; without --llama-cpp and --official this part is left out
Results: system-*.json under --output; benchmarks/reports/system.py makes the tables and plots of
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import experts
import numpy as np
from machine_rates import peaks

from trt_runtime.artifact.manifest import ModelFacts
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.backend import Window
from trt_runtime.machine import roofline
from trt_runtime.measure.bench import machine

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("variants", "scaling", "blocks", "experts", "others")
BASE = {"prompt": 256, "gen_length": 128, "block": 32, "batch": 1, "threads": 1}
SWEEPS: dict[str, tuple[int, ...]] = {
    "prompt": (64, 256, 512, 1024),
    "gen_length": (64, 128, 256, 512),
    "block": (8, 16, 32, 64, 128),
    "batch": (1, 2, 4, 8),
    "threads": (1, 2),
}
TOKENS_PER_STEP = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--artifact",
        type=Path,
        help="an fp32 artifact (default: a random one of 140 M parameters)",
    )
    parser.add_argument(
        "--parts",
        help=f"comma-separated, of {', '.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--threads", default="1,2", help="thread counts for the variants, one run each (default 1,2)"
    )
    parser.add_argument(
        "--repeats", type=int, default=2, help="interleaved runs of the variants, after a warm-up (default 2)"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the JSON results"
    )
    parser.add_argument("--llama-cpp", type=Path, metavar="BINARY", help="llama.cpp's llama-diffusion-cli")
    parser.add_argument("--official", type=Path, metavar="DIR", help="a checkout of the Fast-dLLM code")
    args = parser.parse_args()
    programs = {"--llama-cpp": args.llama_cpp, "--official": args.official}
    parts = (
        args.parts.split(",")
        if args.parts
        else [*PARTS[:-1], *(["others"] if any(programs.values()) else [])]
    )
    if unknown := [part for part in parts if part not in PARTS]:
        raise SystemExit(f"error: --parts: {unknown[0]}: expected some of {', '.join(PARTS)}.")
    for name, path in programs.items():
        if path is not None and not path.exists():
            raise SystemExit(f"error: {name} {path}: does not exist.")
    if "others" in parts and not any(programs.values()):
        raise SystemExit("error: --parts others: give --llama-cpp BINARY, --official DIR, or both.")
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        if "blocks" in parts:
            blocks(scratch, args.repeats, args.output)
        if "experts" in parts:
            report = {"machine": machine(), **experts.measure(run, scratch, args.repeats, args.output)}
            write(args.output / "system-experts-scaling.json", report)
        if {"variants", "scaling", "others"} & set(parts):
            artifact, quantised = artifacts(args.artifact, scratch)
        if "variants" in parts:
            for threads in args.threads.split(","):
                variants(artifact, quantised, int(threads), args.repeats, args.output)
        if "others" in parts:
            beside(artifact, quantised[0], scratch, args)
        if "scaling" in parts:
            report = {"machine": machine(), "base": BASE, **scaling(artifact, quantised[0])}
            write(args.output / "system-scaling.json", report)


def beside(artifact: Path, quantised: Path, scratch: Path, args: argparse.Namespace) -> None:
    """Other programs, each thread count in a process of its own, because torch keeps its threads."""
    checkpoint = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))["source"]["checkpoint"]
    for threads in args.threads.split(","):
        options = {"checkpoint": checkpoint, "scratch": str(scratch), "threads": int(threads)}
        options |= {"fp32": str(artifact), "w8a8": str(quantised), "repeats": args.repeats}
        options |= {"llama": str(args.llama_cpp or ""), "official": str(args.official or "")}
        options["output"] = str(args.output / f"system-others-{threads}.json")
        run("benchmarks/cpu/others.py", json.dumps(options))


def blocks(scratch: Path, repeats: int, output: Path) -> None:
    """Block-causal decoding at one thread, with stores of their own and fused ones."""
    checkpoint, artifact = str(scratch / "sdar"), str(scratch / "sdar-fp32")
    run("tools/random_checkpoint.py", "--preset", "sdar-140m", checkpoint)
    run("-m", "export", "--checkpoint", checkpoint, "--out", artifact, "--verify", "no")
    for length, variants in (("4", "vanilla,block,block-fused"), ("32", "block,block-fused")):
        run(
            *("-m", "trt_runtime.cli", "bench", artifact, "--threads", "1", "--repeats", str(repeats)),
            *("--prompt-length", "256", "--gen-length", "128", "--block-length", length),
            *("--tokens-per-step", str(TOKENS_PER_STEP), "--count", "1"),
            *("--variants", variants, "--reference", "block,block-fused"),
            *("--output", str(output / f"system-blocks-{length}.json")),
        )


def artifacts(fp32: Path | None, scratch: Path) -> tuple[Path, list[Path]]:
    """An fp32 artifact, and quantised ones of the same checkpoint. The quality gate is off: random
    weights have no quality to lose."""
    checkpoint, artifact = str(scratch / "checkpoint"), fp32 or scratch / "fp32"
    if fp32 is None:
        run("tools/random_checkpoint.py", "--preset", "llada-140m", checkpoint)
        run("-m", "export", "--checkpoint", checkpoint, "--out", str(artifact), "--verify", "no")
    else:
        checkpoint = json.loads((fp32 / "manifest.json").read_text(encoding="utf-8"))["source"]["checkpoint"]
    quantised = [scratch / scheme for scheme in ("w8a8", "int4")]
    for out in quantised:
        run(
            "-m",
            "export",
            *("--checkpoint", checkpoint, "--out", str(out), "--verify", "no"),
            *("--quantize", out.name, "--gate", "no"),
        )
    return artifact, quantised


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{path} written")


def variants(artifact: Path, quantised: list[Path], threads: int, repeats: int, output: Path) -> None:
    sizes = (
        "--prompt-length",
        "256",
        "--gen-length",
        "128",
        "--block-length",
        "32",
        "--tokens-per-step",
        str(TOKENS_PER_STEP),
        "--count",
        "1",
    )
    others = [word for path in quantised for word in ("--beside", str(path))]
    run(
        "-m",
        "trt_runtime.cli",
        "bench",
        str(artifact),
        *sizes,
        *others,
        "--repeats",
        str(repeats),
        "--threads",
        str(threads),
        "--variants",
        "vanilla,none,prefix,dual",
        "--reference",
        "vanilla,none,dual",
        "--reference-dtypes",
        "fp32,bf16",
        "--output",
        str(output / f"system-variants-{threads}.json"),
    )


def scaling(fp32: Path, w8a8: Path) -> dict[str, Any]:
    """One point per size of each sweep and per artifact."""
    rates = {threads: peaks(threads) for threads in SWEEPS["threads"]}
    opened: dict[int, dict[str, OrtBackend]] = {}
    points = []
    for sweep, sizes in SWEEPS.items():
        for size in sizes:
            at = BASE | {sweep: size}
            backends = opened.setdefault(
                at["threads"], {path.name: OrtBackend(path, threads=at["threads"]) for path in (fp32, w8a8)}
            )
            for name, figures in forwards(backends, at).items():
                facts, quantised = (
                    backends[name].manifest.model,
                    backends[name].manifest.quantization is not None,
                )
                points.append(
                    {
                        "sweep": sweep,
                        **at,
                        "artifact": "w8a8" if quantised else "fp32",
                        **figures,
                        **rooflines(facts, at, rates[at["threads"]], quantised),
                    }
                )
                print(points[-1], flush=True)
    return {"rates": rates, "points": points}


def forwards(backends: dict[str, OrtBackend], at: dict[str, int]) -> dict[str, dict[str, float]]:
    """Median ms of a prefix pass and a refine step, and the tokens per second of a whole answer that
    follow from them."""
    length, times = at["prompt"] + at["gen_length"], {name: ([], []) for name in backends}
    rng = np.random.default_rng(0)
    caches = {name: backend.new_cache(at["batch"], length) for name, backend in backends.items()}
    vocabulary = next(iter(backends.values())).manifest.model.vocab_size
    canvas = rng.integers(0, vocabulary // 2, (at["batch"], length))
    for turn in range(4):
        for name, backend in backends.items():
            for kind, (start, end) in enumerate(((0, length), (at["prompt"], at["prompt"] + at["block"]))):
                window = window_of(canvas, start, end, at["prompt"], at["block"])
                call = backend.prefix if kind == 0 else backend.refine
                for _ in range(1 if kind == 0 else 4):
                    begin = time.perf_counter()
                    call(caches[name], slice(0, at["batch"]), window)
                    if turn:  # the first warms up
                        times[name][kind].append(1000 * (time.perf_counter() - begin))
    steps, blocks = -(-at["block"] // TOKENS_PER_STEP), -(-at["gen_length"] // at["block"])
    figures = {}
    for name, kinds in times.items():
        prefix, refine = (statistics.median(kind) for kind in kinds)
        seconds = blocks * (prefix + (steps - 1) * refine) / 1000
        figures[name] = {
            "prefix_ms": prefix,
            "refine_ms": refine,
            "tokens_per_second": at["batch"] * at["gen_length"] / seconds,
        }
    return figures


def window_of(canvas: np.ndarray, start: int, end: int, prompt: int, block: int) -> Window:
    """A call over positions start to end of every canvas, with statistics for the first block."""
    batch, length = canvas.shape
    positions = np.tile(np.arange(start, end), (batch, 1))
    asked = np.tile(np.arange(prompt, prompt + block) - start, (batch, 1))
    return Window(
        canvas[:, start:end].astype(np.int64), positions, np.full(batch, start), np.full(batch, length), asked
    )


def rooflines(
    facts: ModelFacts, at: dict[str, int], rates: dict[str, float], quantised: bool
) -> dict[str, float]:
    """The minimum ms of both forwards at this machine's measured rates: linear layers in the artifact's
    number format, attention in fp32."""
    length, limits = at["prompt"] + at["gen_length"], {}
    for kind, rows in (("prefix", length), ("refine", at["block"])):
        everything = at["batch"] * roofline.flops(facts, rows, length, at["block"])
        linear = at["batch"] * roofline.flops(facts, rows, 0, at["block"])
        compute = linear / rates["int8" if quantised else "fp32"] + (everything - linear) / rates["fp32"]
        embedding = 4 * facts.vocab_size * facts.hidden_size  # only looked-up rows are read
        read = (roofline.weight_bytes(facts) - embedding) / rates["bandwidth"]
        limits[f"{kind}_roofline_ms"] = 1000 * max(compute, read)
    return limits


if __name__ == "__main__":
    main()
