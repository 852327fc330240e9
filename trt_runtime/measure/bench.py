"""Measure caches and parallel unmasking side by side in one run: all variants in turn, repeatedly, with
medians at the end.

tokens/s counts useful tokens (before the end of the answer; with random prompts, where no answer ends, all
generated tokens) at batch 1, over the time from the first forward to the last. Memory is the peak of a
separate process.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import Manifest, ModelFacts
from trt_runtime.backends import REFERENCE, open_backend
from trt_runtime.decoding.backend import Backend, Cache, Stats, Window
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError, check_counts, unknown
from trt_runtime.measure import examples
from trt_runtime.measure.peak_memory import peak_memory
from trt_runtime.measure.variants import variants_of
from trt_runtime.model import Model, Prompt
from trt_runtime.system import processor
from trt_runtime.system.progress import SILENT, Progress


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. variants: names, or empty for all; reference: names of the variants that PyTorch runs
    too, in each of reference_dtypes (empty: the artifact's); beside: other artifacts of the same model, for
    example quantised ones, that run the same variants."""

    prompts: Path | None
    prompt_length: int
    count: int
    repeats: int
    gen_length: int | None
    block_length: int | None
    threshold: float
    tokens_per_step: int | None
    variants: tuple[str, ...]
    reference: tuple[str, ...]
    threads: int | None
    checkpoint: str | None
    beside: tuple[Path, ...] = ()
    reference_dtypes: tuple[str, ...] = ()


class Timed:
    """A backend that measures the seconds of every forward, by role."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.manifest, self.name = backend, backend.manifest, backend.name
        self.max_batch, self.steps_per_sync = backend.max_batch, backend.steps_per_sync
        self.refine_steps = backend.refine_steps
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return self.backend.new_cache(batch, capacity)

    def forward(
        self, role: str, cache: Cache, slots: slice, window: Window, *, want_logits: bool = False
    ) -> Stats:
        begin = time.perf_counter()
        stats = self.backend.forward(role, cache, slots, window, want_logits=want_logits)
        self.seconds[role].append(time.perf_counter() - begin)
        return stats


def options_of(args: argparse.Namespace) -> BenchOptions:
    """Options from the command line, checked. Raises DllmError."""
    check_counts(args, "prompt_length", "count", "repeats", "tokens_per_step")
    variants, reference, dtypes = (
        tuple(name for name in text.split(",") if name)
        for text in (args.variants, args.reference, args.reference_dtypes)
    )
    for dtype in dtypes:
        if dtype not in contract.DTYPES:
            raise unknown("dtype", dtype, contract.DTYPES)
    return BenchOptions(
        args.prompts,
        args.prompt_length,
        args.count,
        args.repeats,
        args.gen_length,
        args.block_length,
        args.threshold,
        args.tokens_per_step,
        variants,
        reference,
        args.threads,
        args.checkpoint,
        tuple(args.beside),
        dtypes,
    )


def run(model: Model, options: BenchOptions, progress: Progress = SILENT) -> dict[str, Any]:
    """All figures of a benchmark: machine, versions, settings, and one row per variant."""
    prompts = _prompts(model, options)
    base = GenerationConfig(
        gen_length=options.gen_length,
        block_length=options.block_length,
        policy="fixed",
        threshold=options.threshold,
        stop_at_eos=options.prompts is not None,
    ).resolved(model.manifest)
    variants = variants_of(base, model.manifest.decoding, options.tokens_per_step)
    names = variants if options.reference == ("all",) else options.reference
    for name in (*names, *options.variants):
        if name not in variants:
            raise unknown("variant", name, variants)
    own = {
        name: config for name, config in variants.items() if name in options.variants or not options.variants
    }
    opened = _opened(model, options, bool(names))
    entries: dict[str, tuple[Model, GenerationConfig]] = {}
    for label, opened_model in opened.items():
        is_reference = opened_model.backend.name == REFERENCE
        chosen = {name: variants[name] for name in names} if is_reference else own
        entries |= {f"{label} {name}": (opened_model, config) for name, config in chosen.items()}
    samples = _interleaved(entries, prompts, options.repeats, progress)
    rows = [_row(name, taken) for name, taken in samples.items()]
    for row in rows:
        row["speedup"] = row["tokens_per_second"] / max(rows[0]["tokens_per_second"], 1e-9)
    config = next(iter(variants.values()))
    each = progress.each(opened, "measuring memory")
    memory = {
        label: peak_memory(
            opened[label],
            label,
            config,
            prompt_length=options.prompt_length,
            threads=options.threads,
            checkpoint=options.checkpoint,
        )
        for label in each
    }
    return {
        "machine": machine(),
        "settings": asdict(options)
        | {
            "prompts": str(options.prompts or "random token ids"),
            "beside": [path.name for path in options.beside],
        },
        "artifact": {
            "family": model.manifest.model.family,
            "parameters": model.manifest.model.parameters,
            "dtype": model.manifest.model.dtype,
        },
        "rows": rows,
        "peak_memory_mib": memory,
    }


def _interleaved(
    entries: dict[str, tuple[Model, GenerationConfig]],
    prompts: list[Prompt],
    repeats: int,
    progress: Progress,
) -> dict[str, list[dict[str, float]]]:
    """Run every entry in turn, `repeats` times after a warm-up round; returns the samples of each."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in entries}
    with progress.task("", len(entries) * (repeats + 1)) as task:
        for repeat in range(repeats + 1):  # the first round warms up and is dropped
            for name, (entry, config) in entries.items():
                task.doing(
                    f"measuring {name}, round {repeat} of {repeats}" if repeat else f"warming up {name}"
                )
                sample = (
                    _measure(entry, prompts, config)
                    if repeat
                    else _measure(entry, prompts[:1], _one_block(config))
                )
                task.advance()
                if repeat:
                    samples[name].append(sample)
    return samples


def _opened(model: Model, options: BenchOptions, with_reference: bool) -> dict[str, Model]:
    """The models to measure, by label: the artifact, those of --beside, and PyTorch."""
    models = {model.backend.name: model}
    for path in options.beside:
        facts = manifests.load(path)
        if _network(facts.model) != _network(model.manifest.model):
            raise DllmError(
                f"--beside {path}: not the same model as {model.path}: give an artifact of the same "
                f"checkpoint."
            )
        label = f"{model.backend.name} {_form(facts)}"
        if label in models:
            raise DllmError(
                f"--beside {path}: another artifact already has the label '{label}': give one of each kind."
            )
        models[label] = Model(path, open_backend(model.backend.name, path, threads=options.threads))
    for dtype in (options.reference_dtypes or ("",)) if with_reference else ():
        extra: dict[str, Any] = {"checkpoint": options.checkpoint} if options.checkpoint else {}
        extra |= {"dtype": dtype} if dtype else {}
        label = f"{REFERENCE} {dtype}".strip()
        models[label] = Model(
            model.path, open_backend(REFERENCE, model.path, threads=options.threads, **extra)
        )
    return models


def _network(facts: ModelFacts) -> ModelFacts:
    """What a model is, however it is stored and spelled."""
    experts = None if facts.experts is None else replace(facts.experts, is_fused=False)
    return replace(facts, dtype="", weight_bytes=None, experts=experts)


def _form(facts: Manifest) -> str:
    """How a model is stored and spelled, in a word."""
    if facts.quantization is not None:
        return facts.quantization.scheme
    has_operator = facts.model.experts is not None and facts.model.experts.is_fused
    return f"{facts.model.dtype} MoE" if has_operator else facts.model.dtype


def _one_block(config: GenerationConfig) -> GenerationConfig:
    """A configuration of one block, to warm up with."""
    assert config.gen_length is not None and config.block_length is not None
    blocks = -(-config.gen_length // config.block_length)
    steps = None if config.steps is None else max(1, config.steps // blocks)
    return replace(config, gen_length=min(config.block_length, config.gen_length), steps=steps)


def table(report: dict[str, Any]) -> str:
    """A benchmark's figures as an aligned table."""
    columns = {"variant": "{}", "tokens/s": "{:.1f}", "speedup": "{:.2f}x", "TPF": "{:.2f}", "NFE": "{:.1f}",
               "prefix ms": "{:.1f}", "refine ms": "{:.1f}"}  # fmt: skip
    keys = ("variant", "tokens_per_second", "speedup", "tokens_per_forward", "nfe", "prefix_ms", "refine_ms")
    lines = [list(columns)]
    for row in report["rows"]:
        lines.append(
            [
                form.format(row[key]) if row[key] is not None else "-"
                for form, key in zip(columns.values(), keys, strict=True)
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    memory = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in report["peak_memory_mib"].items())
    machine = report["machine"]
    return "\n".join(
        [
            *text,
            f"peak memory per process: {memory}",
            f"{machine['cpu']}, {machine['threads_available']} cores; "
            + ", ".join(f"{k} {v}" for k, v in machine["versions"].items()),
        ]
    )


def _prompts(model: Model, options: BenchOptions) -> list[Prompt]:
    if options.prompts is None:
        rng = np.random.default_rng(0)
        facts = model.manifest
        special = [facts.decoding.mask_token_id, facts.decoding.pad_token_id, *facts.decoding.eos_token_ids]
        allowed = np.setdiff1d(np.arange(facts.model.vocab_size), special)
        return [rng.choice(allowed, options.prompt_length).tolist() for _ in range(options.count)]
    return list(examples.lines_of(options.prompts)[: options.count])


def _measure(model: Model, prompts: list[Prompt], config: GenerationConfig) -> dict[str, float]:
    """One run over the prompts, one at a time: seconds, tokens, forwards, and milliseconds by role."""
    timed = Timed(model.backend)
    clocked = Model(model.path, timed)  # type: ignore[arg-type]
    begin = time.perf_counter()
    results = [clocked.generate([prompt], config)[0] for prompt in prompts]
    seconds = time.perf_counter() - begin
    count_all = not config.stop_at_eos
    tokens = sum(len(result.tokens) if count_all else result.num_useful for result in results)
    by_role = {f"{role}_ms": 1000 * statistics.median(times) for role, times in timed.seconds.items()}
    return {
        "seconds": seconds,
        "tokens": tokens,
        "nfe": sum(result.nfe for result in results),
        "answers": len(results),
        **by_role,
    }


def _row(name: str, samples: list[dict[str, float]]) -> dict[str, Any]:
    def median(key: str) -> float | None:
        values = [sample[key] for sample in samples if key in sample]
        return statistics.median(values) if values else None

    speeds = [sample["tokens"] / sample["seconds"] for sample in samples]
    return {
        "variant": name,
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_all": speeds,
        "tokens_per_forward": samples[0]["tokens"] / samples[0]["nfe"],
        "nfe": samples[0]["nfe"] / samples[0]["answers"],
        "prefix_ms": median("prefix_ms"),
        "refine_ms": median("refine_ms"),
    }


def machine() -> dict[str, Any]:
    """The CPU with its instruction sets, its cores, and the versions that a measurement depends on."""
    versions = {}
    for package in ("dllm-trt", "onnxruntime", "numpy", "torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": processor.name(),
        "instruction_sets": processor.instruction_sets(),
        "threads_available": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }
