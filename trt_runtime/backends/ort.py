"""ONNX Runtime, on its CPU or its CUDA provider. One session on the refine graph runs both roles, so the weights are held once.

A prefix pass is the refine graph over the whole canvas at index 0. Caches are updated in place: each is bound as input and
as output of the same memory, and no step copies one. (Graphs of the legacy lowering return the window's rows; they are written here.)
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from trt_runtime import advice, contract, cuda, steps
from trt_runtime import manifest as manifests
from trt_runtime.backends import import_tool, int8
from trt_runtime.backends.base import Backend, Cache, Stats, Window, narrowed, pooled, widened
from trt_runtime.backends.commit_kernel import CommitKernel
from trt_runtime.errors import DllmError, unknown
from trt_runtime.policies import CommitRule
from trt_runtime.steps import Committed

# a ModelProto that holds nothing but graph { output { name: "logits", type: float tensor } }: protobuf merges messages that
# stand one after the other, so a graph file with this behind it has one more output, and no onnx package is needed
_LOGITS_OUTPUT = b"\x3a\x10\x62\x0e\x0a\x06logits\x12\x04\x0a\x02\x08\x01"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_PLACES = {"cpu": "cpu", "cuda": "cuda"}  # what ONNX Runtime calls a device's memory
_CPU_DTYPES = ("fp32", "fp16")
_MODERN_FROM = (1, 24)  # opset 24
_DATA = (".data", ".safetensors")  # files that graphs take weights from
# what must not fall to the CPU one node at a time, as kernels that a provider lacks do without a word
_HEAVY = {"Attention", "Cast", "Gemm", "Reshape", "RMSNormalization", "RotaryEmbedding", "TensorScatter", "TopK", "Transpose"}
_ROW_STEP = {"cpu": 1, "cuda": 64}  # rows of a cache come in steps: CUDA's attention kernels want aligned masks
# by dtype: the type whose zeros stand in the caches (NumPy has no bfloat16), and the number of the element type in ONNX
_ELEMENTS = {"fp32": (np.float32, 1), "fp16": (np.float16, 10), "bf16": (np.uint16, 16)}


@dataclass
class _Buffers:
    """Caches [batch, H, C, D] by name: arrays on the CPU, values of ONNX Runtime on the GPU; and the IOBinding of each range of slots
    and set of outputs that was used."""

    arrays: dict[str, np.ndarray[Any, Any]]
    values: dict[str, Any] = field(default_factory=dict)
    bindings: dict[tuple[int, int, tuple[str, ...]], Any] = field(default_factory=dict)

    def address(self, name: str) -> int:
        return int(self.values[name].data_ptr() if name in self.values else self.arrays[name].ctypes.data)


class OrtBackend(Backend):
    """An artifact on ONNX Runtime: on a CPU in fp32 or fp16, with device='cuda' also in bf16.

    threads: of a matrix product on the CPU; None takes the physical cores. steps_per_look: refine steps, each with its commit, before
    the host looks; above 1 on CUDA the commits are a kernel, compiled here (from a checkout, with the kernels extra). `role`: the graph
    to open (the prefix graph is for tests that compare it with the refine graph). `model_bytes`: a variant of it over the same weights.
    optimise: whether ONNX Runtime may change the graph; without it every node runs as it stands.
    """

    name = "ort"

    def __init__(
        self,
        artifact: Path,
        *,
        threads: int | None = None,
        device: str = "cpu",
        steps_per_look: int = 1,
        role: str = "refine",
        model_bytes: bytes | None = None,
        optimise: bool = True,
    ) -> None:
        self.manifest = manifests.load(artifact)
        self.role, self.device, self.steps_per_look = role, device, steps_per_look
        self._check_device(artifact)
        self._zero, self._element_type = _ELEMENTS[self.manifest.model.dtype]
        self._session = self._opened(artifact, threads if threads is not None else physical_cores(), model_bytes, optimise)
        if device == "cuda":
            self._check_placement()
        self._check_graph(artifact)
        dims = self.manifest.dims
        self._names, self._returned = contract.cache_names("cache", dims), contract.returned_names(dims)
        specs = contract.inputs(role, dims)
        self._small_inputs = [spec.name for spec in specs if spec.name not in self._names]
        self._cache_inputs = [spec.name for spec in specs if spec.name in self._names]
        self._commit: CommitKernel | None = None
        self._arena: cuda.Arena | None = None
        self._pool: dict[tuple[int, int], _Buffers] = {}
        self.is_concurrent = device == "cpu"  # the session may run in several threads, and all else belongs to a cache

    @property
    def gives_logits(self) -> bool:
        return True

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """On CUDA of a rounded capacity; the memory of one that was given up is used again."""
        model, step = self.manifest.model, _ROW_STEP[self.device]
        capacity = -(-capacity // step) * step
        shape = (batch, model.num_kv_heads, capacity, model.head_dim)
        if self.device == "cpu":
            return Cache(batch, capacity, _Buffers({name: np.zeros(shape, self._zero) for name in self._names}))
        buffers = self._pool.pop((batch, capacity), None)
        if buffers is None:
            place = _PLACES[self.device]
            values = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._zero), place, 0) for name in self._names}
            buffers = _Buffers({}, values)
        return pooled(Cache(batch, capacity, buffers), self._pool)

    def resized(self, cache: Cache, capacity: int) -> Cache | None:
        """On the CPU, whose attention computes masked rows too."""
        if self.device != "cpu":
            return None
        made, kept = self.new_cache(cache.batch, capacity), min(capacity, cache.capacity)
        for name, array in cache.buffers.arrays.items():
            made.buffers.arrays[name][:, :, :kept] = array[:, :, :kept]
        return made

    def copy_slot(self, cache: Cache, source: int, slots: slice) -> bool:
        """On the CPU."""
        for array in cache.buffers.arrays.values():
            array[slots] = array[source]
        return self.device == "cpu"

    def read_cache(self, cache: Cache, slots: slice) -> dict[str, Any]:
        dtype, held = self.manifest.model.dtype, cache.buffers
        whole = held.arrays or {name: value.numpy() for name, value in held.values.items()}
        return {name: widened(array[slots], dtype) for name, array in whole.items()}

    def write_cache(self, cache: Cache, slots: slice, arrays: Mapping[str, Any]) -> None:
        dtype, held = self.manifest.model.dtype, cache.buffers
        for name, array in arrays.items():
            if held.arrays:
                held.arrays[name][slots] = narrowed(array, dtype)
                continue
            whole = held.values[name].numpy()
            whole[slots] = narrowed(array, dtype)
            held.values[name].update_inplace(whole)

    def close(self) -> None:
        self._pool.clear()
        del self._session

    def _prefix(self, cache: Cache, slots: slice, window: Window, want_logits: bool) -> Stats:
        return self._refine(cache, slots, window, want_logits)

    def _refine(self, cache: Cache, slots: slice, window: Window, want_logits: bool) -> Stats:
        made = self.run(cache, slots, window, [*contract.STATISTICS, *([contract.LOGITS] if want_logits else [])])
        return Stats(**made)

    def run(self, cache: Cache, slots: slice, window: Window, names: list[str]) -> dict[str, Any]:
        """One run of the graph, unchecked: the outputs called `names`. The caches of `slots` are updated in place."""
        binding = self._binding(cache, slots, tuple(names))
        for name in self._small_inputs:
            array = np.ascontiguousarray(getattr(window, name))
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name in (*([] if self.manifest.dims.writes_caches else self._returned), *names):
            binding.bind_output(name, "cpu")  # anew: their shapes change
        self._execute(binding)
        outputs = binding.get_outputs()
        if not self.manifest.dims.writes_caches:
            self._write(cache, slots, window, outputs)
        return {name: value.numpy() for name, value in zip(names, outputs[len(self._names) :], strict=True)}

    def _execute(self, binding: Any) -> None:
        """Run, and wait for the end."""
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises several unrelated types
            raise DllmError(f"ONNX Runtime failed in the {self.role} graph: {str(error).splitlines()[0]}") from error

    def _refine_steps(self, cache: Cache, slots: slice, window: Window, rules: Sequence[CommitRule]) -> Committed:
        """On CUDA: tokens and statistics stay on the GPU, and the kernel commits there."""
        if self.device == "cpu":
            return super()._refine_steps(cache, slots, window, rules)
        batch, asked = window.logit_rows.shape
        kernel = self._kernel(batch, asked)
        device = kernel.device
        arrays = {name: np.ascontiguousarray(getattr(window, name)) for name in self._small_inputs}
        shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        shapes |= {name: (np.dtype(np.int64 if name == "token" else np.float32), (batch, asked)) for name in contract.STATISTICS}
        size = cuda.Arena.size_of(shapes)
        if self._arena is None or self._arena.device.size < size:
            self._arena = device.arena(2 * size)
        arena = self._arena
        held, at, used = arena.place(shapes)
        for name, array in arrays.items():
            held[name][...] = array
        device.upload(arena.device.address, arena.host[:used])
        running = kernel.begin(rules, asked)
        device.synchronize()  # ONNX Runtime has a stream of its own
        binding = self._binding(cache, slots, ("on the device",))
        for name, (dtype, shape) in shapes.items():
            bind = binding.bind_output if name in contract.STATISTICS else binding.bind_input
            bind(name, _PLACES[self.device], 0, dtype.type, list(shape), at[name])
        for _ in range(steps.needed(rules, window.input_ids, self.manifest.decoding.mask_token_id, self.steps_per_look)):
            self._execute(binding)
            kernel.queue(running, at["input_ids"], window.input_ids.shape[1], at["token"], at["confidence"])
            device.synchronize()
        device.download(held["input_ids"], at["input_ids"])
        kernel.end(running)
        device.synchronize()
        return steps.finished(running.arrays, rules, held["input_ids"].copy())

    def _kernel(self, batch: int, columns: int) -> CommitKernel:
        """The commit kernel for at least so many rows and positions, compiled for this GPU."""
        held = self._commit
        if held is None or held.max_batch < batch or held.columns < columns:
            tool = import_tool("plugins.commit", "steps_per_look on CUDA", advice.tool("kernels"))
            batch, columns = max(batch, 8), max(columns, 32)  # not anew for each larger call
            device = held.device if held is not None else cuda.Device()
            made = tool.compiled(self.manifest.decoding.mask_token_id, columns, device.facts.compute_capability)
            facts = {"entry": made.name, "threads": made.threads, "shared": made.shared, "columns": columns}
            held = self._commit = CommitKernel(device, facts, made.ptx.encode(), batch)
        return held

    def _write(self, cache: Cache, slots: slice, window: Window, outputs: list[Any]) -> None:
        """The window's rows into the caches: what a graph of the legacy lowering leaves to its caller."""
        rows = window.input_ids.shape[1]
        for name, value in zip(self._names, outputs[: len(self._names)], strict=True):
            array, new = cache.buffers.arrays[name][slots], value.numpy()
            for i, start in enumerate(window.write_index):
                array[i, :, start : start + rows] = new[i]

    def _opened(self, artifact: Path, threads: int, model_bytes: bytes | None, optimise: bool) -> Any:
        """The session. Raises DllmError."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 2 if os.environ.get("DLLM_ORT_LOG") else 3
        entries = {
            "session.intra_op.allow_spinning": "0",  # spinning hurts on shared machines
            "session.model_external_initializers_file_folder_path": str(artifact),
            **({"session.record_ep_graph_assignment_info": "1"} if self.device == "cuda" else {}),
            **int8.session_entries(self.manifest),
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        provider = _PROVIDERS[self.device]
        try:
            if model_bytes is None:
                model_bytes = (artifact / self.manifest.graphs[self.role].file).read_bytes()
                model_bytes += b"" if self.manifest.head == contract.LOGITS else _LOGITS_OUTPUT
            linked = self._linked_data(artifact, options)
            if self.device == "cuda":
                getattr(ort, "preload_dlls", lambda: None)()  # CUDA's libraries, where they are Python packages
            session = ort.InferenceSession(model_bytes, options, providers=[provider])
            del linked
        except Exception as error:  # onnxruntime raises several unrelated types
            is_old = tuple(map(int, ort.__version__.split(".")[:2])) < _MODERN_FROM
            advice = (
                "use onnxruntime 1.24 or newer, or export with --lowering legacy"
                if is_old and self.manifest.lowering == contract.MODERN
                else "check it with 'dllm-trt info --check', and export it again or copy it again"
            )
            raise DllmError(
                f"{artifact}: ONNX Runtime {ort.__version__} cannot open the {self.role} graph ({str(error).splitlines()[0]}): {advice}."
            ) from error
        if provider not in session.get_providers():  # it falls back to the CPU without a word
            raise DllmError(
                f"ONNX Runtime {ort.__version__} opened the model on {', '.join(session.get_providers())} instead of CUDA: its "
                "CUDA provider did not load; 'dllm-trt doctor' says what it lacks."
            )
        return session

    def _linked_data(self, artifact: Path, options: Any) -> list[Any]:
        """Hand over, memory-mapped, the weights whose files are links, as in the Hub's cache: ONNX Runtime opens no file outside the directory.
        They have to live until the session is open."""
        names = [
            name
            for name in self.manifest.files
            if (artifact / name).resolve() != artifact.resolve() / name and name.endswith(_DATA)
        ]
        maps = [np.memmap(artifact / name, np.uint8, "r") for name in names]
        if names:
            options.add_external_initializers_from_files_in_memory(names, maps, [len(held) for held in maps])
        return maps

    def _check_device(self, artifact: Path) -> None:
        """Whether this ONNX Runtime, on this device, can run the artifact at all."""
        if self.device not in _PROVIDERS:
            raise unknown("device of ONNX Runtime", self.device, _PROVIDERS)
        if _PROVIDERS[self.device] not in ort.get_available_providers():
            raise DllmError(
                f"ONNX Runtime {ort.__version__} has no CUDA provider: {advice.pip()} uninstall onnxruntime, then "
                f"{advice.install('ort-gpu')}."
            )
        dtype = self.manifest.model.dtype
        if self.device == "cpu" and dtype not in _CPU_DTYPES:
            raise DllmError(
                f"{artifact}: dtype is {dtype}, which ONNX Runtime does not compute on a CPU: export with DTYPE=fp32 or fp16."
            )
        if self.device != "cpu":
            manifests.check_runs_on_gpu(self.manifest, str(artifact))
        if self.device != "cpu" and not self.manifest.dims.writes_caches:
            raise DllmError(
                f"{artifact}: is of the legacy lowering, for the CPU and older TensorRT: export with --lowering modern."
            )

    def _check_placement(self) -> None:
        """Raise DllmError if a provider took CUDA's name and left work to the CPU."""
        if not hasattr(self._session, "get_provider_graph_assignment_info"):
            return  # ONNX Runtime before 1.24 does not say
        left: dict[str, int] = {}
        for part in self._session.get_provider_graph_assignment_info():
            for node in part.get_nodes():
                if part.ep_name != _PROVIDERS["cuda"] and node.op_type in _HEAVY:
                    left[node.op_type] = left.get(node.op_type, 0) + 1
        heavy = {name: count for name, count in left.items() if count >= self.manifest.model.num_layers or name == "TopK"}
        if heavy:
            said = ", ".join(f"{count} {name}" for name, count in sorted(heavy.items()))
            raise DllmError(
                f"ONNX Runtime {ort.__version__} would run {said} of the model on the CPU: its CUDA provider has no kernels for them: "
                "install a newer onnxruntime-gpu."
            )

    def _check_graph(self, artifact: Path) -> None:
        """The graph that was opened must be the one that the manifest describes."""
        dims, head = self.manifest.dims, self.manifest.head
        names = {
            "tensor(int64)": "int64",
            "tensor(float)": "float32",
            "tensor(float16)": "float16",
            "tensor(bfloat16)": "bfloat16",
        }
        sides = ((self._session.get_inputs(), contract.inputs(self.role, dims)),
                 (self._session.get_outputs(), contract.outputs(self.role, dims, head)))  # fmt: skip
        for held, described in sides:
            found = {value.name: (names.get(value.type), tuple(value.shape or ())) for value in held}
            for spec in described:
                if found.get(spec.name) != (spec.dtype, spec.axes):
                    raise DllmError(
                        f"{artifact}: the {self.role} graph has {spec.name} as {found.get(spec.name)}, the manifest says "
                        f"{(spec.dtype, spec.axes)}: the artifact's files are not of one export: export it again."
                    )

    def _binding(self, cache: Cache, slots: slice, names: tuple[str, ...]) -> Any:
        """The binding of a range of slots: each cache is one memory, bound as input and as output."""
        buffers: _Buffers = cache.buffers
        key = (slots.start, slots.stop, names)
        if key in buffers.bindings:
            return buffers.bindings[key]
        model, binding = self.manifest.model, self._session.io_binding()
        shape = [slots.stop - slots.start, model.num_kv_heads, cache.capacity, model.head_dim]
        first = slots.start * math.prod(shape[1:]) * contract.ITEM_SIZE[self.manifest.dims.dtype]
        for name, returned in zip(self._names, self._returned, strict=True):
            place = (_PLACES[self.device], 0, self._element_type, shape, buffers.address(name) + first)
            if name in self._cache_inputs:
                binding.bind_input(name, *place)
            if self.manifest.dims.writes_caches:
                binding.bind_output(returned, *place)
        buffers.bindings[key] = binding
        return binding


def physical_cores() -> int:
    """Cores that this process may use, two hardware threads counted as one where the system says so."""
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return max(1, len(cores))
