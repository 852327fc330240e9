"""llama.cpp's diffusion example and an artifact on the same prompts, in turn."""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import time
from dataclasses import replace
from typing import Any

from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.measure import examples
from trt_runtime.measure.bench import machine
from trt_runtime.model import load

_TIMES = re.compile(r"total time:\s*([\d.]+)\s*ms.*?time per step:\s*([\d.]+)\s*ms", re.DOTALL)


def compare(args: argparse.Namespace, base: dict[str, int]) -> dict[str, Any]:
    """Tokens per second of llama.cpp and of the artifact: a canvas of the prompt and gen_length, blocks, one
    token per step (llama.cpp has no cache and no threshold), and next to it the artifact's own defaults."""
    for name in ("llama_cpp", "gguf", "artifact", "prompts"):
        if getattr(args, name) is None or not getattr(args, name).exists():
            raise SystemExit(
                f"error: --{name.replace('_', '-')} is {getattr(args, name)}: --parts llama-cpp needs "
                f"--llama-cpp, --gguf, --artifact and --prompts."
            )
    threads = int(args.threads.split(",")[0])
    model, gen, block = load(args.artifact, threads=threads), base["gen_length"], base["block"]
    vanilla = GenerationConfig(
        gen_length=gen, block_length=block, cache="none", policy="fixed", stop_at_eos=False
    )
    configs = {"vanilla": vanilla, "dual, threshold 0.9": replace(vanilla, cache="dual", policy="threshold")}
    rows: dict[str, list[float]] = {name: [] for name in ("llama.cpp", *configs)}
    for prompt in examples.lines_of(args.prompts)[:3]:
        length = len(model.encode(prompt)) + gen
        rows["llama.cpp"].append(gen / _seconds(args, prompt, length, gen, block))
        for name, config in configs.items():
            begin = time.perf_counter()
            model.generate([prompt], config)
            rows[name].append(gen / (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in rows.items()}
    for name, value in medians.items():
        print(f"{name:24} {value:8.1f} tokens/s  {value / medians['llama.cpp']:6.2f} times llama.cpp")
    return {
        "machine": machine(),
        "threads": threads,
        "tokens_per_second": medians,
        "all": rows,
        "settings": {"gen_length": gen, "block_length": block, "gguf": args.gguf.name},
    }


def _seconds(args: argparse.Namespace, prompt: str, length: int, gen: int, block: int) -> float:
    """The seconds that llama.cpp reports for one prompt."""
    canvas = str(-(-length // block) * block)  # llama.cpp accepts only whole blocks
    command = [str(args.llama_cpp), "-m", str(args.gguf), "-p", prompt]
    command += ["-ub", canvas, "-b", canvas, "-c", canvas]
    command += ["--temp", "0", "-t", args.threads.split(",")[0], "--diffusion-algorithm", "4"]
    command += ["--diffusion-block-length", str(block), "--diffusion-steps", str(gen)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    times = _TIMES.search(done.stdout + done.stderr)
    if done.returncode or times is None:
        raise SystemExit(
            f"error: {args.llama_cpp} ended with {done.returncode} and reported no time: "
            f"{(done.stderr or done.stdout)[-300:]!r}"
        )
    return float(times[1]) / 1000
