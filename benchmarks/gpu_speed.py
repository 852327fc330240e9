"""Stages of gpu_report.py over the model: parity of each backend with PyTorch, milliseconds of each forward,
tokens per second."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_kernels import measured_ceilings, milliseconds
from gpu_windows import windows

from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import Manifest
from trt_runtime.decoding.backend import Backend, Cache, Stats, Window
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.machine import devices, roofline
from trt_runtime.model import Model

ROOT = Path(__file__).resolve().parents[1]
STATISTICS = ("confidence", "runner_up", "entropy")


def outputs(backend: Backend, settings: Any) -> dict[str, Stats]:
    """Both roles once, over the same inputs for every backend."""
    canvas = settings.canvases[0]
    full, step = windows(backend.manifest, 1, canvas, settings.block_length)
    cache = backend.new_cache(1, canvas)
    return {
        "prefix": backend.prefix(cache, slice(0, 1), full),
        "refine": backend.refine(cache, slice(0, 1), step),
    }


def parity(made: dict[str, Stats], settings: Any, tag: str) -> dict[str, Any]:
    """Against PyTorch in fp32 and in the artifact's dtype, whose own distance from fp32 is the yardstick.

    Distances are the largest differences of logarithms of probabilities and of entropies, in nats: with
    random weights probabilities are small, and their differences would say nothing. Passed: nothing is
    further from fp32 than three times what PyTorch's is.
    """
    file = Path(settings.work) / "torch.npz"
    if not file.is_file():
        return {"skipped": "no outputs of PyTorch: its stage did not run"}
    held, result = np.load(file), {}
    for role, stats in made.items():
        row: dict[str, Any] = {}
        for name in STATISTICS:
            wide, same, mine = (
                _nats(name, item)
                for item in (
                    held[f"fp32 {role} {name}"],
                    held[f"{settings.dtype} {role} {name}"],
                    getattr(stats, name),
                )
            )
            row[name] = {
                "from_fp32": _apart(mine, wide),
                "from_torch": _apart(mine, same),
                "torch_from_fp32": _apart(same, wide),
            }
        row["tokens_as_fp32"] = float((stats.token == held[f"fp32 {role} token"]).mean())
        row["torch_tokens_as_fp32"] = float(
            (held[f"{settings.dtype} {role} token"] == held[f"fp32 {role} token"]).mean()
        )
        floor = 1e-3 if settings.dtype == "fp32" else 5e-3
        row["passed"] = all(
            row[name]["from_fp32"] <= max(floor, 3 * row[name]["torch_from_fp32"]) for name in STATISTICS
        )
        result[role] = row
    result["passed"] = all(row["passed"] for row in result.values())
    result["of"] = tag
    return result


def _apart(mine: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(mine - theirs).max())


def _nats(name: str, values: np.ndarray) -> np.ndarray:
    return values if name == "entropy" else np.log(np.maximum(values, 1e-30))


def speeds(backend: Backend, settings: Any, note: Callable[..., None]) -> list[dict[str, Any]]:
    """Milliseconds of a refine step and a prefix pass at each canvas and batch, as a caller sees them, and
    shares of the roofline."""
    rows: list[dict[str, Any]] = []
    for canvas in settings.canvases:
        for batch in settings.batches:
            full, step = windows(backend.manifest, batch, canvas, settings.block_length, seed=1)
            cache, row = backend.new_cache(batch, canvas), {"canvas": canvas, "batch": batch}
            row["prefix_ms"] = _call_ms(backend.prefix, cache, full, max(3, settings.repeats // 3))
            row["refine_ms"] = _call_ms(backend.refine, cache, step, settings.repeats)
            rows.append(row | shares(backend.manifest, settings, row))
            note(speeds=rows)
    return rows


def _call_ms(call: Callable[..., Stats], cache: Cache, window: Window, repeats: int) -> float:
    """Median wall time of a call, which returns when its results are there; four before it warm up."""
    taken = []
    for _ in range(repeats + 4):
        begin = time.perf_counter()
        call(cache, slice(0, cache.batch), window)
        taken.append(1000 * (time.perf_counter() - begin))
    return statistics.median(taken[4:])


def shares(manifest: Manifest, settings: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The roofline of this machine (its measured copy and product rates) over what was measured."""
    limits = measured_ceilings(settings)
    if limits is None:
        return {}
    device = devices.DeviceSpec("measured", 1 << 40, 0, limits[0], limits[1], limits[1])
    work = roofline.Work(row["batch"], row["canvas"], settings.block_length)
    made = {}
    for name, size in (("prefix", row["canvas"]), ("refine", settings.block_length)):
        floor = roofline.seconds(manifest.model, work, device, rows=size)
        made[f"{name}_roofline_ms"] = 1000 * floor if floor else None
        made[f"{name}_share"] = 1000 * floor / row[f"{name}_ms"] if floor else None
    return made


def tokens_per_second(backend: Backend, settings: Any, repeats: int = 3) -> dict[str, Any]:
    """The loop itself: one prompt on the longest canvas, dual cache, a fixed schedule of whole forwards a
    block."""
    canvas, gen = settings.canvases[-1], settings.gen_length
    full, _ = windows(backend.manifest, 1, canvas, settings.block_length, seed=2)
    prompt = np.where(full.input_ids[0] == backend.manifest.decoding.mask_token_id, 5, full.input_ids[0])[
        : canvas - gen
    ].tolist()
    forwards = settings.forwards_per_block * -(-gen // settings.block_length)
    config = GenerationConfig(
        gen_length=gen, block_length=settings.block_length, policy="fixed", steps=forwards, stop_at_eos=False
    )
    model, taken = Model(settings.artifact, backend), []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        (result,) = model.generate([prompt], config)
        taken.append(time.perf_counter() - begin)
    seconds = statistics.median(taken[1:])
    return {
        "canvas": canvas,
        "gen_length": gen,
        "nfe": result.nfe,
        "tokens_per_forward": gen / result.nfe,
        "tokens_per_second": gen / seconds,
    }


def at_the_schedule(row: dict[str, Any], settings: Any) -> float:
    """Tokens a second that the times of single calls amount to at exactly the schedule's tokens per forward
    (batch 1)."""
    forwards = settings.block_length / settings.tokens_per_forward
    return settings.block_length / ((row["prefix_ms"] + (forwards - 1) * row["refine_ms"]) / 1000)


def measure(backend: Backend, settings: Any, note: Callable[..., None], tag: str) -> None:
    """Parity, speeds and tokens per second of a backend. A backend that is wrong is measured all the same,
    and its stage fails."""
    held = parity(outputs(backend, settings), settings, tag)
    note(parity=held)
    rows = speeds(backend, settings, note)
    longest = next(row for row in rows if row["canvas"] == settings.canvases[-1] and row["batch"] == 1)
    note(
        tokens_per_second=tokens_per_second(backend, settings),
        tokens_per_second_at_schedule=at_the_schedule(longest, settings),
    )
    if not held.get("passed", True):
        raise SystemExit(f"{tag} is further from PyTorch in fp32 than rounding explains: {held}")


def memory(settings: Any) -> int | None:
    """Bytes in use on the GPU, by anything."""
    if settings.is_twin:
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def torch_eager(settings: Any, note: Callable[..., None]) -> None:
    """Eager PyTorch with the same caches and the same loop (the reference backend): what the others are
    compared with."""
    from export.parity.reference import TorchBackend

    begin = time.perf_counter()
    backend = TorchBackend(settings.artifact, device=settings.device)
    note(
        load_seconds=round(time.perf_counter() - begin, 1),
        memory_bytes=memory(settings),
        versions=_versions("torch", "transformers"),
    )
    same = outputs(backend, settings)
    rows = speeds(backend, settings, note)
    longest = next(row for row in rows if row["canvas"] == settings.canvases[-1] and row["batch"] == 1)
    note(
        tokens_per_second=tokens_per_second(backend, settings),
        tokens_per_second_at_schedule=at_the_schedule(longest, settings),
    )
    wide = outputs(_widened(backend, settings, note), settings)
    arrays = {
        f"{tag} {role} {name}": getattr(stats, name)
        for tag, made in ((settings.dtype, same), ("fp32", wide))
        for role, stats in made.items()
        for name in (*STATISTICS, "token")
    }
    np.savez(Path(settings.work) / "torch.npz", **arrays)
    note(parity=parity(same, settings, "torch"))


def _widened(backend: Any, settings: Any, note: Callable[..., None]) -> Any:
    """The same in fp32: what parity is measured from. On the host where the GPU does not hold it."""
    from export.parity.reference import TorchBackend

    needed = 4.5 * backend.manifest.model.parameters
    if settings.is_twin or torch.cuda.mem_get_info()[1] > needed:
        backend.network.module.float()
        backend.dtype = torch.float32
        return backend
    note(fp32_on="the host: the GPU's memory does not hold the model in fp32")
    return TorchBackend(settings.artifact, device="cpu", dtype="fp32")


class _StaticCache:
    """Stands in for a transformers cache with addresses that never change: rows are written by a tensor of
    indices."""

    def __init__(
        self, buffers: list[tuple[torch.Tensor, torch.Tensor]], rows: torch.Tensor, own_rows_only: bool
    ) -> None:
        self.buffers, self.rows, self.own_rows_only = buffers, rows, own_rows_only

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for buffer, new in zip(self.buffers[layer_idx], (key, value), strict=True):
            buffer.index_copy_(2, self.rows, new)
        return (key, value) if self.own_rows_only else self.buffers[layer_idx]


def torch_graph(settings: Any, note: Callable[..., None]) -> None:
    """PyTorch's own fast forms at batch 1: the same forwards as CUDA graphs, eager and compiled. The twin
    runs them uncaptured."""
    from export.parity.reference import TorchBackend

    backend = TorchBackend(settings.artifact, device=settings.device)
    network, canvas = backend.network.module.model, settings.canvases[-1]
    for form in ("graph", "compiled graph"):
        if form == "compiled graph":
            if settings.is_twin:
                note(compiled={"skipped": "torch.compile is left out of the twin"})
                continue
            network = torch.compile(backend.network.module.model, dynamic=False)
        row: dict[str, Any] = {"form": form, "canvas": canvas, "batch": 1}
        for role, window in zip(
            ("prefix", "refine"),
            windows(backend.manifest, 1, canvas, settings.block_length, seed=1),
            strict=True,
        ):
            forward = _static(
                backend, network, backend.new_cache(1, canvas), window, own_rows_only=role == "prefix"
            )
            with torch.inference_mode():
                row[f"{role}_ms"] = _captured_ms(forward, settings)
        row["tokens_per_second_at_schedule"] = at_the_schedule(row, settings)
        note(**{form.replace(" ", "_"): row | shares(backend.manifest, settings, row)})


def _static(
    backend: Any, network: Any, cache: Cache, window: Window, *, own_rows_only: bool
) -> Callable[[], torch.Tensor]:
    """A forward over fixed tensors, down to the token and confidence of the rows asked for."""
    at = {
        name: torch.from_numpy(getattr(window, name)).to(backend.device)
        for name in ("input_ids", "position_ids", "logit_rows")
    }
    keys = window.input_ids.shape[1] if own_rows_only else cache.capacity
    mask = torch.zeros((1, 1, window.input_ids.shape[1], keys), dtype=backend.dtype, device=backend.device)
    held = _StaticCache(cache.buffers, at["position_ids"][0], own_rows_only)

    def forward() -> torch.Tensor:
        hidden = network(
            input_ids=at["input_ids"],
            position_ids=at["position_ids"],
            attention_mask=mask,
            past_key_values=held,
            use_cache=False,
        ).last_hidden_state
        logits = backend.network.logits(hidden[:, at["logit_rows"][0]])
        best = logits.max(-1)
        return torch.stack([best.indices.float(), (best.values - logits.logsumexp(-1)).exp()])

    return forward


def _captured_ms(forward: Callable[[], torch.Tensor], settings: Any) -> float:
    if settings.is_twin:
        return milliseconds(forward, settings.repeats, settings.device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    return milliseconds(graph.replay, settings.repeats, settings.device)


def ort(settings: Any, note: Callable[..., None]) -> None:
    """ONNX Runtime on CUDA (the twin: its CPU provider)."""
    if importlib.util.find_spec("onnxruntime") is None:
        note(skipped="ONNX Runtime is not installed here")
        return
    import onnxruntime

    from trt_runtime.backends.ort import open_ort

    if not settings.is_twin and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        note(
            skipped=f"onnxruntime {onnxruntime.__version__} here has no CUDA provider: onnxruntime-gpu is "
            f"needed"
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
    """TensorRT, or else TensorRT-RTX, where it is installed and takes this GPU (the twin: TensorRT-RTX alone,
    which builds without one)."""
    from trt_runtime.backends.tensorrt import store

    modules = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
    package = next(
        (name for name, held in modules.items() if any(importlib.util.find_spec(module) for module in held)),
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
    said: list[str] = []
    begin = time.perf_counter()
    made = store.build(settings.artifact, Path(settings.work) / "engines", config, said.append)
    facts = json.loads((made / store.FILE_NAME).read_text(encoding="utf-8"))
    note(
        build_seconds=round(time.perf_counter() - begin, 1),
        versions={package: store.load(package).__version__},
        said=said,
        attention=facts["attention"],
        engine_bytes=sum(file.stat().st_size for file in made.glob("*.engine")),
    )


def tensorrt(settings: Any, note: Callable[..., None]) -> None:
    """The engines that were built: parity, speeds, memory, and what could not be recorded as a CUDA graph
    (the twin runs none)."""
    from trt_runtime import backends

    package, engines = _package(settings), Path(settings.work) / "engines"
    if package is None or settings.is_twin:
        note(skipped="the twin runs no engine" if settings.is_twin else "TensorRT is not installed here")
        return
    if not list(engines.glob("*/engine.json")):
        note(skipped="no engines: the stage 'build' did not make them")
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
    """TensorRT 8.6 as tools/pack_tensorrt86.sh packed it: legacy lowering, fp16, against ONNX Runtime's CPU,
    on a model of 140 M (the
    twin: the tiny one, and no engine)."""
    if importlib.util.find_spec("onnxruntime") is None or (
        not settings.is_twin and not (Path(settings.tensorrt86) / "run").is_file()
    ):
        note(
            skipped="no TensorRT 8.6 was given (--tensorrt86): tools/pack_tensorrt86.sh packs one; or no "
            "ONNX Runtime to compare with"
        )
        return
    import random_checkpoint

    from trt_runtime.backends.ort import open_ort

    checkpoint, artifact = Path(settings.work) / "legacy-checkpoint", Path(settings.work) / "legacy"
    config = (
        random_checkpoint.PRESETS["llada-140m"][0]
        if not settings.is_twin
        else json.loads((settings.checkpoint / "config.json").read_text())
    )
    random_checkpoint.write(config, checkpoint, "fp16")
    command = [
        sys.executable,
        "-m",
        "export",
        "--checkpoint",
        str(checkpoint),
        "--out",
        str(artifact),
        "--dtype",
        "fp16",
        "--lowering",
        "legacy",
        "--verify",
        "no",
        "--overwrite",
    ]
    subprocess.run(
        command, cwd=ROOT, check=True, env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    )
    expected = outputs(open_ort(artifact), settings)
    arrays = {
        f"{role} {name}": getattr(stats, name)
        for role, stats in expected.items()
        for name in (*STATISTICS, "token")
    }
    np.savez(artifact.parent / "legacy.npz", **arrays)
    runner = Path(settings.tensorrt86) / "run"
    if not settings.tensorrt86 or not runner.is_file():
        note(
            skipped="no TensorRT 8.6 was given (--tensorrt86): tools/pack_tensorrt86.sh packs one",
            exported="legacy, fp16",
            lowering=manifests.load(artifact).lowering,
        )
        return
    script = ROOT / "benchmarks" / "gpu_tensorrt86.py"
    job = [
        str(runner),
        "python3",
        str(script),
        str(artifact),
        str(settings.canvases[0]),
        str(settings.block_length),
    ]
    done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"under the packed Python: {done.stderr.strip()[-1500:]}")
    note(**json.loads(done.stdout.splitlines()[-1]))


def _versions(*packages: str) -> dict[str, str]:
    import importlib.metadata

    return {package: importlib.metadata.version(package) for package in packages}
