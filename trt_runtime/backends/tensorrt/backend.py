"""TensorRT and TensorRT-RTX: engines run on a GPU through cuda-python, without torch.

Caches lie on the device, one address for input and output. A call copies a few small arrays in, queues one
execution, and copies the statistics out. Each profile has an execution context, and all contexts share one
scratch memory, for they run one after the other. A refine step of a shape that comes again is recorded as a
CUDA graph and launched as a whole.

Shape letters as in contract.py.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.contract import TensorSpec
from trt_runtime.backends import cuda
from trt_runtime.backends.commit_kernel import CommitKernel
from trt_runtime.backends.tensorrt import store
from trt_runtime.backends.tensorrt.engines import Engines, Opened, RTXEngines
from trt_runtime.decoding import device_commit as steps
from trt_runtime.decoding.backend import Backend, Cache, Stats, Window, narrowed, pooled, widened
from trt_runtime.decoding.device_commit import Committed
from trt_runtime.decoding.policies.base import CommitRule
from trt_runtime.errors import BackendError, DllmError

Arrays = dict[str, npt.NDArray[Any]]
Shape = tuple[int, int, int]  # B, S, R of a call
_MOST_STEPS = 64  # of a cache that are kept with a context of their own
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Call:
    """A call whose inputs stand ready in pinned memory: where its small tensors lie, and how much of each
    arena they take."""

    held: Opened
    index: int
    shape: Shape
    given: Arrays
    into: dict[str, int]
    used: int
    made: Arrays
    out: dict[str, int]
    answer: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self.held.name, self.index, self.shape


@dataclass(frozen=True)
class _Step:
    """A step that comes again: a context that nothing else uses, its shapes and addresses set; and what was
    recorded of it (None where the package records by itself, or nothing can be recorded)."""

    context: Any
    graph: cuda.Graph | None


@dataclass
class _Buffers:
    """Caches of a model by name; and steps by what they depend on, the latest last (None: seen once)."""

    caches: dict[str, cuda.DeviceMemory]
    steps: OrderedDict[tuple[Any, ...], _Step | None] = field(default_factory=OrderedDict)


class TensorRTBackend(Backend):
    """An artifact on TensorRT engines that `dllm-trt build` made.

    engines: the directory below which they lie. device: the GPU's number. cuda_graphs: record refine steps.
    steps_per_sync: refine steps that the GPU makes by itself before the host looks (above 1, with engines
    built with --plugins). batch, length: rows at a time and tokens that the engines must at least take.
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
        self._trt = store.load(self.name)
        self._device, self._cuda_graphs = cuda.CudaDevice(device), cuda_graphs
        wanted = store.circumstances(self.manifest, self.name, self._trt, self._device.facts)
        self.directory = store.find(Path(engines), wanted, store.Needs(batch, length, steps_per_sync > 1))
        built_for = store.check(
            self.directory, {"files": wanted["files"], "version": wanted["version"]}
        )  # hashes come first
        if built_for.get("strip"):
            manifests.load(artifact, check_hashes=True)  # its weights go into the engine
        self.capacity: int = built_for["capacity"]
        self._engines = self._opener(
            self.directory, artifact, self.manifest, self._trt, self._device, built_for
        )
        self._logger = self._engines.logger
        self.max_batch = max(profile.batch[2] for held in self._engines.all for profile in held.profiles)
        self._inputs, self._outputs = self._arena(outputs=False), self._arena(outputs=True)
        self._fresh = self._fresh_rows()
        self._pool: dict[tuple[int, int], _Buffers] = {}
        self.unrecorded: set[tuple[Any, ...]] = (
            set()
        )  # steps that could not be recorded, by name, profile and shape
        kernel = built_for["plugins"].get("commit")
        self._commit = (
            CommitKernel(self._device, kernel, (self.directory / kernel["file"]).read_bytes(), self.max_batch)
            if kernel
            else None
        )

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """A cache of the engines' own capacity. Raises DllmError where that does not suffice."""
        if capacity > self.capacity:
            raise DllmError(
                f"a canvas of {capacity} tokens: the engines hold {self.capacity}: build them with "
                f"--max-length {capacity}."
            )
        names = contract.cache_names("cache", self.manifest.dims)
        size = batch * self._row_bytes * self.capacity * self.manifest.model.num_kv_heads
        buffers = self._pool.pop((batch, self.capacity), None)
        return pooled(
            Cache(
                batch,
                self.capacity,
                buffers or _Buffers({name: self._device.allocate(size) for name in names}),
            ),
            self._pool,
        )

    def read_cache(self, cache: Cache, slots: slice) -> dict[str, Any]:
        made = {}
        for name, memory in cache.buffers.caches.items():
            array, offset = self._rows_of(slots)
            self._device.download(array, memory.address + offset)
            made[name] = array
        self._device.synchronize()
        return {name: widened(array, self.manifest.model.dtype) for name, array in made.items()}

    def write_cache(self, cache: Cache, slots: slice, arrays: Mapping[str, Any]) -> None:
        held, (_, offset) = {}, self._rows_of(slots)
        for name, array in arrays.items():
            held[name] = np.ascontiguousarray(narrowed(array, self.manifest.model.dtype))
            self._device.upload(cache.buffers.caches[name].address + offset, held[name])
        self._device.synchronize()  # until then the arrays have to stay

    def _rows_of(self, slots: slice) -> tuple[npt.NDArray[Any], int]:
        """An array for the rows of `slots` in a cache, and how far they lie from its beginning."""
        model = self.manifest.model
        kind = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}[model.dtype]
        shape = (slots.stop - slots.start, model.num_kv_heads, self.capacity, model.head_dim)
        return np.empty(shape, kind), slots.start * model.num_kv_heads * self.capacity * self._row_bytes

    def close(self) -> None:
        self._device.synchronize()
        self._pool.clear()
        self._engines.close()
        del self._engines, self._inputs, self._outputs, self._fresh, self._commit

    def _forward(self, role: str, cache: Cache, slots: slice, window: Window, want_logits: bool) -> Stats:
        call = self._call(role, window)
        wanted = [name for name in call.made if want_logits or name != contract.LOGITS]

        def work(context: Any) -> None:
            self._device.upload(self._inputs.device.address, self._inputs.host[: call.used])
            self._execute(call, context, cache, slots, window)
            if len(wanted) == len(call.made):
                self._device.download(self._outputs.host[: call.answer], self._outputs.device.address)
            else:
                for name in wanted:
                    self._device.download(call.made[name], call.out[name])

        self._queue(
            work, call, cache, slots, (*call.key, slots.start, want_logits) if role == "refine" else None
        )
        self._device.synchronize()
        asked, kinds = window.logit_rows.shape[1], {"token": np.int64}
        stats: dict[str, Any] = {
            name: call.made[name][:, :asked].astype(kinds.get(name, np.float32)) for name in wanted
        }
        return Stats(**stats)

    def _refine_steps(
        self, cache: Cache, slots: slice, window: Window, rules: Sequence[CommitRule]
    ) -> Committed:
        call, kernel = self._call("refine", window), self._commit
        if kernel is None or call.given["input_ids"].dtype != np.int64:
            raise DllmError(
                f"{self.directory}: has no commit kernel for steps_per_sync: build with --plugins, and "
                f"TensorRT 10 or newer."
            )
        held = kernel.begin(rules, call.shape[2])
        self._device.upload(self._inputs.device.address, self._inputs.host[: call.used])

        def step(context: Any) -> None:
            self._execute(call, context, cache, slots, window)
            kernel.queue(
                held, call.into["input_ids"], call.shape[1], call.out["token"], call.out["confidence"]
            )

        for _ in range(
            steps.needed(rules, window.input_ids, self.manifest.decoding.mask_token_id, self.steps_per_sync)
        ):
            self._queue(step, call, cache, slots, (*call.key, slots.start, "commit"))
        self._device.download(call.given["input_ids"], call.into["input_ids"])
        kernel.end(held)
        self._device.synchronize()
        return steps.finished(held.arrays, rules, call.given["input_ids"].copy())

    def _call(self, role: str, window: Window) -> _Call:
        """Choose an engine and put the inputs into pinned memory."""
        self._device.enter()
        batch, rows = window.input_ids.shape
        asked = window.logit_rows.shape[1]
        held, index = self._choose(role, (batch, rows, asked))
        # few shapes, so that recorded steps come again: what is asked for is filled up with row 0
        most = held.profiles[index].asked[2]
        shape = (
            batch,
            rows,
            most if role == "refine" and most <= rows else min(1 << (asked - 1).bit_length(), most),
        )
        call = _Call(
            held,
            index,
            shape,
            *self._inputs.place(self._small(held.inputs, held, shape)),
            *self._outputs.place(self._small(held.outputs, held, shape)),
        )
        call.given["logit_rows"][...] = 0
        call.given["logit_rows"][:, :asked] = window.logit_rows
        for name in call.given.keys() - {"logit_rows"}:
            call.given[name][...] = getattr(window, name)
        return call

    def _execute(self, call: _Call, context: Any, cache: Cache, slots: slice, window: Window) -> None:
        """Queue one execution, between the inputs and the statistics on the device."""
        if not context.execute_async_v3(self._device.stream):
            raise BackendError(
                f"TensorRT failed in the engine '{call.held.name}': {self._logger.last or 'no message'}"
            )
        if not self.manifest.dims.writes_caches:
            self._write_rows(cache, slots, window)

    def _queue(
        self,
        work: Callable[[Any], None],
        call: _Call,
        cache: Cache,
        slots: slice,
        key: tuple[Any, ...] | None,
    ) -> None:
        """Queue work: as it stands, or, where a key says that it may come again, from the second time on as a
        CUDA graph. Rows that the host counts (legacy lowering) go elsewhere each time and are not
        recorded."""
        steps_of: OrderedDict[tuple[Any, ...], _Step | None] = cache.buffers.steps
        if (
            key is None
            or not self._cuda_graphs
            or not self.manifest.dims.writes_caches
            or key not in steps_of
        ):
            context = self._engines.context(call.held, call.index)
            self._bind(call, context, cache, slots)
            work(context)
            if key is not None:
                steps_of[key] = None
            return
        made = steps_of.pop(key)
        if made is None:
            made = self._run_and_record(work, call, cache, slots)
        elif made.graph is not None:
            self._device.launch(made.graph)
        else:
            work(made.context)
        steps_of[key] = made  # the latest last
        with_context = [known for known, step in steps_of.items() if step is not None]
        for oldest in with_context[:-_MOST_STEPS]:
            self._device.synchronize()  # it may be under way
            del steps_of[oldest]

    def _run_and_record(self, work: Callable[[Any], None], call: _Call, cache: Cache, slots: slice) -> _Step:
        """Run a step in a context of its own, whose shapes and addresses are set once, before anything is
        recorded."""
        context = self._engines.new_context(call.held, call.index, recorded=True)
        self._bind(call, context, cache, slots)
        work(context)
        if self._engines.records_itself or call.key in self.unrecorded:
            return _Step(context, None)
        self._device.synchronize()  # TensorRT asks for a run in the same shapes before
        try:
            return _Step(context, self._device.record(lambda: work(context)))
        except BackendError as error:  # some layers cannot be captured; the run before it was good
            self.unrecorded.add(call.key)
            _LOG.warning(
                "%s: a step of %d rows by %d positions cannot be recorded as a CUDA graph, and is queued "
                "layer by layer: %s",
                self.directory,
                *call.shape[:2],
                error,
            )
            return _Step(context, None)

    def _choose(self, role: str, shape: Shape) -> tuple[Opened, int]:
        """The engine and the narrowest profile that take a call of B rows, S rows of the window and R rows
        asked for."""
        fitting = []
        for held in self._engines.all:
            for index, profile in enumerate(held.profiles):
                limits = (profile.batch[2], profile.rows[2], profile.asked[2])
                if (held.role == role or held.name == store.SHARED) and all(
                    n <= m for n, m in zip(shape, limits, strict=True)
                ):
                    fitting.append((profile.rows[2], index, held))
        if not fitting:
            asked = "{} rows by {} positions, {} of them asked for".format(*shape)
            raise DllmError(
                f"a {role} call of {asked}: no profile of the engines in {self.directory.name} takes it: "
                f"build them with a larger "
                "--max-batch, --max-length, --block-length or --max-rows."
            )
        _, index, held = min(fitting, key=lambda item: item[0])
        return held, index

    def _bind(self, call: _Call, context: Any, cache: Cache, slots: slice) -> None:
        """Shapes of the inputs and the address of every tensor: the caches' are those of the first slot, the
        same in and out."""
        held, shape, small = call.held, call.shape, call.into | call.out
        sizes = dict(zip("BSR", shape, strict=True)) | {"C": self.capacity}
        dims = self.manifest.dims
        for spec in held.inputs:
            if not context.set_input_shape(
                spec.name, tuple(sizes[a] if isinstance(a, str) else a for a in spec.axes)
            ):
                raise BackendError(
                    f"TensorRT refused the shape of {spec.name} ({self._logger.last or 'no message'})"
                )
        first = slots.start * self._row_bytes * self.capacity * dims.num_kv_heads
        caches = {name: memory.address + first for name, memory in cache.buffers.caches.items()}
        returned = dict(
            zip(
                contract.returned_names(dims),
                caches.values() if dims.writes_caches else (memory.address for memory in self._fresh),
                strict=True,
            )
        )
        for name, address in (small | caches | returned).items():
            if name in held.tensors and not context.set_tensor_address(name, address):
                raise BackendError(
                    f"TensorRT refused the address of {name} ({self._logger.last or 'no message'})"
                )

    def _write_rows(self, cache: Cache, slots: slice, window: Window) -> None:
        """The window's keys and values into the caches, at each row's write_index: what the legacy lowering
        leaves to its caller."""
        heads, rows = self.manifest.model.num_kv_heads, window.input_ids.shape[1]
        piece, pitch = rows * self._row_bytes, self.capacity * self._row_bytes
        for memory, fresh in zip(cache.buffers.caches.values(), self._fresh, strict=True):
            for i, start in enumerate(window.write_index):
                target = (
                    memory.address
                    + ((slots.start + i) * heads * self.capacity + int(start)) * self._row_bytes
                )
                self._device.copy_rows(target, pitch, fresh.address + i * heads * piece, piece, piece, heads)

    def _small(
        self, specs: list[TensorSpec], held: Opened, shape: Shape
    ) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Element type and shape of what is no cache. TensorRT 8 has int32 where the graph says int64."""
        sizes = dict(zip("BSR", shape, strict=True))
        return {
            spec.name: (
                np.dtype(self._trt.nptype(held.engine.get_tensor_dtype(spec.name))),
                tuple(sizes[a] if isinstance(a, str) else a for a in spec.axes),
            )
            for spec in specs
            if not _is_cache(spec)
        }

    def _arena(self, outputs: bool) -> cuda.Arena:
        """Room for the small inputs or outputs in the largest shapes of the profiles."""
        size = 0
        for held in self._engines.all:
            for profile in held.profiles:
                shape = (profile.batch[2], profile.rows[2], profile.asked[2])
                size = max(
                    size,
                    cuda.Arena.size_of(self._small(held.outputs if outputs else held.inputs, held, shape)),
                )
        return self._device.arena(size)

    def _fresh_rows(self) -> list[cuda.DeviceMemory]:
        """Where engines of the legacy lowering put the window's keys and values; nothing for the others."""
        if self.manifest.dims.writes_caches:
            return []
        rows = max(
            profile.batch[2] * profile.rows[2] for held in self._engines.all for profile in held.profiles
        )
        size = rows * self.manifest.model.num_kv_heads * self._row_bytes
        return [self._device.allocate(size) for _ in contract.returned_names(self.manifest.dims)]

    @property
    def _row_bytes(self) -> int:
        """Bytes of a key or value of one head at one position."""
        return self.manifest.model.head_dim * contract.ITEM_SIZE[self.manifest.dims.dtype]


class TensorRTRTXBackend(TensorRTBackend):
    """The same on TensorRT-RTX."""

    name: ClassVar[str] = "tensorrt-rtx"
    _opener: ClassVar[type[Engines]] = RTXEngines


def _is_cache(spec: TensorSpec) -> bool:
    return "." in spec.name
