"""ONNX Runtime. One session on the refine graph runs both roles, so the weights are held once.

A prefix pass is the refine graph over the whole canvas at index 0. Caches are updated in place: each is bound as input and
as output of the same memory, and no step copies one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from trt_runtime import contract
from trt_runtime import manifest as manifests
from trt_runtime.backends.base import Backend, Cache, Stats, Window
from trt_runtime.errors import DllmError

# a ModelProto that holds nothing but graph { output { name: "logits", type: float tensor } }: protobuf merges messages that
# stand one after the other, so a graph file with this behind it has one more output, and no onnx package is needed
_LOGITS_OUTPUT = b"\x3a\x10\x62\x0e\x0a\x06logits\x12\x04\x0a\x02\x08\x01"
_CPU_DTYPES = {"fp32": np.float32, "fp16": np.float16}


@dataclass
class _Buffers:
    """Cache arrays [batch, H, C, D] by name, and the IOBinding of each range of slots and set of outputs that was used."""

    arrays: dict[str, np.ndarray[Any, Any]]
    bindings: dict[tuple[int, int, tuple[str, ...]], Any] = field(default_factory=dict)


class OrtBackend(Backend):
    """An artifact on ONNX Runtime's CPU provider, in fp32 or fp16.

    threads: of a matrix product; None takes the physical cores. `role`: the graph to open (the prefix graph is for tests
    that compare it with the refine graph). `model_bytes`: a variant of that graph over the same weights.
    """

    name = "ort"

    def __init__(
        self, artifact: Path, *, threads: int | None = None, role: str = "refine", model_bytes: bytes | None = None
    ) -> None:
        self.manifest = manifests.load(artifact)
        self.role = role
        dtype = self.manifest.model.dtype
        if dtype not in _CPU_DTYPES:
            raise DllmError(
                f"{artifact}: dtype is {dtype}, which ONNX Runtime does not compute on a CPU: export with DTYPE=fp32 or fp16."
            )
        self._dtype = _CPU_DTYPES[dtype]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads if threads is not None else physical_cores()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning hurts on shared machines
        options.log_severity_level = 2 if os.environ.get("DLLM_ORT_LOG") else 3
        try:
            if model_bytes is None:
                model_bytes = (artifact / self.manifest.graphs[role].file).read_bytes()
                model_bytes += b"" if self.manifest.head == contract.LOGITS else _LOGITS_OUTPUT
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(artifact))
            self._session = ort.InferenceSession(model_bytes, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises several unrelated types
            raise DllmError(
                f"{artifact}: ONNX Runtime {ort.__version__} cannot open the {role} graph ({str(error).splitlines()[0]}): "
                "use onnxruntime 1.24 or newer, or export with --lowering legacy."
            ) from error
        self._check_graph(artifact)
        self._names = contract.cache_names("cache", self.manifest.model.dims)
        self._small_inputs = ["input_ids", "position_ids", *(["write_index"] if role == "refine" else []), "kv_len", "logit_rows"]
        self._updated = contract.cache_names("updated", self.manifest.model.dims)

    @property
    def gives_logits(self) -> bool:
        return True

    def new_cache(self, batch: int, capacity: int) -> Cache:
        model = self.manifest.model
        shape = (batch, model.num_kv_heads, capacity, model.head_dim)
        return Cache(batch, capacity, _Buffers({name: np.zeros(shape, self._dtype) for name in self._names}))

    def close(self) -> None:
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
        for name in names:
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises several unrelated types
            raise DllmError(f"ONNX Runtime failed in the {self.role} graph: {str(error).splitlines()[0]}") from error
        outputs = binding.get_outputs()[len(self._names) :]
        return {name: value.numpy() for name, value in zip(names, outputs, strict=True)}

    def _check_graph(self, artifact: Path) -> None:
        """The graph that was opened must be the one that the manifest describes."""
        dims, head = self.manifest.model.dims, self.manifest.head
        names = {"tensor(int64)": "int64", "tensor(float)": "float32", "tensor(float16)": "float16"}
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
        if key not in buffers.bindings:
            binding = self._session.io_binding()
            for name, updated in zip(self._names, self._updated, strict=True):
                value = ort.OrtValue.ortvalue_from_numpy(buffers.arrays[name][slots])  # a view, no copy
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(updated, value)
            buffers.bindings[key] = binding
        return buffers.bindings[key]


def physical_cores() -> int:
    """Cores that this process may use, two hardware threads counted as one where the system says so."""
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return max(1, len(cores))
