"""Recorded calls of a decoding, with the caches before and the outputs after them, on which graphs and
engines are compared. Shape letters as in trt_runtime/artifact/contract.py."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from trt_runtime.artifact import contract
from trt_runtime.backends.tensorrt.store import CAPACITY_STEP
from trt_runtime.decoding.backend import Backend, Cache, Stats, Window
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.generator import Generator
from trt_runtime.decoding.rules import check_prompt, rules_of
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.measure import tolerances

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class RecordedCall:
    """A call of a graph, by the names of its contract. inputs: caches in float32, the rest int64. outputs:
    token int64, the rest float32 (logits if they were requested)."""

    role: str
    inputs: dict[str, Array]
    outputs: dict[str, Array]

    @property
    def capacity(self) -> int:
        return int(next(array.shape[2] for name, array in self.inputs.items() if name.startswith("cache_")))


class Recording(Backend):
    """A backend that records its calls: those whose numbers are in `wanted`, or only how many of each role
    there are."""

    name = "recording"

    def __init__(self, inner: Backend, wanted: dict[str, set[int]] | None = None) -> None:
        self.inner, self.manifest, self.max_batch, self.wanted = (
            inner,
            inner.manifest,
            inner.max_batch,
            wanted,
        )
        self.counts = dict.fromkeys(contract.ROLES, 0)
        self.calls: list[RecordedCall] = []

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return self.inner.new_cache(batch, -(-capacity // CAPACITY_STEP) * CAPACITY_STEP)

    def close(self) -> None:
        self.inner.close()

    def _forward(self, role: str, cache: Cache, slots: slice, window: Window, want_logits: bool) -> Stats:
        self.counts[role] += 1
        is_wanted = self.wanted is not None and self.counts[role] - 1 in self.wanted[role]
        caches = self.inner.read_cache(cache, slots) if is_wanted else {}
        with_logits = is_wanted and self.manifest.head == contract.LOGITS
        stats = self.inner.forward(role, cache, slots, window, want_logits=with_logits)
        if is_wanted:
            arrays = {item.name: getattr(window, item.name) for item in fields(window)} | caches
            inputs = {spec.name: arrays[spec.name] for spec in contract.inputs(role, self.manifest.dims)}
            self.calls.append(
                RecordedCall(
                    role, inputs, outputs_of(stats, self.inner.read_cache(cache, slots), self.manifest.dims)
                )
            )
        return stats


def outputs_of(stats: Stats, caches: dict[str, Array], dims: contract.Dims) -> dict[str, Array]:
    """The outputs of a graph by name, from the statistics that a backend returns."""
    outputs = {name: getattr(stats, name) for name in contract.STATISTICS}
    if stats.logits is not None:
        outputs[contract.LOGITS] = stats.logits
    return outputs | dict(
        zip(
            contract.returned_names(dims),
            (caches[name] for name in contract.cache_names("cache", dims)),
            strict=True,
        )
    )


def window_of(inputs: dict[str, Array]) -> Window:
    """The window of a call, from the inputs of its graph."""
    row_len = inputs.get("row_len")
    kv_len = inputs["kv_len"] if row_len is None else row_len.max(1)
    zeros = np.zeros(len(kv_len), np.int64)
    return Window(
        inputs["input_ids"],
        inputs["position_ids"],
        inputs.get("write_index", zeros),
        kv_len,
        inputs["logit_rows"],
        row_len,
    )


def replayed(backend: Backend, role: str, inputs: dict[str, Array], *, want_logits: bool) -> dict[str, Array]:
    """A call on another backend, in a cache of its own with the same contents: the outputs of the graph."""
    caches = {name: value for name, value in inputs.items() if name.startswith("cache_")}
    batch, capacity = len(inputs["input_ids"]), next(iter(caches.values())).shape[2]
    cache, slots = backend.new_cache(batch, capacity), slice(0, batch)
    beyond = ((0, 0), (0, 0), (0, cache.capacity - capacity), (0, 0))  # engines have a capacity of their own
    backend.write_cache(
        cache, slots, {name: np.pad(value.astype(np.float32), beyond) for name, value in caches.items()}
    )
    stats = backend.forward(role, cache, slots, window_of(inputs), want_logits=want_logits)
    after = {name: value[:, :, :capacity] for name, value in backend.read_cache(cache, slots).items()}
    return outputs_of(stats, after, backend.manifest.dims)


def decode(
    backend: Backend, prompts: Rows[list[int]], config: GenerationConfig, count: int
) -> list[RecordedCall]:
    """Decode prompts as one batch, and return `count` calls per role (or all, if there are fewer), spread
    over the decoding."""
    whole = Recording(backend)
    _run(whole, prompts, config)
    wanted = {
        role: set(np.linspace(0, number - 1, min(count, number)).astype(int).tolist())
        for role, number in whole.counts.items()
    }
    again = Recording(backend, wanted)
    _run(again, prompts, config)
    return sorted(again.calls, key=lambda call: call.role)


def _run(backend: Recording, prompts: Rows[list[int]], config: GenerationConfig) -> None:
    resolved = config.resolved(backend.manifest)
    for prompt in prompts:
        check_prompt(prompt, resolved, backend.manifest)
    rules = rules_of(resolved, backend.manifest)
    Generator(
        backend, [Sequence(np.array(prompt, np.int64), rules, seed) for seed, prompt in enumerate(prompts)]
    ).run()


def allowed(calls: Iterable[RecordedCall], dtype: str) -> dict[str, float]:
    """How far apart two correct computations may be, per output: the table of
    trt_runtime/measure/tolerances.py, with relative tolerances scaled by the largest value."""
    largest: dict[str, float] = {}
    for call in calls:
        for name, value in call.outputs.items():
            largest[name] = max(largest.get(name, 1.0), float(np.abs(value).max()))
    logits, caches = tolerances.LOGITS[dtype], tolerances.CACHE[dtype]
    kinds = {
        "token": 0.0,
        "confidence": tolerances.CONFIDENCE[dtype],
        "runner_up": tolerances.CONFIDENCE[dtype],
    }
    return {
        name: kinds[name]
        if name in kinds
        else (logits if name in (contract.LOGITS, "entropy") else caches) * size
        for name, size in largest.items()
    }
