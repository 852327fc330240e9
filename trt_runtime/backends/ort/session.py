"""ONNX Runtime on any of its devices: one session on the refine graph runs both roles, so the weights are in
memory once.

A prefix pass is the refine graph over the whole canvas at index 0. Caches are updated in place: each is bound
as input and as output of the same memory, and no step copies one. (Graphs of the legacy lowering return the
window's rows; they are written here.)
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort

from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.ort import int8
from trt_runtime.decoding.backend import Backend, Cache, Stats, Window
from trt_runtime.errors import BackendError, DllmError
from trt_runtime.system import commands

# a ModelProto with nothing but graph { output { name: "logits", type: float tensor } }: protobuf merges
# consecutive messages, so a graph file followed by this has one more output, and no onnx package is needed
_LOGITS_OUTPUT = b"\x3a\x10\x62\x0e\x0a\x06logits\x12\x04\x0a\x02\x08\x01"
_MODERN_FROM = (1, 24)  # opset 24
_DATA = (".data", ".safetensors")  # the files of a graph's weights
# by dtype: a NumPy type with the same zeros (NumPy has no bfloat16), and ONNX's number of the element type
ELEMENTS = {"fp32": (np.float32, 1), "fp16": (np.float16, 10), "bf16": (np.uint16, 16)}


@dataclass
class Buffers(ABC):
    """Caches [batch, H, C, D] on a device, and the IOBinding for each range of slots and set of outputs in
    use."""

    bindings: dict[tuple[int, int, tuple[str, ...]], Any] = field(default_factory=dict, init=False)

    @abstractmethod
    def address(self, name: str) -> int:
        """The address of a cache."""


class OrtSession(Backend):
    """An artifact on ONNX Runtime, on any device.

    threads: for each forward on the CPU; None takes the physical cores. spin: idle threads wait busily, which
    is faster where nothing else needs the cores. steps_per_sync: refine steps, each
    with its commit, before the host synchronises. role: the graph to open (the prefix graph is for tests that
    compare it with the refine graph). model_bytes: a variant of that graph over the same weights. optimise:
    whether ONNX Runtime may change the graph; without it every node runs unchanged.
    """

    name = "ort"
    device: ClassVar[str]
    provider: ClassVar[str]
    place: ClassVar[str]  # ONNX Runtime's name for the device's memory

    def __init__(
        self,
        artifact: Path,
        *,
        threads: int | None = None,
        steps_per_sync: int = 1,
        spin: bool = False,
        role: str = "refine",
        model_bytes: bytes | None = None,
        optimise: bool = True,
    ) -> None:
        self.manifest = manifests.load(artifact)
        self.role, self.steps_per_sync = role, steps_per_sync
        self._check_provider()
        self._check_artifact(artifact)
        self._zero, self._element_type = ELEMENTS[self.manifest.model.dtype]
        self._session = self._opened(
            artifact, threads if threads is not None else physical_cores(), spin, model_bytes, optimise
        )
        self._check_placement()
        self._check_graph(artifact)
        dims = self.manifest.dims
        self._names, self._returned = contract.cache_names("cache", dims), contract.returned_names(dims)
        specs = contract.inputs(role, dims)
        self._small_inputs = [spec.name for spec in specs if spec.name not in self._names]
        self._cache_inputs = [spec.name for spec in specs if spec.name in self._names]

    @abstractmethod
    def _check_artifact(self, artifact: Path) -> None:
        """Raise DllmError for an artifact that this device does not run."""

    def _check_placement(self) -> None:
        """Raise DllmError if the session would run on another device."""

    @property
    def gives_logits(self) -> bool:
        return True

    def close(self) -> None:
        del self._session

    def _forward(self, role: str, cache: Cache, slots: slice, window: Window, want_logits: bool) -> Stats:
        """Both roles on the one session."""
        outputs = self.run(
            cache, slots, window, [*contract.STATISTICS, *([contract.LOGITS] if want_logits else [])]
        )
        return Stats(**outputs)

    def run(self, cache: Cache, slots: slice, window: Window, names: list[str]) -> dict[str, Any]:
        """One unchecked run of the graph: the outputs called `names`. The caches of `slots` are updated in
        place."""
        binding = self._binding(cache, slots, tuple(names))
        for name in self._small_inputs:
            array = np.ascontiguousarray(getattr(window, name))
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name in (*([] if self.manifest.dims.writes_caches else self._returned), *names):
            binding.bind_output(name, "cpu")  # bound again, because their shapes change
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
            raise BackendError(
                f"ONNX Runtime failed in the {self.role} graph: {str(error).splitlines()[0]}"
            ) from error

    def _write(self, cache: Cache, slots: slice, window: Window, outputs: list[Any]) -> None:
        """Write the window's rows into the caches, which graphs of the legacy lowering leave to the
        caller."""
        raise DllmError(
            f"the legacy lowering is not supported on {self.device}: export with --lowering modern."
        )

    def _entries(self) -> dict[str, str]:
        """Session options that the device needs."""
        return {}

    def _provider_options(self) -> dict[str, str]:
        """Options of the execution provider that the device needs."""
        return {}

    def _opened(
        self, artifact: Path, threads: int, spin: bool, model_bytes: bytes | None, optimise: bool
    ) -> Any:
        """The opened session. Raises DllmError."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 2 if os.environ.get("DLLM_ORT_LOG") else 3
        entries = {
            "session.intra_op.allow_spinning": str(int(spin)),  # it hurts on shared machines
            "session.model_external_initializers_file_folder_path": str(artifact),
            **self._entries(),
            **int8.session_entries(self.manifest),
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        try:
            if model_bytes is None:
                model_bytes = (artifact / self.manifest.graphs[self.role].file).read_bytes()
                model_bytes += b"" if self.manifest.head == contract.LOGITS else _LOGITS_OUTPUT
            linked = self._linked_data(artifact, options)
            provider = (self.provider, self._provider_options())
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
                f"{artifact}: ONNX Runtime {ort.__version__} cannot open the {self.role} graph "
                f"({str(error).splitlines()[0]}): {advice}."
            ) from error
        if self.provider not in session.get_providers():  # it falls back to the CPU silently
            raise DllmError(
                f"ONNX Runtime {ort.__version__} opened the model on {', '.join(session.get_providers())} "
                "instead of CUDA: its CUDA provider did not load; 'dllm-trt doctor' says what is missing."
            )
        return session

    def _linked_data(self, artifact: Path, options: Any) -> list[Any]:
        """Pass, memory-mapped, the weights whose files are links, as in the Hub's cache: ONNX Runtime opens
        no file outside the directory. The maps must live until the session is open."""
        names = [
            name
            for name in self.manifest.files
            if (artifact / name).resolve() != artifact.resolve() / name and name.endswith(_DATA)
        ]
        maps = [np.memmap(artifact / name, np.uint8, "r") for name in names]
        if names:
            options.add_external_initializers_from_files_in_memory(
                names, maps, [len(mapped) for mapped in maps]
            )
        return maps

    def _check_provider(self) -> None:
        """Raise DllmError if this ONNX Runtime has no provider for the device."""
        if self.provider not in ort.get_available_providers():
            raise DllmError(
                f"ONNX Runtime {ort.__version__} has no CUDA provider: {commands.pip()} uninstall "
                f"onnxruntime, then {commands.install('ort-gpu')}."
            )

    def _check_graph(self, artifact: Path) -> None:
        """Check that the opened graph is the one that the manifest describes."""
        dims, head = self.manifest.dims, self.manifest.head
        names = {
            "tensor(int64)": "int64",
            "tensor(float)": "float32",
            "tensor(float16)": "float16",
            "tensor(bfloat16)": "bfloat16",
        }
        sides = (
            (self._session.get_inputs(), contract.inputs(self.role, dims)),
            (self._session.get_outputs(), contract.outputs(self.role, dims, head)),
        )
        for values, described in sides:
            actual = {value.name: (names.get(value.type), tuple(value.shape or ())) for value in values}
            for spec in described:
                if actual.get(spec.name) != (spec.dtype, spec.axes):
                    raise DllmError(
                        f"{artifact}: {spec.name} of the {self.role} graph is {actual.get(spec.name)}, the "
                        f"manifest says {(spec.dtype, spec.axes)}: the artifact's files come from "
                        "different exports: export it again."
                    )

    def _binding(self, cache: Cache, slots: slice, names: tuple[str, ...]) -> Any:
        """The binding for a range of slots: each cache is one memory, bound as input and as output."""
        buffers: Buffers = cache.buffers
        key = (slots.start, slots.stop, names)
        if key in buffers.bindings:
            return buffers.bindings[key]
        model, binding = self.manifest.model, self._session.io_binding()
        shape = [slots.stop - slots.start, model.num_kv_heads, cache.capacity, model.head_dim]
        first = slots.start * math.prod(shape[1:]) * contract.ITEM_SIZE[self.manifest.dims.dtype]
        for name, returned in zip(self._names, self._returned, strict=True):
            place = (self.place, 0, self._element_type, shape, buffers.address(name) + first)
            if name in self._cache_inputs:
                binding.bind_input(name, *place)
            if self.manifest.dims.writes_caches:
                binding.bind_output(returned, *place)
        buffers.bindings[key] = binding
        return binding


def physical_cores() -> int:
    """Cores that this process may use; two hardware threads count as one if the system reports them."""
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return max(1, len(cores))
