"""Stages of report.py with PyTorch: eager, as a CUDA graph, and compiled."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import (
    STATISTICS,
    at_the_schedule,
    memory,
    outputs,
    parity,
    shares,
    speeds,
    tokens_per_second,
)
from kernels import milliseconds
from windows import windows

from trt_runtime.decoding.backend import Cache, Window


def torch_eager(settings: Any, note: Callable[..., None]) -> None:
    """Eager PyTorch with the same caches and the same loop (the reference backend): the baseline of the other
    stages."""
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
        tokens_per_second_at_schedule=at_the_schedule(longest, settings, backend.manifest),
    )
    wide = outputs(_widened(backend, settings, note), settings)
    arrays = {
        f"{tag} {role} {name}": getattr(stats, name)
        for tag, stats_of_role in ((settings.dtype, same), ("fp32", wide))
        for role, stats in stats_of_role.items()
        for name in (*STATISTICS, "token")
    }
    np.savez(Path(settings.work) / "torch.npz", **arrays)
    note(parity=parity(same, settings, "torch"))


def _widened(backend: Any, settings: Any, note: Callable[..., None]) -> Any:
    """The same backend in fp32, the reference of parity; on the host if the GPU has too little memory."""
    from export.parity.reference import TorchBackend

    needed = 4.5 * backend.manifest.model.parameters
    if settings.is_twin or torch.cuda.mem_get_info()[1] > needed:
        backend.network.module.float()
        backend.dtype = torch.float32
        return backend
    note(fp32_on="the host: the model in fp32 does not fit the GPU's memory")
    return TorchBackend(settings.artifact, device="cpu", dtype="fp32")


class _StaticCache:
    """Replaces a transformers cache; its addresses never change, and positions are written through a tensor
    of indices."""

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
    """PyTorch's fast paths at batch 1: the same forwards as CUDA graphs, eager and compiled. The twin runs
    them without capture."""
    from export.parity.reference import TorchBackend

    backend = TorchBackend(settings.artifact, device=settings.device)
    network, canvas = backend.network.module.model, settings.canvases[-1]
    for form in ("graph", "compiled graph"):
        if form == "compiled graph":
            if settings.is_twin:
                note(compiled={"skipped": "the twin does not run torch.compile"})
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
        row["tokens_per_second_at_schedule"] = at_the_schedule(row, settings, backend.manifest)
        note(**{form.replace(" ", "_"): row | shares(backend.manifest, settings, row)})


def _static(
    backend: Any, network: Any, cache: Cache, window: Window, *, own_rows_only: bool
) -> Callable[[], torch.Tensor]:
    """A forward over fixed tensors that returns token and confidence of the requested positions."""
    at = {
        name: torch.from_numpy(getattr(window, name)).to(backend.device)
        for name in ("input_ids", "position_ids", "logit_rows")
    }
    keys = window.input_ids.shape[1] if own_rows_only else cache.capacity
    mask = torch.zeros((1, 1, window.input_ids.shape[1], keys), dtype=backend.dtype, device=backend.device)
    static = _StaticCache(cache.buffers, at["position_ids"][0], own_rows_only)

    def forward() -> torch.Tensor:
        hidden = network(
            input_ids=at["input_ids"],
            position_ids=at["position_ids"],
            attention_mask=mask,
            past_key_values=static,
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


def _versions(*packages: str) -> dict[str, str]:
    import importlib.metadata

    return {package: importlib.metadata.version(package) for package in packages}
