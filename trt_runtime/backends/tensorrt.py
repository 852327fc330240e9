"""TensorRT and TensorRT-RTX: engines run on a GPU through cuda-python, without torch.

Caches lie on the device, one address for input and output. A call copies a few small arrays in, queues one execution, and copies the
statistics out. Each profile has an execution context, and all contexts share one scratch memory, for they run one after the other. A
refine step of a shape that comes again is recorded as a CUDA graph and launched as a whole.

Shape letters as in contract.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from trt_runtime import builder, contract, cuda, engine, steps
from trt_runtime import manifest as manifests
from trt_runtime.backends.base import Backend, Cache, Stats, Window, pooled
from trt_runtime.backends.commit_kernel import CommitKernel
from trt_runtime.builder import Profile
from trt_runtime.contract import TensorSpec
from trt_runtime.errors import DllmError
from trt_runtime.policies import CommitRule
from trt_runtime.steps import Committed

Arrays = dict[str, npt.NDArray[Any]]
Shape = tuple[int, int, int]  # B, S, R of a call


@dataclass
class _Engine:
    """A deserialised engine: its graph's role, inputs and outputs, its profiles, and a context for each that was needed. `tensors` are
    the names that it knows: a prefix engine of the legacy lowering has no caches."""

    name: str
    role: str
    profiles: list[Profile]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    tensors: set[str]
    engine: Any
    contexts: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Call:
    """A call whose inputs stand ready in pinned memory: where its small tensors lie, and how much of each arena they take."""

    held: _Engine
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


@dataclass
class _Buffers:
    """Caches of a model by name; recorded steps by what they depend on (None: seen once, or not to be recorded), each with the context
    that it was recorded from, which nothing else uses."""

    caches: dict[str, cuda.Memory]
    graphs: dict[tuple[Any, ...], tuple[cuda.Graph, Any] | None] = field(default_factory=dict)


class TensorRTBackend(Backend):
    """An artifact on TensorRT engines that `dllm-trt build` made.

    engines: the directory below which they lie. device: the GPU's number. cuda_graphs: record refine steps. steps_per_look: refine
    steps that the GPU makes by itself before the host looks (above 1, with engines built with --plugins). batch, length: rows at a time
    and tokens that the engines must at least take.
    """

    name: ClassVar[str] = "tensorrt"

    def __init__(
        self,
        artifact: Path,
        *,
        engines: str | Path = "engines",
        device: int = 0,
        cuda_graphs: bool = True,
        steps_per_look: int = 1,
        batch: int = 1,
        length: int = 1,
    ) -> None:
        self.manifest, self.steps_per_look = manifests.load(artifact), steps_per_look
        self._artifact, self._trt = artifact, engine.load(self.name)
        self._device, self._cuda_graphs = cuda.Device(device), cuda_graphs
        wanted = engine.circumstances(self.manifest, self.name, self._trt, self._device.facts)
        self.directory = engine.find(Path(engines), wanted, engine.Needs(batch, length, steps_per_look > 1))
        built_for = engine.check(self.directory, {"files": wanted["files"], "version": wanted["version"]})  # hashes come first
        if built_for.get("strip"):
            manifests.load(artifact, check_hashes=True)  # its weights go into the engine
        self.capacity: int = built_for["capacity"]
        self._logger = builder.Logger(self._trt)
        self._runtime = self._trt.Runtime(self._logger.made)
        self._engines = [self._open(name, listed, built_for) for name, listed in built_for["profiles"].items()]
        self.max_batch = max(profile.batch[2] for held in self._engines for profile in held.profiles)
        self._scratch = self._device.allocate(
            max(_scratch_bytes(held, i) for held in self._engines for i in range(len(held.profiles)))
        )
        self._inputs, self._outputs = self._arena(outputs=False), self._arena(outputs=True)
        self._fresh = self._fresh_rows()
        self._pool: dict[tuple[int, int], _Buffers] = {}
        self._unrecorded: set[tuple[Any, ...]] = set()
        kernel = built_for["plugins"].get("commit")
        self._commit = (
            CommitKernel(self._device, kernel, (self.directory / kernel["file"]).read_bytes(), self.max_batch) if kernel else None
        )

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """A cache of the engines' own capacity. Raises DllmError where that does not suffice."""
        if capacity > self.capacity:
            raise DllmError(
                f"a canvas of {capacity} tokens: the engines hold {self.capacity}: build them with --max-length {capacity}."
            )
        names = contract.cache_names("cache", self.manifest.dims)
        size = batch * self._row_bytes * self.capacity * self.manifest.model.num_kv_heads
        buffers = self._pool.pop((batch, self.capacity), None)
        return pooled(
            Cache(batch, self.capacity, buffers or _Buffers({name: self._device.allocate(size) for name in names})), self._pool
        )

    def close(self) -> None:
        self._device.synchronize()
        self._pool.clear()
        for held in self._engines:
            held.contexts.clear()
        del self._engines, self._runtime, self._scratch, self._inputs, self._outputs, self._fresh, self._commit

    def _prefix(self, cache: Cache, slots: slice, window: Window, want_logits: bool) -> Stats:
        return self._run("prefix", cache, slots, window, want_logits)

    def _refine(self, cache: Cache, slots: slice, window: Window, want_logits: bool) -> Stats:
        return self._run("refine", cache, slots, window, want_logits)

    def _run(self, role: str, cache: Cache, slots: slice, window: Window, want_logits: bool) -> Stats:
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

        self._queue(work, call, cache.buffers, (*call.key, slots.start, want_logits) if role == "refine" else None)
        self._device.synchronize()
        asked, kinds = window.logit_rows.shape[1], {"token": np.int64}
        stats: dict[str, Any] = {name: call.made[name][:, :asked].astype(kinds.get(name, np.float32)) for name in wanted}
        return Stats(**stats)

    def _refine_steps(self, cache: Cache, slots: slice, window: Window, rules: Sequence[CommitRule]) -> Committed:
        call, kernel = self._call("refine", window), self._commit
        if kernel is None or call.given["input_ids"].dtype != np.int64:
            raise DllmError(
                f"{self.directory}: has no commit kernel for steps_per_look: build with --plugins, and TensorRT 10 or newer."
            )
        held = kernel.begin(rules, call.shape[2])
        self._device.upload(self._inputs.device.address, self._inputs.host[: call.used])

        def step(context: Any) -> None:
            self._execute(call, context, cache, slots, window)
            kernel.queue(held, call.into["input_ids"], call.shape[1], call.out["token"], call.out["confidence"])

        for _ in range(steps.needed(rules, window.input_ids, self.manifest.decoding.mask_token_id, self.steps_per_look)):
            self._queue(step, call, cache.buffers, (*call.key, slots.start, "commit"))
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
        shape = (batch, rows, most if role == "refine" and most <= rows else min(1 << (asked - 1).bit_length(), most))
        call = _Call(held, index, shape, *self._inputs.place(self._small(held.inputs, held, shape)),
                     *self._outputs.place(self._small(held.outputs, held, shape)))  # fmt: skip
        call.given["logit_rows"][...] = 0
        call.given["logit_rows"][:, :asked] = window.logit_rows
        for name in call.given.keys() - {"logit_rows"}:
            call.given[name][...] = getattr(window, name)
        return call

    def _execute(self, call: _Call, context: Any, cache: Cache, slots: slice, window: Window) -> None:
        """Queue one execution, between the inputs and the statistics on the device."""
        self._bind(call.held, context, call.shape, call.into | call.out, cache, slots)
        if not context.execute_async_v3(self._device.stream):
            raise DllmError(f"TensorRT failed in the engine '{call.held.name}': {self._logger.last or 'no message'}")
        if not self.manifest.dims.writes_caches:
            self._write_rows(cache, slots, window)

    def _queue(self, work: Callable[[Any], None], call: _Call, buffers: _Buffers, key: tuple[Any, ...] | None) -> None:
        """Queue work: the first time as it stands, the second time with a context of its own, behind which it is recorded (TensorRT asks
        for a run in the same shapes before), then as a CUDA graph. Rows that the host counts (legacy lowering) go elsewhere each time and
        are not recorded; nor is what refuses to be."""
        recorded = buffers.graphs.get(key) if key is not None else None
        if recorded is not None:
            self._device.launch(recorded[0])
            return
        is_second = key in buffers.graphs and key not in self._unrecorded
        context = self._new_context(call.held, call.index) if is_second else self._context(call.held, call.index)
        work(context)
        if key is None or not self._cuda_graphs or not self.manifest.dims.writes_caches:
            return
        buffers.graphs.setdefault(key, None)
        if is_second:
            try:
                buffers.graphs[key] = (self._device.record(lambda: work(context)), context)
            except DllmError:  # some layers cannot be captured; the run before it was good
                self._unrecorded.add(key)

    def _choose(self, role: str, shape: Shape) -> tuple[_Engine, int]:
        """The engine and the narrowest profile that take a call of B rows, S rows of the window and R rows asked for."""
        fitting = []
        for held in self._engines:
            for index, profile in enumerate(held.profiles):
                limits = (profile.batch[2], profile.rows[2], profile.asked[2])
                if (held.role == role or held.name == engine.SHARED) and all(n <= m for n, m in zip(shape, limits, strict=True)):
                    fitting.append((profile.rows[2], index, held))
        if not fitting:
            asked = "{} rows by {} positions, {} of them asked for".format(*shape)
            raise DllmError(
                f"a {role} call of {asked}: no profile of the engines in {self.directory.name} takes it: build them with a larger "
                "--max-batch, --max-length, --block-length or --max-rows."
            )
        _, index, held = min(fitting, key=lambda item: item[0])
        return held, index

    def _context(self, held: _Engine, index: int) -> Any:
        if index not in held.contexts:
            held.contexts[index] = self._new_context(held, index)
        return held.contexts[index]

    def _new_context(self, held: _Engine, index: int) -> Any:
        """A context for a profile. All share one working memory, for they run one after the other."""
        context = _bare_context(held.engine, self._trt)
        if context is not None:
            _set_scratch(context, self._scratch)
        if context is None or not context.set_optimization_profile_async(index, self._device.stream):
            raise DllmError(f"TensorRT gave no context for '{held.profiles[index].name}': {self._logger.last or 'no message'}")
        self._device.synchronize()
        return context

    def _bind(self, held: _Engine, context: Any, shape: Shape, small: dict[str, int], cache: Cache, slots: slice) -> None:
        """Shapes of the inputs and the address of every tensor: the caches' are those of the first slot, the same in and out."""
        sizes = dict(zip("BSR", shape, strict=True)) | {"C": self.capacity}
        dims = self.manifest.dims
        for spec in held.inputs:
            if not context.set_input_shape(spec.name, tuple(sizes[a] if isinstance(a, str) else a for a in spec.axes)):
                raise DllmError(f"TensorRT refused the shape of {spec.name} ({self._logger.last or 'no message'})")
        first = slots.start * self._row_bytes * self.capacity * dims.num_kv_heads
        caches = {name: memory.address + first for name, memory in cache.buffers.caches.items()}
        returned = dict(zip(contract.returned_names(dims), caches.values() if dims.writes_caches else
                            (memory.address for memory in self._fresh), strict=True))  # fmt: skip
        for name, address in (small | caches | returned).items():
            if name in held.tensors and not context.set_tensor_address(name, address):
                raise DllmError(f"TensorRT refused the address of {name} ({self._logger.last or 'no message'})")

    def _write_rows(self, cache: Cache, slots: slice, window: Window) -> None:
        """The window's keys and values into the caches, at each row's write_index: what the legacy lowering leaves to its caller."""
        heads, rows = self.manifest.model.num_kv_heads, window.input_ids.shape[1]
        piece, pitch = rows * self._row_bytes, self.capacity * self._row_bytes
        for memory, fresh in zip(cache.buffers.caches.values(), self._fresh, strict=True):
            for i, start in enumerate(window.write_index):
                target = memory.address + ((slots.start + i) * heads * self.capacity + int(start)) * self._row_bytes
                self._device.copy_rows(target, pitch, fresh.address + i * heads * piece, piece, piece, heads)

    def _open(self, name: str, profiles: list[dict[str, Any]], built_for: dict[str, Any]) -> _Engine:
        file = self.directory / (name + engine.SUFFIX)
        opened = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if opened is None:
            raise DllmError(
                f"{file}: TensorRT {self._trt.__version__} does not open it ({self._logger.last or 'no message'}): build it again."
            )
        role = "prefix" if name == "prefix" else "refine"
        if built_for.get("strip"):
            self._refit(opened, role)
        listed = [Profile(row["name"], tuple(row["batch"]), tuple(row["rows"]), tuple(row["asked"])) for row in profiles]
        dims = self.manifest.dims
        inputs, outputs = contract.inputs(role, dims), contract.outputs(role, dims, self.manifest.head)
        expected = {spec.name for spec in (*inputs, *outputs)}
        names = {opened.get_tensor_name(i) for i in range(opened.num_io_tensors)}
        if names != expected or opened.num_optimization_profiles != len(listed):
            raise DllmError(f"{file}: has the tensors {sorted(names)}, the contract says {sorted(expected)}: build it again.")
        return _Engine(name, role, listed, inputs, outputs, names, opened)

    def _refit(self, opened: Any, role: str) -> None:
        """Put the artifact's weights into an engine that was built without."""
        graph = self._artifact / self.manifest.graphs[role].file
        refitter = self._trt.Refitter(opened, self._logger.made)
        filler = self._trt.OnnxParserRefitter(refitter, self._logger.made)
        if (
            not filler.refit_from_bytes(builder.with_capacity(graph, self.capacity), str(graph))
            or not refitter.refit_cuda_engine()
        ):
            raise DllmError(
                f"{graph}: its weights do not go into the engine ({self._logger.last or 'no message'}): build it without --strip."
            )

    def _small(self, specs: list[TensorSpec], held: _Engine, shape: Shape) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Element type and shape of what is no cache. TensorRT 8 has int32 where the graph says int64."""
        sizes = dict(zip("BSR", shape, strict=True))
        return {spec.name: (np.dtype(self._trt.nptype(held.engine.get_tensor_dtype(spec.name))),
                            tuple(sizes[a] if isinstance(a, str) else a for a in spec.axes))
                for spec in specs if not _is_cache(spec)}  # fmt: skip

    def _arena(self, outputs: bool) -> cuda.Arena:
        """Room for the small inputs or outputs in the largest shapes of the profiles."""
        size = 0
        for held in self._engines:
            for profile in held.profiles:
                shape = (profile.batch[2], profile.rows[2], profile.asked[2])
                size = max(size, cuda.Arena.size_of(self._small(held.outputs if outputs else held.inputs, held, shape)))
        return self._device.arena(size)

    def _fresh_rows(self) -> list[cuda.Memory]:
        """Where engines of the legacy lowering put the window's keys and values; nothing for the others."""
        if self.manifest.dims.writes_caches:
            return []
        rows = max(profile.batch[2] * profile.rows[2] for held in self._engines for profile in held.profiles)
        size = rows * self.manifest.model.num_kv_heads * self._row_bytes
        return [self._device.allocate(size) for _ in contract.returned_names(self.manifest.dims)]

    @property
    def _row_bytes(self) -> int:
        """Bytes of a key or value of one head at one position."""
        return self.manifest.model.head_dim * contract.ITEM_SIZE[self.manifest.dims.dtype]


class TensorRTRTXBackend(TensorRTBackend):
    """The same on TensorRT-RTX."""

    name: ClassVar[str] = "tensorrt-rtx"


def _is_cache(spec: TensorSpec) -> bool:
    return "." in spec.name


def _scratch_bytes(held: _Engine, index: int) -> int:
    """Working memory of a profile. Before TensorRT 10 an engine only knows that of all its profiles."""
    if hasattr(held.engine, "get_device_memory_size_for_profile_v2"):
        return int(held.engine.get_device_memory_size_for_profile_v2(index))
    return int(held.engine.device_memory_size)


def _bare_context(opened: Any, trt: Any) -> Any:
    """A context without working memory of its own."""
    if hasattr(trt, "ExecutionContextAllocationStrategy"):
        return opened.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    return opened.create_execution_context_without_device_memory()


def _set_scratch(context: Any, scratch: cuda.Memory) -> None:
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(scratch.address, scratch.size)
    else:
        context.device_memory = scratch.address
