"""A stand-in for CUDA: the functions of cuda-python that trt_runtime.backends.cuda uses, over host memory.

Queued work runs only at a synchronisation, so a result that is read too early is wrong. Fresh memory is full
of NaN. Addresses are checked against the allocations. A capture refuses to wait and to allocate.
"""

from __future__ import annotations

import ctypes
import enum
import types

import numpy as np

ALIGNMENT = 256


class Cuda:
    """The functions of cuda.bindings.runtime and .driver that trt_runtime.backends.cuda uses. `kernels`:
    entry name -> function of arguments."""

    class cudaMemcpyKind(enum.IntEnum):
        cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice = 1, 2, 3

    class cudaStreamCaptureMode(enum.IntEnum):
        cudaStreamCaptureModeRelaxed = 2

    class Code(enum.IntEnum):
        cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation, cudaErrorStreamCaptureUnsupported = (
            0,
            1,
            2,
            900,
        )

    cudaStreamNonBlocking = 1

    def __init__(self, devices: int = 1, memory: int = 1 << 33) -> None:
        self.devices, self.left = devices, memory
        self.queue: list = []
        self.captured: list | None = None
        self.spaces: dict[str, dict[int, np.ndarray]] = {"device": {}, "host": {}}
        self.kernels: dict = {}
        self.launches = self.executions = 0

    # memory
    def _new(self, space, size):
        if self.captured is not None:
            return self.Code.cudaErrorStreamCaptureUnsupported, None
        if size > self.left:
            return self.Code.cudaErrorMemoryAllocation, None
        raw = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        address = -(-raw.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.spaces[space][address] = raw
        self.left -= size
        return self.Code.cudaSuccess, address

    def _freed(self, space, address):
        self.left += len(self.spaces[space].pop(address)) - ALIGNMENT
        return (self.Code.cudaSuccess,)

    def cudaMalloc(self, size):
        return self._new("device", size)

    def cudaFree(self, address):
        return self._freed("device", address)

    def cudaHostAlloc(self, size, flags):
        return self._new("host", size)

    def cudaFreeHost(self, address):
        return self._freed("host", address)

    def holds(self, space, address, size) -> bool:
        """Whether memory of a space covers these bytes."""
        return any(
            start <= address and address + size <= start + len(raw) - ALIGNMENT
            for start, raw in self.spaces[space].items()
        )

    # work
    def _queued(self, work):
        (self.queue if self.captured is None else self.captured).append(work)
        return (self.Code.cudaSuccess,)

    def cudaMemsetAsync(self, address, value, size, stream):
        if not self.holds("device", address, size):
            return (self.Code.cudaErrorInvalidValue,)
        return self._queued(lambda: ctypes.memset(address, value, size))

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        spaces = {1: ("device", "host"), 2: ("host", "device"), 3: ("device", "device")}[int(kind)]
        if not (self.holds(spaces[0], target, size) and self.holds(spaces[1], source, size)):
            return (self.Code.cudaErrorInvalidValue,)
        return self._queued(lambda: ctypes.memmove(target, source, size))

    def cudaMemcpy2DAsync(self, target, target_pitch, source, source_pitch, width, height, kind, stream):
        ends = ((target, target_pitch), (source, source_pitch))
        if any(
            pitch < width or not self.holds("device", at, pitch * (height - 1) + width) for at, pitch in ends
        ):
            return (self.Code.cudaErrorInvalidValue,)

        def work():
            for i in range(height):
                ctypes.memmove(target + i * target_pitch, source + i * source_pitch, width)

        return self._queued(work)

    def cudaStreamCreateWithFlags(self, flags):
        return self.Code.cudaSuccess, 7

    def cudaStreamSynchronize(self, stream):
        if self.captured is not None:
            return (self.Code.cudaErrorStreamCaptureUnsupported,)
        waiting, self.queue = self.queue, []
        for work in waiting:
            work()
        return (self.Code.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.captured = []
        return (self.Code.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        graph, self.captured = self.captured, None
        return self.Code.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph, flags):
        return self.Code.cudaSuccess, list(graph)

    def cudaGraphDestroy(self, graph):
        return (self.Code.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        for work in graph:
            self._queued(work)
        return (self.Code.cudaSuccess,)

    # the machine
    def cudaGetDeviceCount(self):
        return self.Code.cudaSuccess, self.devices

    def cudaSetDevice(self, index):
        return (self.Code.cudaSuccess,)

    def cudaGetDeviceProperties(self, index):
        return self.Code.cudaSuccess, types.SimpleNamespace(name=b"Stand-in GPU\0\0", major=9, minor=0)

    def cudaDriverGetVersion(self):
        return self.Code.cudaSuccess, 13000

    # kernels: an entry's name selects a Python function of addresses
    def cuModuleLoadData(self, image):
        assert image.endswith(b"\0")
        return self.Code.cudaSuccess, image

    def cuModuleGetFunction(self, module, name):
        known = name.decode() in self.kernels and name in module
        return (self.Code.cudaSuccess if known else self.Code.cudaErrorInvalidValue), name.decode()

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra):
        values, kinds = arguments
        pointers = [value for value, kind in zip(values, kinds, strict=True) if kind is ctypes.c_void_p]
        if not all(self.holds("device", address, 1) for address in pointers):
            return (self.Code.cudaErrorInvalidValue,)
        return self._queued(lambda: self.kernels[function](gx, *values))


def commit_kernel(mask_token_id):
    """The reference of plugins/commit.py, over addresses."""
    from trt_runtime.decoding import device_commit as steps

    def run(batch, ids, token, confidence, plan, value, state, committed, rows, columns):
        at = [
            view(address, shape, np.dtype(kind))
            for address, shape, kind in (
                (ids, (batch, rows), np.int64),
                (token, (batch, columns), np.int64),
                (confidence, (batch, columns), np.float32),
                (plan, (batch, 4), np.int32),
                (value, (batch,), np.float64),
                (state, (batch, 2), np.int32),
                (committed, (batch, columns), np.int32),
            )
        ]
        steps.commit(at[0], at[1], at[2], steps.CommitArrays(*at[3:]), mask_token_id)

    return run


def view(address, shape, kind):
    size = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), kind).reshape(shape)
