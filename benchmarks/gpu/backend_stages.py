"""Stages of report.py over the model: parity of each backend with PyTorch, milliseconds of each forward,
tokens per second."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import STATISTICS, measure, memory, outputs, tokens_per_second

from trt_runtime.artifact import manifest as manifests

ROOT = Path(__file__).resolve().parents[2]


def ort(settings: Any, note: Callable[..., None]) -> None:
    """ONNX Runtime on CUDA (the twin: its CPU provider)."""
    if importlib.util.find_spec("onnxruntime") is None:
        note(skipped="ONNX Runtime is not installed here")
        return
    import onnxruntime

    from trt_runtime.backends.ort import open_ort

    if not settings.is_twin and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        note(
            skipped=f"onnxruntime {onnxruntime.__version__} here has no CUDA provider: install "
            f"onnxruntime-gpu"
        )
        return
    before, begin = memory(settings), time.perf_counter()
    backend = open_ort(settings.artifact, device=settings.device)
    note(
        load_seconds=round(time.perf_counter() - begin, 1), versions={"onnxruntime": onnxruntime.__version__}
    )
    measure(backend, settings, note, "ort")
    after = memory(settings)
    note(memory_bytes=after - before if after is not None and before is not None else None)
    if not settings.is_twin and importlib.util.find_spec("cuda") is None:
        return
    backend.steps_per_sync = 4  # the commits on the GPU
    note(tokens_per_second_looking_every_4=tokens_per_second(backend, settings))


def _package(settings: Any) -> str | None:
    """TensorRT, else TensorRT-RTX, if installed and if it supports this GPU (the twin: only TensorRT-RTX,
    which builds without a GPU)."""
    from trt_runtime.backends.tensorrt import store

    modules = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
    package = next(
        (name for name, imports in modules.items() if any(map(importlib.util.find_spec, imports))),
        None,
    )
    if package == "tensorrt-rtx" and not settings.is_twin:
        major, minor = torch.cuda.get_device_capability()
        package = package if f"sm{major}{minor}" in store.SM_TARGETS else None
    return None if settings.is_twin and package != "tensorrt-rtx" else package


def build(settings: Any, note: Callable[..., None]) -> None:
    """Engines of the model, for this GPU (the twin: for SM89)."""
    from trt_runtime.backends.tensorrt import store

    package = _package(settings)
    if package is None:
        note(skipped="TensorRT is not installed here")
        return
    config = store.BuildConfig(
        package,
        targets=("sm89",) if settings.is_twin else (),
        max_batch=max(settings.batches),
        max_length=settings.canvases[-1],
        block_length=settings.block_length,
    )
    messages: list[str] = []
    begin = time.perf_counter()
    directory = store.build(settings.artifact, Path(settings.work) / "engines", config, messages.append)
    facts = json.loads((directory / store.FILE_NAME).read_text(encoding="utf-8"))
    note(
        build_seconds=round(time.perf_counter() - begin, 1),
        versions={package: store.load(package).__version__},
        said=messages,
        attention=facts["attention"],
        engine_bytes=sum(file.stat().st_size for file in directory.glob("*.engine")),
    )


def tensorrt(settings: Any, note: Callable[..., None]) -> None:
    """The built engines: parity, speeds, memory, and how many calls could not be recorded as CUDA graphs (the
    twin runs none)."""
    from trt_runtime import backends

    package, engines = _package(settings), Path(settings.work) / "engines"
    if package is None or settings.is_twin:
        note(skipped="the twin runs no engine" if settings.is_twin else "TensorRT is not installed here")
        return
    if not list(engines.glob("*/engine.json")):
        note(skipped="no engines: the stage 'build' wrote none")
        return
    before, begin = memory(settings), time.perf_counter()
    backend = backends.open_backend(package, settings.artifact, engines=engines)
    note(
        load_seconds=round(time.perf_counter() - begin, 1),
        host_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    measure(backend, settings, note, package)
    after = memory(settings)
    note(
        memory_bytes=after - before if after is not None and before is not None else None,
        unrecorded=len(backend.unrecorded),
    )


def tensorrt86(settings: Any, note: Callable[..., None]) -> None:
    """TensorRT 8.6 as tools/pack_tensorrt86.sh packed it: legacy lowering, fp16, compared with ONNX Runtime
    on the CPU, on a model of 140 M parameters (the twin: the tiny one, and no engine)."""
    missing = "no TensorRT 8.6 was given (--tensorrt86): tools/pack_tensorrt86.sh packs one"
    runner = Path(settings.tensorrt86) / "run"
    has_runner = bool(settings.tensorrt86) and runner.is_file()
    if importlib.util.find_spec("onnxruntime") is None or not (settings.is_twin or has_runner):
        note(skipped=f"{missing}; or no ONNX Runtime to compare with")
        return
    artifact = _legacy_artifact(settings)
    if not has_runner:
        note(skipped=missing, exported="legacy, fp16", lowering=manifests.load(artifact).lowering)
        return
    script = ROOT / "benchmarks" / "gpu" / "tensorrt86.py"
    numbers = [str(settings.canvases[0]), str(settings.block_length)]
    job = [str(runner), "python3", str(script), str(artifact), *numbers]
    done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"TensorRT 8.6 under the packed Python failed: {done.stderr.strip()[-1500:]}")
    note(**json.loads(done.stdout.splitlines()[-1]))


def _legacy_artifact(settings: Any) -> Path:
    """An artifact for TensorRT 8.6, and next to it legacy.npz with its outputs on ONNX Runtime."""
    import random_checkpoint

    from trt_runtime.backends.ort import open_ort

    checkpoint, artifact = Path(settings.work) / "legacy-checkpoint", Path(settings.work) / "legacy"
    config = (
        random_checkpoint.PRESETS["llada-140m"][0]
        if not settings.is_twin
        else json.loads((settings.checkpoint / "config.json").read_text())
    )
    random_checkpoint.write(config, checkpoint, "fp16")
    options = ["--dtype", "fp16", "--lowering", "legacy", "--verify", "no", "--overwrite"]
    command = [
        sys.executable,
        "-m",
        "export",
        "--checkpoint",
        str(checkpoint),
        "--out",
        str(artifact),
        *options,
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    expected = outputs(open_ort(artifact), settings)
    arrays = {
        f"{role} {name}": getattr(stats, name)
        for role, stats in expected.items()
        for name in (*STATISTICS, "token")
    }
    np.savez(artifact.parent / "legacy.npz", **arrays)
    return artifact
