"""Runners for Polygraphy's Comparator: any backend of ours (ONNX Runtime, TensorRT, the PyTorch reference) beside its own runners. Needs the `debug` extra.

    from polygraphy.comparator import Comparator
    Comparator.run([BackendRunner(backend, "refine"), BackendRunner(reference, "refine")], data_loader=feeds(calls, "refine", "fp32"))

A feed holds every input of a graph of the contract, caches too; what a runner gives are all of its outputs. Feeds are copied on the way in and out: one goes to
all runners.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator

from export.debug.record import Array, Call, outputs_of, run, window_of
from trt_runtime import contract
from trt_runtime.backends.base import Backend

_KINDS = {"int64": np.int64, "float32": np.float32, "float16": np.float16}


class BackendRunner(BaseRunner):  # type: ignore[misc]
    """A backend that is open, in a role. want_logits: whether logits are among the outputs."""

    def __init__(self, backend: Backend, role: str, name: str | None = None, *, want_logits: bool = False) -> None:
        super().__init__(name=name or backend.name, prefix=f"dllm-trt-{backend.name}")
        self.backend, self.role, self.want_logits = backend, role, want_logits

    def activate_impl(self) -> None:
        """The backend is open already."""

    def deactivate_impl(self) -> None:
        """It stays open: its owner closes it."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, element types and shapes (-1 where free); bf16 caches come in float32."""
        made = TensorMetadata()
        for spec in contract.inputs(self.role, self.backend.manifest.dims):
            made.add(spec.name, _KINDS.get(spec.dtype, np.float32), [axis if isinstance(axis, int) else -1 for axis in spec.axes])
        return made

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> OrderedDict[str, Array]:
        """One call over a cache of its own."""
        inputs = {name: np.array(value) for name, value in feed_dict.items()}
        caches = {name: value.astype(np.float32) for name, value in inputs.items() if name.startswith("cache_")}
        batch, capacity = len(inputs["kv_len"]), next(iter(caches.values())).shape[2]
        cache, slots = self.backend.new_cache(batch, capacity), slice(0, batch)
        longer = {name: np.pad(value, ((0, 0), (0, 0), (0, cache.capacity - capacity), (0, 0))) for name, value in caches.items()}
        self.backend.write_cache(cache, slots, longer)
        begin = time.perf_counter()
        stats = run(self.backend, self.role, cache, slots, window_of(inputs), want_logits=self.want_logits)
        self.inference_time = time.perf_counter() - begin
        after = {name: value[:, :, :capacity] for name, value in self.backend.read_cache(cache, slots).items()}
        return OrderedDict(outputs_of(stats, after, self.backend.manifest.dims))


def feeds(calls: Iterable[Call], role: str, dtype: str) -> list[dict[str, Array]]:
    """What runners of a role are given: the calls' inputs, caches in the dtype of the graph (of bf16 in float32)."""
    kind = np.float16 if dtype == "fp16" else np.float32
    return [{name: value.astype(kind) if name.startswith("cache_") else value for name, value in call.inputs.items()}
            for call in calls if call.role == role]  # fmt: skip


def differences(runners: list[BaseRunner], given: list[dict[str, Array]]) -> Iterator[tuple[str, str, int, dict[str, float]]]:
    """Run the runners over the same feeds, and compare each with the first one: its name, the first one's, the number of the feed, and the largest
    difference of each output. Tokens are compared by whether they differ."""
    results = Comparator.run(runners, data_loader=given)
    first, *others = results.items()
    for name, made in others:
        for number, (mine, theirs) in enumerate(zip(made, first[1], strict=True)):
            pairs = ((key, np.asarray(mine[key]), np.asarray(theirs[key])) for key in theirs if key in mine)
            yield (
                name,
                first[0],
                number,
                {
                    key: float((a != b).mean()) if key == "token" else float(np.abs(a.astype(np.float64) - b).max())
                    for key, a, b in pairs
                },
            )
