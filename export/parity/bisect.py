"""Inside the network: the residual stream layer by layer, and the largest activations.

`compare` locates a failed verification: it runs the artifact's graphs with the residual stream after every
layer exposed, and compares them with the PyTorch reference. The fault is in the first layer that differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.backend import Window
from trt_runtime.measure import tolerances

from ..graph import decoder
from .reference import TorchBackend

Array = np.ndarray[Any, Any]
Exposed = Callable[[Path, str, list[str], str], bytes]


@dataclass
class Ranges:
    """The largest magnitude of any input or output of a linear layer in the reference, and where it
    occurred."""

    largest: float = 0.0
    where: str = ""

    def note(self, where: str, tensor: torch.Tensor) -> None:
        largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
        if largest > self.largest or not math.isfinite(largest):
            self.largest, self.where = largest, where


@dataclass(frozen=True)
class LayerDifference:
    """A layer: largest difference over max(1, largest value), cosine, norm of ours over theirs, and the
    number of values that are NaN or infinite."""

    name: str
    difference: float
    cosine: float
    norm_ratio: float
    bad_values: int
    passed: bool


Noted = Callable[[str, torch.nn.Module, torch.Tensor, torch.Tensor], None]


@contextmanager
def _hooked(modules: dict[str, torch.nn.Module], noted: Noted) -> Iterator[None]:
    """A context in which `noted` is called for every forward of the modules: name, module, input and
    output."""

    def hook(name: str) -> Callable[..., None]:
        def told(module: torch.nn.Module, given: tuple[Any, ...], output: Any) -> None:
            noted(
                name,
                module,
                given[0] if given else output,
                output[0] if isinstance(output, tuple) else output,
            )

        return told

    hooks = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _layers(reference: TorchBackend) -> dict[str, torch.nn.Module]:
    return {decoder.layer_name(i, decoder.OUTPUT): layer for i, layer in enumerate(reference.network.layers)}


@contextmanager
def watched(reference: TorchBackend, ranges: Ranges) -> Iterator[None]:
    """A context in which every linear layer of the reference records its inputs and outputs, and every layer
    its residual stream."""
    linear = {
        decoder.layer_name(i, name): module
        for i, layer in enumerate(reference.network.layers)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }

    def note(name: str, module: torch.nn.Module, given: torch.Tensor, output: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Linear):
            ranges.note(f"{name} (input)", given)
            ranges.note(f"{name} (output)", output)
        else:
            ranges.note(name, output)

    with _hooked({**linear, **_layers(reference)}, note):
        yield


def compare(
    artifact: Path, reference: TorchBackend, calls: tuple[Window, Window, Array], exposed: Exposed
) -> dict[str, list[LayerDifference]]:
    """Rows per kind of call (a prefix pass on either graph, a refine step): the residual stream after each
    layer, then the logits.

    calls: a prefix pass, a refine step, and the valid rows of the first [B, L, 1]. exposed: makes a graph
    with more outputs.
    """
    full, refine, valid = calls
    facts = manifests.load(artifact).model
    names = [decoder.layer_name(i, decoder.OUTPUT) for i in range(facts.num_layers)]
    batch, length = full.input_ids.shape
    slots, theirs = slice(0, batch), reference.new_cache(batch, length)
    expected = {
        "prefix": _residuals(reference, theirs, slots, full, own_rows_only=True),
        "refine": _residuals(reference, theirs, slots, refine, own_rows_only=False),
    }
    every = np.ones((*refine.input_ids.shape, 1), bool)
    tables = {}
    for role in contract.ROLES:  # one session at a time
        engine = OrtBackend(
            artifact, role=role, model_bytes=exposed(artifact, role, [*names, contract.LOGITS], facts.dtype)
        )
        cache = engine.new_cache(batch, length)
        kinds = [(f"prefix pass, {role} graph", full, valid, expected["prefix"])]
        if role == "refine":
            kinds.append(("refine step, refine graph", refine, every, expected["refine"]))
        for kind, call, keep, wanted in kinds:
            outputs = engine.run(cache, slots, call, [*names, contract.LOGITS])
            tables[kind] = [
                _row(
                    name,
                    outputs[name].astype(np.float32).reshape(wanted[name].shape),
                    wanted[name],
                    keep,
                    facts.dtype,
                )
                for name in [*names, contract.LOGITS]
            ]
        engine.close()
    return tables


@torch.inference_mode()
def _residuals(
    reference: TorchBackend, cache: Any, slots: slice, call: Window, *, own_rows_only: bool
) -> dict[str, Array]:
    kept: dict[str, Array] = {}

    def keep(name: str, module: torch.nn.Module, given: torch.Tensor, output: torch.Tensor) -> None:
        kept[name] = output.numpy().copy()

    with _hooked(_layers(reference), keep):
        kept[contract.LOGITS] = reference.logits(cache, slots, call, own_rows_only=own_rows_only).numpy()
    return kept


def difference(mine: Array, theirs: Array) -> float:
    """Largest difference over max(1, largest value); infinite if any value is NaN or infinite."""
    largest = float(np.abs(mine - theirs).max() / max(1.0, float(np.abs(theirs).max())))
    return largest if math.isfinite(largest) else math.inf


def _row(name: str, mine: Array, theirs: Array, keep: Array, dtype: str) -> LayerDifference:
    bad = int((~np.isfinite(mine)).sum())
    a, b = (
        np.where(keep, np.nan_to_num(x.astype(np.float64), posinf=0.0, neginf=0.0), 0.0)
        for x in (mine, theirs)
    )
    worst = difference(a, b)
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    cosine = float((a * b).sum() / max(norms[0] * norms[1], 1e-30))
    return LayerDifference(
        name,
        worst,
        cosine,
        norms[0] / max(norms[1], 1e-30),
        bad,
        bad == 0 and worst <= tolerances.LOGITS[dtype],
    )


def table(rows: list[LayerDifference]) -> Iterator[str]:
    """The lines of a table; the first layer that differs is marked."""
    width = max(len(row.name) for row in rows)
    yield f"{'':{width}}  rel diff    cosine  norm ratio  NaN/Inf"
    first = next((row for row in rows if not row.passed), None)
    for row in rows:
        mark = "  <-- first bad" if row is first else "" if row.passed else "  bad"
        yield (
            f"{row.name:{width}}  {row.difference:8.1e}  {row.cosine:8.6f}  {row.norm_ratio:10.6f}  "
            f"{row.bad_values:7}{mark}"
        )
