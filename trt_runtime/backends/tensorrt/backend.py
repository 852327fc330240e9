"""TensorRT and TensorRT-RTX: engines run on a GPU through cuda-python, without torch.

Caches stay on the GPU, with one address for input and output (caches.py). A call copies a few small arrays
in, queues one execution, and copies the statistics out (calls.py). Each profile has an execution context, and
all contexts share one scratch memory, because they run one after the other. A refine step whose shape is
repeated is recorded as a CUDA graph (recorded.py).

Shape letters as in contract.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends import cuda
from trt_runtime.backends.commit_kernel import CommitKernel
from trt_runtime.backends.tensorrt import store
from trt_runtime.backends.tensorrt.caches import CacheLayout, DeviceBuffers
from trt_runtime.backends.tensorrt.calls import Call, Calls
from trt_runtime.backends.tensorrt.engines import Engines, RTXEngines
from trt_runtime.backends.tensorrt.recorded import Recorder
from trt_runtime.decoding import device_commit
from trt_runtime.decoding.backend import Backend, Cache, Stats, Window, pooled
from trt_runtime.decoding.device_commit import Committed
from trt_runtime.decoding.policies.base import CommitRule
from trt_runtime.errors import BackendError, DllmError


class TensorRTBackend(Backend):
    """An artifact on TensorRT engines that `dllm-trt build` made.

    engines: the directory of the engine cache. device: the GPU's number. cuda_graphs: record refine steps.
    steps_per_sync: refine steps that the GPU runs before the host synchronises (above 1 it needs engines
    built with --plugins). batch, length: the rows per call and tokens per canvas that the engines must at
    least support.
    """

    name: ClassVar[str] = "tensorrt"
    _opener: ClassVar[type[Engines]] = Engines

    def __init__(
        self,
        artifact: Path,
        *,
        engines: str | Path = "engines",
        device: int = 0,
        cuda_graphs: bool = True,
        steps_per_sync: int = 1,
        batch: int = 1,
        length: int = 1,
    ) -> None:
        self.manifest, self.steps_per_sync = manifests.load(artifact), steps_per_sync
        trt = store.load(self.name)
        self._device = cuda.CudaDevice(device)
        wanted = store.circumstances(self.manifest, self.name, trt, self._device.facts)
        self.directory = store.find(Path(engines), wanted, store.Needs(batch, length, steps_per_sync > 1))
        # hashes are checked first
        built_for = store.check(self.directory, {"files": wanted["files"], "version": wanted["version"]})
        if built_for.get("strip"):
            manifests.load(artifact, check_hashes=True)  # its weights are put into the engine
        self.capacity: int = built_for["capacity"]
        self._engines = self._opener(self.directory, artifact, self.manifest, trt, self._device, built_for)
        self.max_batch = max(
            profile.largest[0] for engine in self._engines.all for profile in engine.profiles
        )
        self._caches = CacheLayout(self.manifest, self._device, self.capacity)
        self._calls = Calls(self._engines, self._device, trt)
        # rows written by the host (legacy lowering) have new addresses each time, so they are not recorded
        records = cuda_graphs and self.manifest.dims.writes_caches
        self._recorder = Recorder(self._engines, self._device, self.directory, is_on=records)
        self._new_rows = self._allocate_new_rows()
        self._pool: dict[tuple[int, int], DeviceBuffers] = {}
        self._commit = self._commit_kernel(built_for["plugins"].get("commit"))

    @property
    def unrecorded(self) -> set[tuple[Any, ...]]:
        """Calls that could not be recorded as CUDA graphs, by engine, profile and shape."""
        return self._recorder.unrecorded

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """A cache of the engines' fixed capacity. Raises DllmError if that is too small."""
        if capacity > self.capacity:
            raise DllmError(
                f"the canvas has {capacity} tokens, the engines support {self.capacity}: build them with "
                f"--max-length {capacity}."
            )
        buffers = self._pool.pop((batch, self.capacity), None) or self._caches.allocate(batch)
        return pooled(Cache(batch, self.capacity, buffers), self._pool)

    def read_cache(self, cache: Cache, slots: slice) -> dict[str, Any]:
        return self._caches.read(cache.buffers, slots)

    def write_cache(self, cache: Cache, slots: slice, arrays: Mapping[str, Any]) -> None:
        self._caches.write(cache.buffers, slots, arrays)

    def close(self) -> None:
        self._device.synchronize()
        self._pool.clear()
        self._engines.close()
        del self._engines, self._calls, self._recorder, self._new_rows, self._commit

    def _forward(self, role: str, cache: Cache, slots: slice, window: Window, want_logits: bool) -> Stats:
        call = self._calls.prepare(role, window)
        wanted = [name for name in call.outputs if want_logits or name != contract.LOGITS]

        def work(context: Any) -> None:
            self._upload_inputs(call)
            self._execute(call, context, cache, slots, window)
            if len(wanted) == len(call.outputs):
                arena = self._calls.outputs
                self._device.download(arena.host[: call.output_bytes], arena.device.address)
            else:
                for name in wanted:
                    self._device.download(call.outputs[name], call.output_addresses[name])

        self._queue(work, call, cache, slots, (slots.start, want_logits) if role == "refine" else None)
        self._device.synchronize()
        asked, dtypes = window.logit_rows.shape[1], {"token": np.int64}
        stats: dict[str, Any] = {
            name: call.outputs[name][:, :asked].astype(dtypes.get(name, np.float32)) for name in wanted
        }
        return Stats(**stats)

    def _refine_steps(
        self, cache: Cache, slots: slice, window: Window, rules: Sequence[CommitRule]
    ) -> Committed:
        call, kernel = self._calls.prepare("refine", window), self._commit
        if kernel is None or call.inputs["input_ids"].dtype != np.int64:
            raise DllmError(
                f"{self.directory}: has no commit kernel, which steps_per_sync needs: build with --plugins "
                f"and TensorRT 10 or newer."
            )
        running = kernel.begin(rules, call.shape[2])
        self._upload_inputs(call)
        ids = call.input_addresses["input_ids"]

        def step(context: Any) -> None:
            self._execute(call, context, cache, slots, window)
            kernel.queue(
                running,
                ids,
                call.shape[1],
                call.output_addresses["token"],
                call.output_addresses["confidence"],
            )

        mask = self.manifest.decoding.mask_token_id
        for _ in range(device_commit.needed(rules, window.input_ids, mask, self.steps_per_sync)):
            self._queue(step, call, cache, slots, (slots.start, "commit"))
        self._device.download(call.inputs["input_ids"], ids)
        kernel.end(running)
        self._device.synchronize()
        return device_commit.finished(running.arrays, rules, call.inputs["input_ids"].copy())

    def _upload_inputs(self, call: Call) -> None:
        arena = self._calls.inputs
        self._device.upload(arena.device.address, arena.host[: call.input_bytes])

    def _execute(self, call: Call, context: Any, cache: Cache, slots: slice, window: Window) -> None:
        """Queue one execution, after the upload of the inputs and before the download of the statistics."""
        if not context.execute_async_v3(self._device.stream):
            raise BackendError(f"TensorRT failed in the engine '{call.engine.name}': {self._last_message}")
        if not self.manifest.dims.writes_caches:
            self._caches.write_window(cache.buffers, slots, window, self._new_rows)

    def _queue(
        self,
        work: Callable[[Any], None],
        call: Call,
        cache: Cache,
        slots: slice,
        kind: tuple[Any, ...] | None,
    ) -> None:
        """Queue the work of a call. kind: what besides the call identifies repeated work."""
        key = None if kind is None else (*call.key, *kind)
        self._recorder.queue(
            call, cache.buffers.steps, key, lambda context: self._bind(call, context, cache, slots), work
        )

    def _bind(self, call: Call, context: Any, cache: Cache, slots: slice) -> None:
        """Set the shapes of the inputs and the address of every tensor; caches are the same for input and
        output, from the first slot."""
        sizes = dict(zip("BSR", call.shape, strict=True)) | {"C": self.capacity}
        for spec in call.engine.inputs:
            shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes)
            if not context.set_input_shape(spec.name, shape):
                raise BackendError(f"TensorRT refused the shape of {spec.name} ({self._last_message})")
        caches, dims = self._caches.addresses(cache.buffers, slots), self.manifest.dims
        written = caches.values() if dims.writes_caches else (memory.address for memory in self._new_rows)
        returned = dict(zip(contract.returned_names(dims), written, strict=True))
        for name, address in (call.input_addresses | call.output_addresses | caches | returned).items():
            if name in call.engine.tensors and not context.set_tensor_address(name, address):
                raise BackendError(f"TensorRT refused the address of {name} ({self._last_message})")

    def _allocate_new_rows(self) -> list[cuda.DeviceMemory]:
        """Buffers for the window's keys and values, which engines of the legacy lowering return; nothing for
        others."""
        if self.manifest.dims.writes_caches:
            return []
        profiles = [profile for engine in self._engines.all for profile in engine.profiles]
        most = max(profile.largest[0] * profile.largest[1] for profile in profiles)
        size = most * self.manifest.model.num_kv_heads * self._caches.position_bytes
        return [self._device.allocate(size) for _ in contract.returned_names(self.manifest.dims)]

    def _commit_kernel(self, facts: dict[str, Any] | None) -> CommitKernel | None:
        """The commit kernel of engines built with --plugins."""
        if facts is None:
            return None
        assert self.max_batch is not None
        return CommitKernel(
            self._device, facts, (self.directory / facts["file"]).read_bytes(), self.max_batch
        )

    @property
    def _last_message(self) -> str:
        return self._engines.logger.last or "no message"


class TensorRTRTXBackend(TensorRTBackend):
    """The same for TensorRT-RTX."""

    name: ClassVar[str] = "tensorrt-rtx"
    _opener: ClassVar[type[Engines]] = RTXEngines
