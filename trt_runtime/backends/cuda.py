"""One GPU through NVIDIA's cuda-python: memory, a stream, graphs of recorded work, kernels from PTX. No
torch.

Addresses are plain integers. Work is queued on the device's one stream; nothing is read or reused before
`synchronize`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import math
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_runtime.errors import BackendError, DllmError
from trt_runtime.system import commands

ALIGNMENT = 256  # bytes: the alignment that TensorRT requires of every address


def _mend() -> str:
    return (
        f"install NVIDIA's cuda-bindings ({commands.package('cuda-bindings')}, for the CUDA version "
        f"of the driver) and a driver; 'dllm-trt doctor' lists what is installed"
    )


def _bindings() -> tuple[Any, Any]:
    try:
        return importlib.import_module("cuda.bindings.runtime"), importlib.import_module(
            "cuda.bindings.driver"
        )
    except ImportError as error:
        raise DllmError(f"the GPU needs a package that is missing ({error}): {_mend()}.") from error


@dataclass(frozen=True)
class DeviceMemory:
    """Device memory: zeroed when allocated, freed with the object."""

    address: int
    size: int
    _owner: object


@dataclass(frozen=True)
class Graph:
    """Recorded work: `Device.launch` queues all of it with one call."""

    handle: Any
    _owner: object


@dataclass(frozen=True)
class Facts:
    """Facts about a GPU. compute_capability: 90 for 9.0. driver: the newest CUDA version that its driver
    supports, like '13.0'."""

    name: str
    compute_capability: int
    driver: str


Tensors = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]  # name -> element type and shape


@dataclass(frozen=True)
class Arena:
    """Small tensors: one piece of pinned memory and one of the device, with the same offsets in both."""

    host: npt.NDArray[np.uint8]
    device: DeviceMemory

    def place(self, tensors: Tensors) -> tuple[dict[str, npt.NDArray[Any]], dict[str, int], int]:
        """Arrays in pinned memory and addresses on the device for tensors of these shapes, and the bytes in
        use."""
        arrays, addresses, offset = {}, {}, 0
        for name, (dtype, shape) in tensors.items():
            size = dtype.itemsize * math.prod(shape)
            arrays[name] = self.host[offset : offset + size].view(dtype).reshape(shape)
            addresses[name] = self.device.address + offset
            offset = aligned(offset + size)
        return arrays, addresses, offset

    @staticmethod
    def size_of(tensors: Tensors) -> int:
        """The bytes that `place` will need."""
        return sum(aligned(dtype.itemsize * math.prod(shape)) for dtype, shape in tensors.values())


def bindings_major() -> int | None:
    """The CUDA major version of cuda-bindings; None if it is not installed as a package."""
    try:
        return int(importlib.metadata.version("cuda-bindings").split(".")[0])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def aligned(size: int) -> int:
    """The next aligned offset."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Owner:
    """Owns a resource, which is freed when this object is garbage-collected."""


class CudaDevice:
    """The GPU `index`, and the one stream on which all work is queued."""

    def __init__(self, index: int = 0) -> None:
        self._runtime, self._driver = _bindings()
        try:
            count = self._do("cudaGetDeviceCount")
        except BackendError as error:
            raise DllmError(f"no usable GPU ({error}): {self._remedy(error)}.") from error
        if not 0 <= index < count:
            raise DllmError(f"GPU {index} was requested, but this machine has {count}: {_mend()}.")
        self.index = index
        self.enter()
        self.facts = self._facts(index)
        self.stream = int(self._do("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking))

    def _facts(self, index: int) -> Facts:
        properties, version = (
            self._do("cudaGetDeviceProperties", index),
            int(self._do("cudaDriverGetVersion")),
        )
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        return Facts(
            name.strip("\0"),
            properties.major * 10 + properties.minor,
            f"{version // 1000}.{version % 1000 // 10}",
        )

    def _remedy(self, error: BackendError) -> str:
        """What to do if the GPU cannot be used: most often cuda-bindings needs a newer CUDA than the driver
        supports."""
        with contextlib.suppress(BackendError):
            driver, bindings = int(self._do("cudaDriverGetVersion")) // 1000, bindings_major()
            if "InsufficientDriver" in str(error) and bindings is not None and 0 < driver < bindings:
                older = commands.package(f"cuda-bindings<{driver + 1}")
                return (
                    f"cuda-bindings is for CUDA {bindings}, but the driver supports CUDA {driver}: {older} "
                    f"(in the extras trt-cu{driver} and rtx-cu{driver}), "
                    "or update the driver (CUDA 13 needs 580 or newer)"
                )
        return _mend()

    def enter(self) -> None:
        """Make this the device of the calling thread, which CUDA tracks per thread. Called every time,
        because thread numbers are reused."""
        self._do("cudaSetDevice", self.index)

    def _do(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime and return its result. Raises BackendError for an error
        code."""
        return self._checked(name, getattr(self._runtime, name)(*arguments))

    def _checked(self, name: str, answer: tuple[Any, ...]) -> Any:
        code, *results = answer
        if int(code) != 0:
            raise BackendError(f"CUDA's {name} failed: {getattr(code, 'name', code)}")
        return results[0] if len(results) == 1 else tuple(results)

    def allocate(self, size: int) -> DeviceMemory:
        """Zeroed memory of `size` bytes."""
        self.enter()
        try:
            address = int(self._do("cudaMalloc", max(size, 1)))
        except BackendError as error:
            raise BackendError(
                f"could not allocate {size / 2**30:.2f} GiB on the GPU ({error}): use a smaller batch or "
                f"length; 'dllm-trt plan' says what fits."
            ) from error
        owner = _Owner()
        weakref.finalize(owner, self._runtime.cudaFree, address)
        self._do("cudaMemsetAsync", address, 0, max(size, 1), self.stream)
        return DeviceMemory(address, size, owner)

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        """`size` bytes of host memory that the GPU can reach, freed with the array."""
        self.enter()
        address = int(self._do("cudaHostAlloc", max(size, 1), 0))
        memory = (ctypes.c_uint8 * max(size, 1)).from_address(address)
        weakref.finalize(memory, self._runtime.cudaFreeHost, address)
        return np.ctypeslib.as_array(memory)[:size]

    def arena(self, size: int) -> Arena:
        """Memory for small tensors on both sides."""
        return Arena(self.pinned(size), self.allocate(size))

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Queue a copy to the device. `array` must be contiguous; if it is pinned, it may change only after
        `synchronize`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._do("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, array: npt.NDArray[Any], address: int) -> None:
        """Queue a copy to the host; `array` is complete after `synchronize`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._do("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        """Queue a copy of `height` pieces of `width` bytes on the device, each one pitch after the one
        before."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._do(
            "cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, height, kind, self.stream
        )

    def synchronize(self) -> None:
        """Wait for everything that was queued."""
        self._do("cudaStreamSynchronize", self.stream)

    def record(self, work: Callable[[], None]) -> Graph:
        """Record what `work` queues, without running it. The work must not wait or allocate."""
        self._do(
            "cudaStreamBeginCapture",
            self.stream,
            self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed,
        )
        try:
            work()
        except BaseException:
            with contextlib.suppress(BackendError):  # leave the stream usable, and report the first error
                self._do("cudaStreamEndCapture", self.stream)
            raise
        recorded = self._do("cudaStreamEndCapture", self.stream)
        handle = self._do("cudaGraphInstantiate", recorded, 0)
        self._do("cudaGraphDestroy", recorded)
        owner = _Owner()
        weakref.finalize(owner, self._runtime.cudaGraphExecDestroy, handle)
        return Graph(handle, owner)

    def launch(self, graph: Graph) -> None:
        """Queue recorded work."""
        self._do("cudaGraphLaunch", graph.handle, self.stream)

    def kernel(self, ptx: bytes, entry: str) -> CudaKernel:
        """A kernel from a PTX text, compiled by the driver for this GPU. Raises DllmError."""
        self.enter()
        try:
            module = self._checked(
                "cuModuleLoadData", self._driver.cuModuleLoadData(ptx.rstrip(b"\0") + b"\0")
            )
        except BackendError as error:
            ptx_version = re.search(rb"^\.version\s+(\S+)", ptx, re.M)
            version = ptx_version[1].decode() if ptx_version else "unknown"
            raise BackendError(
                f"the driver cannot load the kernel {entry} ({error}): its PTX has version {version} "
                f"(8.7 needs CUDA 12.8), the driver supports CUDA {self.facts.driver}: update the driver, or "
                f"do not use --plugins."
            ) from error
        function = self._checked(
            "cuModuleGetFunction", self._driver.cuModuleGetFunction(module, entry.encode())
        )
        return CudaKernel(self, function)


@dataclass(frozen=True)
class CudaKernel:
    """A loaded kernel."""

    device: CudaDevice
    function: Any

    def queue(
        self, grid: int, threads: int, shared: int, addresses: Sequence[int], sizes: Sequence[int] = ()
    ) -> None:
        """Queue a launch of `grid` blocks of `threads` threads; the arguments are device addresses, then
        int32 sizes."""
        kinds = (ctypes.c_void_p,) * len(addresses) + (ctypes.c_int32,) * len(sizes)
        arguments = ((*addresses, *sizes), kinds)
        answer = self.device._driver.cuLaunchKernel(
            self.function, grid, 1, 1, threads, 1, 1, shared, self.device.stream, arguments, 0
        )
        self.device._checked("cuLaunchKernel", answer)
