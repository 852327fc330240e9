"""The NVIDIA driver and its GPUs, queried through libcuda: no CUDA toolkit and no package is needed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

from trt_runtime.backends.cuda import bindings_major
from trt_runtime.machine.devices import GIB
from trt_runtime.machine.packages import (
    ABSENT,
    OK,
    WARNING,
    Finding,
)
from trt_runtime.system import commands


def gpu_findings() -> Iterator[Finding]:
    """The driver and its devices, queried through libcuda."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        if not all(hasattr(cuda, name) for name in ("cuDriverGetVersion", "cuDeviceTotalMem_v2")):
            raise OSError("a stub of the driver's library")
    except OSError:
        yield Finding("GPU", ABSENT, "no NVIDIA driver (libcuda.so.1)", "install the driver, or use the CPU")
        return
    number, version = ctypes.c_int(), ctypes.c_int()
    if code := cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number)):
        yield Finding(
            "GPU",
            WARNING,
            f"the driver failed to initialise (CUDA error {code})",
            "check nvidia-smi; in a container, start it with --gpus all",
        )
        return
    cuda.cuDriverGetVersion(ctypes.byref(version))
    yield _driver(version.value)
    for index in range(number.value):
        yield Finding("GPU", OK, _describe_gpu(cuda, index))
    if not number.value:
        yield Finding("GPU", ABSENT, "the driver reports no GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES")


def _driver(version: int) -> Finding:
    """Whether the installed cuda-bindings work with the driver: they must not be for a newer CUDA."""
    driver, bindings = version // 1000, bindings_major()
    said = f"CUDA {driver}.{version % 1000 // 10}"
    if bindings is None or bindings <= driver:
        return Finding("NVIDIA driver", OK, said)
    return Finding(
        "NVIDIA driver",
        WARNING,
        f"{said}, but cuda-bindings is for CUDA {bindings}: every call will fail",
        f"{commands.package(f'cuda-bindings<{driver + 1}')}, or update the driver",
    )


def _describe_gpu(cuda: Any, index: int) -> str:
    device, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
    major, minor = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    for value, attribute in (
        (major, 75),
        (minor, 76),
    ):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return (
        f"{name.value.decode(errors='replace')}, {size.value / GIB:.1f} GiB, compute capability "
        f"{major.value}.{minor.value}"
    )
