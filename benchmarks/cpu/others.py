"""Other programs with the same weights and the same schedule, in turn: llama.cpp's diffusion example, and the
official Fast-dLLM code in eager PyTorch. Both are the user's."""

from __future__ import annotations

import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2]))

from system import BASE, TOKENS_PER_STEP

from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.measure.bench import machine
from trt_runtime.model import Model, load

ROOT = Path(__file__).resolve().parents[2]
_TIME = re.compile(r"total time:\s*([\d.]+)\s*ms")
_TOKEN = re.compile(r"<(\d+)>")
Answer = tuple[float, list[int]]  # seconds of its forwards, and the tokens


@dataclass
class System:
    """A program that is measured: its name, its cache, and how it answers. expected: the tokens that it
    should give. warms_up: whether its first answer does not count; one that starts anew each time does
    not need that."""

    name: str
    cache: str
    answer: Callable[[], Answer]
    expected: Callable[[], list[int]] | None = None
    warms_up: bool = True
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """What all of them do: a prompt of token ids, and gen_length tokens in blocks, a fixed number in each
    step."""

    prompt: list[int]
    gen_length: int
    block: int
    per_step: int
    mask: int
    threads: int

    @property
    def forwards(self) -> int:
        return self.gen_length // self.per_step


def compare(
    checkpoint: Path,
    artifacts: dict[str, Path],
    scratch: Path,
    *,
    llama: Path | None,
    official: Path | None,
    threads: int,
    repeats: int,
) -> dict[str, Any]:
    """Tokens per second of every system, medians of interleaved rounds after one that warms up."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # also of what is started
    models = {name: load(path, threads=threads) for name, path in artifacts.items()}
    facts = models["fp32"].manifest
    words = [token for token in range(1000) if token not in facts.decoding.special_token_ids]
    prompt = np.random.default_rng(0).choice(words, BASE["prompt"]).tolist()
    mask = facts.decoding.mask_token_id
    task = Task(prompt, BASE["gen_length"], BASE["block"], TOKENS_PER_STEP, mask, threads)
    systems = [
        System(f"ONNX Runtime {name}", cache, _ours(model, task, cache))
        for name, model in models.items()
        for cache in ("none", "dual")
    ]
    of = {system.cache: system for system in systems if system.name == "ONNX Runtime fp32"}
    eager = load(artifacts["fp32"], "torch", checkpoint=str(checkpoint), threads=threads)
    systems.append(
        System("PyTorch fp32, eager", "dual", _ours(eager, task, "dual"), lambda: of["dual"].tokens)
    )
    if llama is not None:
        systems += _llama(llama, checkpoint, scratch, task, models["fp32"])
    if official is not None:
        systems += _official(official, checkpoint, task, of)
    for turn in range(repeats + 1):
        for system in systems:
            if not turn and not system.warms_up:
                continue
            seconds, system.tokens = system.answer()
            if turn:
                system.seconds.append(seconds)
            print(f"{system.name}, {system.cache}: {task.gen_length / seconds:.2f} tokens/s", flush=True)
    settings = {**BASE, "per_step": TOKENS_PER_STEP, "threads": threads, "repeats": repeats}
    settings |= {"parameters": facts.model.parameters}
    return {"machine": machine(), "settings": settings, "rows": _rows(systems, task)}


def _rows(systems: list[System], task: Task) -> list[dict[str, Any]]:
    return [
        {
            "system": system.name,
            "cache": system.cache,
            "tokens_per_second": task.gen_length / statistics.median(system.seconds),
            "seconds": [round(value, 3) for value in system.seconds],
            "forwards": task.forwards,
            **_agreement(system),
        }
        for system in systems
    ]


def _agreement(system: System) -> dict[str, int]:
    """How many of its tokens are those that it should give."""
    if system.expected is None:
        return {}
    pairs = zip(system.tokens, system.expected(), strict=True)
    return {"same_tokens": sum(mine == theirs for mine, theirs in pairs), "of": len(system.tokens)}


def _ours(model: Model, task: Task, cache: str, policy: str = "fixed") -> Callable[[], Answer]:
    config = GenerationConfig(
        gen_length=task.gen_length,
        block_length=task.block,
        cache=cache,
        policy=policy,
        steps=task.forwards,
        stop_at_eos=False,
    )

    def answer() -> Answer:
        begin = time.perf_counter()
        (result,) = model.generate([task.prompt], config)
        return time.perf_counter() - begin, list(result.canvas[len(task.prompt) :])

    return answer


def _llama(binary: Path, checkpoint: Path, scratch: Path, task: Task, fp32: Model) -> list[System]:
    """llama.cpp in float32 and in 8 bits, from the checkpoint's own weights. Its example draws tokens even at
    temperature 0; with one candidate it does not, but then finds all of them equally sure and commits from
    left to right. So its tokens are compared with those of that order."""

    def expected() -> list[int]:
        return _ours(fp32, task, "none", "sequential")()[1]

    systems = []
    for kind in ("f32", "q8_0"):
        file = scratch / f"{kind}.gguf"
        if not file.exists():
            command = [sys.executable, "tools/gguf_from_checkpoint.py", str(checkpoint), str(file)]
            subprocess.run([*command, "--type", kind], cwd=ROOT, check=True)
        answer, tokens = _of_llama(binary, file, task), expected if kind == "f32" else None
        systems.append(System(f"llama.cpp {kind}", "none", answer, tokens, warms_up=False))
    return systems


def _of_llama(binary: Path, file: Path, task: Task) -> Callable[[], Answer]:
    """Its example counts blocks over the whole canvas from the end of the prompt, so that some of them are
    behind it: they cost a forward each, which is taken away."""
    length = len(task.prompt) + task.gen_length
    blocks, steps = length // task.block, task.block // task.per_step
    command = [str(binary), "-m", str(file), "-p", "".join(f"<{token}>" for token in task.prompt)]
    command += ["-ub", str(length), "-b", str(length), "-c", str(length), "-t", str(task.threads)]
    command += [
        "--temp",
        "0",
        "--top-k",
        "1",
        "--diffusion-algorithm",
        "4",
        "--diffusion-block-length",
        str(task.block),
    ]
    command += ["--diffusion-steps", str(steps * blocks)]
    made = task.forwards + blocks - task.gen_length // task.block

    def answer() -> Answer:
        for _ in range(3):  # it sometimes ends before all of its output is written
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            said = done.stdout + done.stderr
            total = _TIME.search(said)
            tokens = [int(token) for token in _TOKEN.findall(said)][-task.gen_length :]
            if not done.returncode and total is not None and len(tokens) == task.gen_length:
                return float(total[1]) / 1000 / made * task.forwards, tokens
        raise SystemExit(
            f"error: {binary} ended with {done.returncode}, and reported no time or not {task.gen_length} "
            f"tokens: {said[-300:]!r}"
        )

    return answer


def _official(directory: Path, checkpoint: Path, task: Task, ours: dict[str, System]) -> list[System]:
    """Fast-dLLM's code for LLaDA in a checkout of it."""
    import torch

    torch.set_num_threads(task.threads)
    code = official_code(directory)
    network = code.LLaDAModelLM.from_pretrained(str(checkpoint), torch_dtype=torch.float32).eval()
    prompt = torch.tensor([task.prompt])

    def of(name: str) -> Callable[[], Answer]:
        generate = getattr(code, name)

        def answer() -> Answer:
            begin = time.perf_counter()
            with torch.no_grad():
                canvas, _ = generate(
                    network,
                    prompt,
                    steps=task.forwards,
                    gen_length=task.gen_length,
                    block_length=task.block,
                    temperature=0.0,
                    mask_id=task.mask,
                )
            return time.perf_counter() - begin, canvas[0, len(task.prompt) :].tolist()

        return answer

    return [
        System("Fast-dLLM, eager PyTorch fp32", cache, of(name), lambda cache=cache: ours[cache].tokens)
        for cache, name in (("none", "generate"), ("dual", "generate_with_dual_cache"))
    ]


def official_code(directory: Path) -> Any:
    """The module `llada/generate.py` of a checkout of Fast-dLLM."""
    root = next(
        (path for path in (directory, directory / "v1") if (path / "llada" / "generate.py").is_file()), None
    )
    if root is None:
        raise SystemExit(
            f"error: --official {directory}: has no llada/generate.py: give a checkout of Fast-dLLM."
        )
    sys.path[:0] = [str(root), str(root / "llada")]
    try:
        return importlib.import_module("llada.generate")
    except ImportError:  # of a version whose modules are no package
        return importlib.import_module("generate")


def main() -> None:
    """One thread count, as system.py asks for it."""
    asked = json.loads(sys.argv[1])
    report = compare(
        Path(asked["checkpoint"]),
        {name: Path(asked[name]) for name in ("fp32", "w8a8")},
        Path(asked["scratch"]),
        llama=Path(asked["llama"]) if asked["llama"] else None,
        official=Path(asked["official"]) if asked["official"] else None,
        threads=asked["threads"],
        repeats=asked["repeats"],
    )
    Path(asked["output"]).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{asked['output']} written")


if __name__ == "__main__":
    main()
