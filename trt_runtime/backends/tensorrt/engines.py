"""Engines opened: read from the disk piece by piece, checked against the contract, filled with weights where
they have none, and their contexts.

All contexts share one working memory, because they run one after the other. TensorRT-RTX compiles kernels for
the shapes that it sees, keeps them in a runtime cache, and records CUDA graphs by itself: a graph recorded
from outside would become stale when a better kernel is ready.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trt_runtime.artifact import contract
from trt_runtime.artifact.contract import TensorSpec
from trt_runtime.artifact.manifest import Manifest
from trt_runtime.backends import cuda
from trt_runtime.backends.tensorrt import builder
from trt_runtime.backends.tensorrt import store as engine
from trt_runtime.backends.tensorrt.builder import Profile
from trt_runtime.errors import BackendError, DllmError
from trt_runtime.system import atomic

CACHE_SUFFIX = ".runtime-cache"
_LOG = logging.getLogger(__name__)


@dataclass
class OpenEngine:
    """A deserialised engine: its graph's role, inputs and outputs, its profiles, and a context for each that
    was needed. `tensors` are its inputs and outputs: a prefix engine of the legacy lowering has no caches."""

    name: str
    role: str
    profiles: list[Profile]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    tensors: set[str]
    engine: Any
    contexts: dict[int, Any] = field(default_factory=dict)


class Engines:
    """The engines of a directory, opened on a device. built_for: the facts of engine.json. Raises
    DllmError."""

    records_itself = False  # whether the package records CUDA graphs itself

    def __init__(
        self,
        directory: Path,
        artifact: Path,
        manifest: Manifest,
        trt: Any,
        device: cuda.CudaDevice,
        built_for: dict[str, Any],
    ) -> None:
        self.directory, self.artifact, self.manifest, self.trt, self.device = (
            directory,
            artifact,
            manifest,
            trt,
            device,
        )
        self.capacity: int = built_for["capacity"]
        self.logger = builder.Logger(trt)
        self._runtime = trt.Runtime(self.logger.native)
        self.all = [self._open(name, listed, built_for) for name, listed in built_for["profiles"].items()]
        self._scratch = device.allocate(
            max(_scratch_bytes(entry, i) for entry in self.all for i in range(len(entry.profiles)))
        )

    def context(self, entry: OpenEngine, index: int) -> Any:
        """The context of a profile."""
        if index not in entry.contexts:
            entry.contexts[index] = self.new_context(entry, index)
        return entry.contexts[index]

    def new_context(self, entry: OpenEngine, index: int, *, recorded: bool = False) -> Any:
        """A context for a profile. recorded: for one call that is repeated in the same shapes."""
        context = self._bare_context(entry, recorded)
        if context is not None:
            _set_scratch(context, self._scratch)
        if context is None or not context.set_optimization_profile_async(index, self.device.stream):
            raise BackendError(
                f"TensorRT could not create a context for '{entry.profiles[index].name}': "
                f"{self.logger.last or 'no message'}"
            )
        self.device.synchronize()
        return context

    def close(self) -> None:
        """Release the engines and their memory; contexts held by others must be gone."""
        for entry in self.all:
            entry.contexts.clear()
        del self.all, self._runtime, self._scratch

    def _bare_context(self, entry: OpenEngine, recorded: bool) -> Any:
        """A context without working memory of its own."""
        if hasattr(self.trt, "ExecutionContextAllocationStrategy"):
            return entry.engine.create_execution_context(
                self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
            )
        return entry.engine.create_execution_context_without_device_memory()

    def _open(self, name: str, profiles: list[dict[str, Any]], built_for: dict[str, Any]) -> OpenEngine:
        file = self.directory / (name + engine.SUFFIX)
        with read_in_pieces(file, self.trt) as source:
            opened = self._runtime.deserialize_cuda_engine(source)
        if opened is None:
            raise DllmError(
                f"{file}: TensorRT {self.trt.__version__} cannot load it "
                f"({self.logger.last or 'no message'}): build it again."
            )
        role = "prefix" if name == "prefix" else "refine"
        if built_for.get("strip"):
            self._refit(opened, role)
        listed = [
            Profile(row["name"], tuple(row["batch"]), tuple(row["rows"]), tuple(row["asked"]))
            for row in profiles
        ]
        dims = self.manifest.dims
        inputs, outputs = contract.inputs(role, dims), contract.outputs(role, dims, self.manifest.head)
        expected = {spec.name for spec in (*inputs, *outputs)}
        names = {opened.get_tensor_name(i) for i in range(opened.num_io_tensors)}
        if names != expected or opened.num_optimization_profiles != len(listed):
            raise DllmError(
                f"{file}: its tensors are {sorted(names)}, expected {sorted(expected)}: build it again."
            )
        return OpenEngine(name, role, listed, inputs, outputs, names, opened)

    def _refit(self, opened: Any, role: str) -> None:
        """Put the artifact's weights into an engine that was built without them."""
        graph = self.artifact / self.manifest.graphs[role].file
        refitter = self.trt.Refitter(opened, self.logger.native)
        filler = self.trt.OnnxParserRefitter(refitter, self.logger.native)
        data = builder.with_capacity(graph, self.capacity)
        if not filler.refit_from_bytes(data, str(graph)) or not refitter.refit_cuda_engine():
            raise DllmError(
                f"{graph}: its weights do not fit the engine ({self.logger.last or 'no message'}): "
                f"build it without --strip."
            )


class RTXEngines(Engines):
    """The same for TensorRT-RTX, which records CUDA graphs itself. Its compiled kernels are saved next to the
    engines for the next start."""

    records_itself = True

    def __init__(self, *given: Any) -> None:
        self._configs: dict[tuple[str, bool], Any] = {}
        self._caches: dict[str, Any] = {}
        super().__init__(*given)

    def close(self) -> None:
        """Also save the compiled kernels; if that is impossible, they are compiled again at the next
        start."""
        for name, runtime_cache in self._caches.items():
            with suppress(OSError):
                atomic.replace(self._cache_file(name), bytes(runtime_cache.serialize()))
        self._configs.clear()
        self._caches.clear()
        super().close()

    def _bare_context(self, entry: OpenEngine, recorded: bool) -> Any:
        return entry.engine.create_execution_context(self._config(entry, recorded))

    def _config(self, entry: OpenEngine, recorded: bool) -> Any:
        key = (entry.name, recorded)
        if key not in self._configs:
            trt, opened = self.trt, entry.engine
            runtime_config = opened.create_runtime_config()
            runtime_config.set_execution_context_allocation_strategy(
                trt.ExecutionContextAllocationStrategy.USER_MANAGED
            )
            strategies = trt.CudaGraphStrategy
            runtime_config.cuda_graph_strategy = (
                strategies.WHOLE_GRAPH_CAPTURE if recorded else strategies.DISABLED
            )
            if entry.name not in self._caches:
                self._caches[entry.name] = self._cache(entry.name, runtime_config)
            if not runtime_config.set_runtime_cache(self._caches[entry.name]):
                raise BackendError(
                    f"TensorRT-RTX refused the runtime cache: {self.logger.last or 'no message'}"
                )
            self._configs[key] = runtime_config
        return self._configs[key]

    def _cache(self, name: str, runtime_config: Any) -> Any:
        """The kernels compiled in earlier runs on this GPU, or nothing yet."""
        runtime_cache, file = runtime_config.create_runtime_cache(), self._cache_file(name)
        if file.is_file() and not runtime_cache.deserialize(file.read_bytes()):
            _LOG.warning("%s: ignored: damaged or of another version; kernels are compiled again", file)
            runtime_cache.reset()
        return runtime_cache

    def _cache_file(self, name: str) -> Path:
        facts = self.device.facts
        return self.directory / f"{name}-sm{facts.compute_capability}-{self.trt.__version__}{CACHE_SUFFIX}"


@contextmanager
def read_in_pieces(file: Path, trt: Any) -> Iterator[Any]:
    """A reader that gives TensorRT the file piece by piece, so that the whole engine is never in host memory
    in addition to its weights on the device. Before TensorRT 10.7, which has no readers, the file's bytes."""
    if not hasattr(trt, "IStreamReaderV2"):
        yield file.read_bytes()
        return
    with open(file, "rb") as source:

        class Reader(trt.IStreamReaderV2):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IStreamReaderV2.__init__(self)

            def read(self, size: int, stream: int) -> bytes:
                return source.read(min(size, engine.PIECE))

            def seek(self, offset: int, where: Any) -> bool:
                whence = {
                    trt.SeekPosition.SET: os.SEEK_SET,
                    trt.SeekPosition.CUR: os.SEEK_CUR,
                    trt.SeekPosition.END: os.SEEK_END,
                }
                source.seek(offset, whence[where])
                return True

        yield Reader()


def _scratch_bytes(entry: OpenEngine, index: int) -> int:
    """Working memory of a profile. Before TensorRT 10, an engine only reports that of all its profiles."""
    if hasattr(entry.engine, "get_device_memory_size_for_profile_v2"):
        return int(entry.engine.get_device_memory_size_for_profile_v2(index))
    return int(entry.engine.device_memory_size)


def _set_scratch(context: Any, scratch: cuda.DeviceMemory) -> None:
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(scratch.address, scratch.size)
    else:
        context.device_memory = scratch.address
