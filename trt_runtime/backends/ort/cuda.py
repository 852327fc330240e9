"""ONNX Runtime on its CUDA provider: caches stay on the GPU, and so do tokens and statistics between the
steps of a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort

from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends import cuda
from trt_runtime.backends.commit_kernel import CommitKernel
from trt_runtime.backends.ort.session import Buffers, OrtSession
from trt_runtime.decoding import device_commit as steps
from trt_runtime.decoding.backend import Cache, Window, narrowed, pooled, widened
from trt_runtime.decoding.device_commit import Committed
from trt_runtime.decoding.policies.base import CommitRule
from trt_runtime.errors import DllmError
from trt_runtime.optional import import_optional
from trt_runtime.system import commands

# operators that must not run on the CPU: nodes without a kernel in the provider are moved there silently
_HEAVY = {
    "Attention",
    "Cast",
    "Gemm",
    "Reshape",
    "RMSNormalization",
    "RotaryEmbedding",
    "TensorScatter",
    "TopK",
    "Transpose",
}
_ROW_STEP = 64  # CUDA's attention kernels need aligned masks, so the rows of a cache are rounded up


@dataclass
class _Values(Buffers):
    values: dict[str, Any]

    def address(self, name: str) -> int:
        return int(self.values[name].data_ptr())


class OrtCudaBackend(OrtSession):
    """An artifact in fp32, fp16 or bf16 on an NVIDIA GPU."""

    device: ClassVar[str] = "cuda"
    provider: ClassVar[str] = "CUDAExecutionProvider"
    place: ClassVar[str] = "cuda"

    def __init__(self, artifact: Path, **options: Any) -> None:
        super().__init__(artifact, **options)
        self._commit: CommitKernel | None = None
        self._arena: cuda.Arena | None = None
        self._pool: dict[tuple[int, int], _Values] = {}

    def _check_artifact(self, artifact: Path) -> None:
        manifests.check_runs_on_gpu(self.manifest, str(artifact))
        if not self.manifest.dims.writes_caches:
            raise DllmError(
                f"{artifact}: uses the legacy lowering, which is not supported on CUDA: export with "
                f"--lowering modern."
            )
        # CUDA's libraries, if they are installed as Python packages
        getattr(ort, "preload_dlls", lambda: None)()

    def _entries(self) -> dict[str, str]:
        return {"session.record_ep_graph_assignment_info": "1"}

    def _provider_options(self) -> dict[str, str]:
        # the default is TF32, whose 10-bit products led to other commits than fp32 (seen on an H100)
        return {"use_tf32": "0"}

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """A cache of rounded capacity; the memory of a released cache is reused."""
        model = self.manifest.model
        capacity = -(-capacity // _ROW_STEP) * _ROW_STEP
        shape = (batch, model.num_kv_heads, capacity, model.head_dim)
        buffers = self._pool.pop((batch, capacity), None)
        if buffers is None:
            buffers = _Values(
                {
                    name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._zero), self.place, 0)
                    for name in self._names
                }
            )
        return pooled(Cache(batch, capacity, buffers), self._pool)

    def read_cache(self, cache: Cache, slots: slice) -> dict[str, Any]:
        dtype = self.manifest.model.dtype
        return {name: widened(value.numpy()[slots], dtype) for name, value in cache.buffers.values.items()}

    def write_cache(self, cache: Cache, slots: slice, arrays: Mapping[str, Any]) -> None:
        for name, array in arrays.items():
            value = cache.buffers.values[name]
            whole = value.numpy()
            whole[slots] = narrowed(array, self.manifest.model.dtype)
            value.update_inplace(whole)

    def close(self) -> None:
        self._pool.clear()
        super().close()

    def _refine_steps(
        self, cache: Cache, slots: slice, window: Window, rules: Sequence[CommitRule]
    ) -> Committed:
        """Tokens and statistics stay on the GPU, where the kernel commits."""
        batch, asked = window.logit_rows.shape
        kernel = self._kernel(batch, asked)
        device = kernel.device
        arrays = {name: np.ascontiguousarray(getattr(window, name)) for name in self._small_inputs}
        shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        shapes |= {
            name: (np.dtype(np.int64 if name == "token" else np.float32), (batch, asked))
            for name in contract.STATISTICS
        }
        size = cuda.Arena.size_of(shapes)
        if self._arena is None or self._arena.device.size < size:
            self._arena = device.arena(2 * size)
        arena = self._arena
        host, at, used = arena.place(shapes)
        for name, array in arrays.items():
            host[name][...] = array
        device.upload(arena.device.address, arena.host[:used])
        running = kernel.begin(rules, asked)
        device.synchronize()  # ONNX Runtime has a stream of its own
        binding = self._binding(cache, slots, ("on the device",))
        for name, (dtype, shape) in shapes.items():
            bind = binding.bind_output if name in contract.STATISTICS else binding.bind_input
            bind(name, self.place, 0, dtype.type, list(shape), at[name])
        for _ in range(
            steps.needed(rules, window.input_ids, self.manifest.decoding.mask_token_id, self.steps_per_sync)
        ):
            self._execute(binding)
            kernel.queue(running, at["input_ids"], window.input_ids.shape[1], at["token"], at["confidence"])
            device.synchronize()
        device.download(host["input_ids"], at["input_ids"])
        kernel.end(running)
        device.synchronize()
        return steps.finished(running.arrays, rules, host["input_ids"].copy())

    def _kernel(self, batch: int, columns: int) -> CommitKernel:
        """The commit kernel for at least so many rows and positions, compiled for this GPU."""
        kernel = self._commit
        if kernel is None or kernel.max_batch < batch or kernel.columns < columns:
            tool = import_optional("plugins.commit", "steps_per_sync on CUDA", commands.install("kernels"))
            batch, columns = max(batch, 8), max(columns, 32)  # not compiled again for each larger call
            device = kernel.device if kernel is not None else cuda.CudaDevice()
            compiled = tool.compiled(
                self.manifest.decoding.mask_token_id, columns, device.facts.compute_capability
            )
            facts = {
                "entry": compiled.name,
                "threads": compiled.threads,
                "shared": compiled.shared,
                "columns": columns,
            }
            kernel = self._commit = CommitKernel(device, facts, compiled.ptx.encode(), batch)
        return kernel

    def _check_placement(self) -> None:
        """Raise DllmError if the CUDA provider left work to the CPU."""
        if not hasattr(self._session, "get_provider_graph_assignment_info"):
            return  # ONNX Runtime before 1.24 does not report it
        left: dict[str, int] = {}
        for part in self._session.get_provider_graph_assignment_info():
            for node in part.get_nodes():
                if part.ep_name != self.provider and node.op_type in _HEAVY:
                    left[node.op_type] = left.get(node.op_type, 0) + 1
        heavy = {
            name: count
            for name, count in left.items()
            if count >= self.manifest.model.num_layers or name == "TopK"
        }
        if heavy:
            said = ", ".join(f"{count} {name}" for name, count in sorted(heavy.items()))
            raise DllmError(
                f"ONNX Runtime {ort.__version__} would run {said} of the model on the CPU: its CUDA provider "
                "has no kernels for them: install a newer onnxruntime-gpu."
            )
