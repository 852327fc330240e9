"""Stages of report.py before any measurement: the machine, and the random model."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def environment(settings: Settings, note: Any) -> None:
    """The machine, the GPU, the versions, the commit."""
    import importlib.metadata

    import torch

    from trt_runtime.measure.bench import machine

    facts_of_machine = machine()
    for package in ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "triton", "onnx", "cuda-bindings"):
        try:
            facts_of_machine["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    note(
        machine=facts_of_machine,
        commit=commit or None,
        has_uncommitted_changes=bool(changes),
        utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    if not settings.is_twin:
        facts = torch.cuda.get_device_properties(0)
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        note(
            gpu={
                "name": facts.name,
                "memory_gib": round(facts.total_memory / 2**30, 1),
                "capability": f"{facts.major}.{facts.minor}",
                "multiprocessors": facts.multi_processor_count,
                "driver": driver,
                "cuda": torch.version.cuda,
            }
        )


def _git(*arguments: str) -> str:
    """The output of a git command in the checkout; empty without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def model(settings: Settings, note: Any) -> None:
    """A random checkpoint of the published layout, and its export with linked weights."""
    import random_checkpoint

    from export import families

    preset, tiny = random_checkpoint.PRESETS.get(settings.preset), settings.preset.removeprefix("tiny-")
    config, dtype = preset or (families.find(tiny).tiny_config(), settings.dtype)
    family = families.find(config["model_type"])
    is_block_causal = family.block_causal is not None and not family.attention_is_told
    begin = time.perf_counter()
    random_checkpoint.write(config, settings.checkpoint, dtype)
    size = sum(file.stat().st_size for file in settings.checkpoint.iterdir())
    note(
        preset=settings.preset,
        checkpoint_bytes=size,
        checkpoint_seconds=round(time.perf_counter() - begin, 1),
    )
    begin = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "export",
        "--checkpoint",
        str(settings.checkpoint),
        "--out",
        str(settings.artifact),
        "--dtype",
        settings.dtype,
        "--weights",
        "link" if dtype == settings.dtype else "copy",
        "--verify",
        "no",
        "--overwrite",
        "--lowering",
        "modern",
        *(["--block-length", str(settings.block_length)] if is_block_causal else []),
    ]
    subprocess.run(
        command, cwd=ROOT, check=True, env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    )
    note(export_seconds=round(time.perf_counter() - begin, 1))
