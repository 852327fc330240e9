"""ONNX Runtime on a CPU: caches are NumPy arrays, and several threads may call the session at the same time,
each with caches of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trt_runtime.backends.ort.session import Buffers, OrtSession
from trt_runtime.backends.spec import CPU
from trt_runtime.decoding.backend import Cache, Window, narrowed, widened
from trt_runtime.errors import DllmError

_DTYPES = ("fp32", "fp16")


@dataclass
class _Arrays(Buffers):
    arrays: dict[str, np.ndarray[Any, Any]]

    def address(self, name: str) -> int:
        return int(self.arrays[name].ctypes.data)


class OrtBackend(OrtSession):
    """An artifact in fp32 or fp16, or quantised for a CPU."""

    device: ClassVar[str] = CPU
    provider: ClassVar[str] = "CPUExecutionProvider"
    place: ClassVar[str] = CPU
    is_on_cpu = True
    is_concurrent = True

    def _check_artifact(self, artifact: Path) -> None:
        dtype = self.manifest.model.dtype
        if dtype not in _DTYPES:
            raise DllmError(
                f"{artifact}: dtype is {dtype}, which ONNX Runtime does not support on a CPU: export with "
                f"DTYPE=fp32 or fp16."
            )

    def new_cache(self, batch: int, capacity: int) -> Cache:
        model = self.manifest.model
        shape = (batch, model.num_kv_heads, capacity, model.head_dim)
        return Cache(batch, capacity, _Arrays({name: np.zeros(shape, self._zero) for name in self._names}))

    def resized(self, cache: Cache, capacity: int) -> Cache:
        """Attention on a CPU also computes masked rows, so a smaller cache is faster."""
        resized, kept = self.new_cache(cache.batch, capacity), min(capacity, cache.capacity)
        for name, array in cache.buffers.arrays.items():
            resized.buffers.arrays[name][:, :, :kept] = array[:, :, :kept]
        return resized

    def copy_slot(self, cache: Cache, source: int, slots: slice) -> bool:
        for array in cache.buffers.arrays.values():
            array[slots] = array[source]
        return True

    def read_cache(self, cache: Cache, slots: slice) -> dict[str, Any]:
        return {
            name: widened(array[slots], self.manifest.model.dtype)
            for name, array in cache.buffers.arrays.items()
        }

    def write_cache(self, cache: Cache, slots: slice, arrays: Mapping[str, Any]) -> None:
        for name, array in arrays.items():
            cache.buffers.arrays[name][slots] = narrowed(array, self.manifest.model.dtype)

    def _write(self, cache: Cache, slots: slice, window: Window, outputs: list[Any]) -> None:
        rows = window.input_ids.shape[1]
        for name, value in zip(self._names, outputs[: len(self._names)], strict=True):
            array, new = cache.buffers.arrays[name][slots], value.numpy()
            for i, start in enumerate(window.write_index):
                array[i, :, start : start + rows] = new[i]
