"""The keys and values of a model on the GPU: one buffer per cache, which engines read and write in place.
Shape letters as in contract.py."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_runtime.artifact import contract
from trt_runtime.artifact.manifest import Manifest
from trt_runtime.backends import cuda
from trt_runtime.backends.tensorrt.recorded import Key, RecordedStep
from trt_runtime.decoding.backend import Window, narrowed, widened

_HOST_DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}  # NumPy has no bfloat16


@dataclass
class DeviceBuffers:
    """The caches of a model by name, and its recorded steps by key, the latest last (None: the step ran
    once, and is not recorded yet)."""

    caches: dict[str, cuda.DeviceMemory]
    steps: OrderedDict[Key, RecordedStep | None] = field(default_factory=OrderedDict)


@dataclass(frozen=True)
class CacheLayout:
    """The layout [slots, H, capacity, D] of every cache. capacity: positions per slot, fixed when engines are
    built."""

    manifest: Manifest
    device: cuda.CudaDevice
    capacity: int

    @property
    def position_bytes(self) -> int:
        """Bytes of a key or value of one head at one position."""
        return self.manifest.model.head_dim * contract.ITEM_SIZE[self.manifest.dims.dtype]

    @property
    def slot_bytes(self) -> int:
        return self.manifest.model.num_kv_heads * self.capacity * self.position_bytes

    def allocate(self, batch: int) -> DeviceBuffers:
        """Zeroed caches of `batch` slots."""
        names = contract.cache_names("cache", self.manifest.dims)
        return DeviceBuffers({name: self.device.allocate(batch * self.slot_bytes) for name in names})

    def addresses(self, buffers: DeviceBuffers, slots: slice) -> dict[str, int]:
        """The address of the first of `slots` in each cache."""
        return {
            name: memory.address + slots.start * self.slot_bytes for name, memory in buffers.caches.items()
        }

    def read(self, buffers: DeviceBuffers, slots: slice) -> dict[str, Any]:
        """The caches of `slots` in float32 [slots, H, capacity, D], by name."""
        arrays = {name: self._host_array(slots) for name in buffers.caches}
        for name, address in self.addresses(buffers, slots).items():
            self.device.download(arrays[name], address)
        self.device.synchronize()
        return {name: widened(array, self.manifest.model.dtype) for name, array in arrays.items()}

    def write(self, buffers: DeviceBuffers, slots: slice, arrays: Mapping[str, Any]) -> None:
        """Write what `read` returned into the caches."""
        addresses, sources = self.addresses(buffers, slots), {}
        for name, array in arrays.items():
            sources[name] = np.ascontiguousarray(narrowed(array, self.manifest.model.dtype))
            self.device.upload(addresses[name], sources[name])
        self.device.synchronize()  # the arrays must not be freed before

    def write_window(
        self, buffers: DeviceBuffers, slots: slice, window: Window, new: list[cuda.DeviceMemory]
    ) -> None:
        """Copy the keys and values of a window into the caches, at each row's write_index: engines of the
        legacy lowering leave that to their caller. new: a buffer [B, H, S, D] per cache."""
        heads, positions = self.manifest.model.num_kv_heads, window.input_ids.shape[1]
        piece, pitch = positions * self.position_bytes, self.capacity * self.position_bytes
        for first, source in zip(self.addresses(buffers, slots).values(), new, strict=True):
            for i, start in enumerate(window.write_index):
                target = first + i * self.slot_bytes + int(start) * self.position_bytes
                self.device.copy_rows(target, pitch, source.address + i * heads * piece, piece, piece, heads)

    def _host_array(self, slots: slice) -> npt.NDArray[Any]:
        model = self.manifest.model
        shape = (slots.stop - slots.start, model.num_kv_heads, self.capacity, model.head_dim)
        return np.empty(shape, _HOST_DTYPES[model.dtype])
