"""Devices as data: memory, bandwidth and dense rates, for forecasts. For GPUs the published figures; for this
machine's CPU the rates of a copy and a matrix product, measured when asked.

Rates are dense (no sparsity), of tensor cores with 16-bit inputs and float32 sums, and of float32 without
tensor cores.
Sources: A100, L4, H100 and H200 data sheets (SXM versions); Ada and RTX Blackwell architecture white papers
("FP16 Tensor TFLOPS with FP32 Accumulate"); Jetson AGX Orin technical brief (1,024 FP16 FMA a clock and SM;
16 SMs at 1.3 GHz with 64 GB, 14 at 0.93 GHz with 32 GB); Jetson T5000 (Thor) data sheet, whose dense 16-bit
rate is an eighth of its 2,070 sparse FP4 TFLOPS.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from trt_runtime.errors import unknown
from trt_runtime.system import processor

GIB = 1 << 30
_COPIED = 1 << 26  # bytes: more than the caches of most processors
_PATIENCE = 0.08  # seconds for each of the two measurements
# 8-bit products compared with fp32, an estimate: 441 Gop/s against 112 GFLOP/s with AVX-512 VNNI
# (benchmarks/results/system-scaling.json); without such instructions there is no speedup to count on
_INT8_GAIN, _INT8_FLAGS = 3.9, {"avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp"}


@dataclass(frozen=True)
class DeviceSpec:
    """memory in bytes, of which `reserved` are not for models (driver, context, operating system); GB/s;
    TFLOPS.

    A rate of None is unknown: then no time is forecast. rate8: of 8-bit products, of a CPU.
    compute_capability: of a GPU, as 89 for 8.9.
    shared: whether host and GPU have one memory. reads_whole: whether its TensorRT (before 10.7) holds an
    engine's file whole in host memory while it opens it.
    """

    name: str
    memory: int
    reserved: int
    bandwidth: float | None = None
    rate16: float | None = None
    rate32: float | None = None
    is_cpu: bool = False
    rate8: float | None = None
    compute_capability: int = 0
    shared: bool = False
    reads_whole: bool = False


def _gpu(
    name: str,
    capability: int,
    gib: float,
    bandwidth: float,
    rate16: float,
    rate32: float,
    reserved: float = 0.7,
) -> DeviceSpec:
    return DeviceSpec(
        name, int(gib * GIB), int(reserved * GIB), bandwidth, rate16, rate32, compute_capability=capability
    )


def _jetson(
    name: str,
    capability: int,
    gib: float,
    bandwidth: float,
    rate16: float,
    rate32: float,
    *,
    reads_whole: bool,
) -> DeviceSpec:
    gpu = _gpu(name, capability, gib, bandwidth, rate16, rate32, reserved=4)
    return replace(gpu, shared=True, reads_whole=reads_whole)


# Jetsons with the TensorRT of their JetPack: Orin's 10.3 (JetPack 6), Thor's 10.13 (7). Memory of data-centre
# cards and Jetsons as the driver reports it; GeForce cards as named (the driver reports up to 2 % less)
DEVICES = {
    "a100-40g": _gpu("A100 40 GB", 80, 39.4, 1555, 312, 19.5),
    "a100-80g": _gpu("A100 80 GB", 80, 79.2, 2039, 312, 19.5),
    "h100": _gpu("H100 SXM", 90, 79.6, 3350, 989.4, 66.9),
    "h200": _gpu("H200 SXM", 90, 140.4, 4800, 989.4, 66.9),
    "l4": _gpu("L4", 89, 22.5, 300, 121, 30.3),
    "orin-32g": _jetson("Jetson AGX Orin 32 GB", 87, 29.9, 204.8, 26.6, 3.3, reads_whole=True),
    "orin-64g": _jetson("Jetson AGX Orin 64 GB", 87, 61.3, 204.8, 42.5, 5.3, reads_whole=True),
    "rtx-4090": _gpu("GeForce RTX 4090", 89, 24.0, 1008, 165.2, 82.6),
    "rtx-5070": _gpu("GeForce RTX 5070", 120, 12.0, 672, 61.7, 30.9),
    "rtx-5070-ti": _gpu("GeForce RTX 5070 Ti", 120, 16.0, 896, 87.9, 43.9),
    "rtx-5080": _gpu("GeForce RTX 5080", 120, 16.0, 960, 112.6, 56.3),
    "rtx-5090": _gpu("GeForce RTX 5090", 120, 32.0, 1792, 209.5, 104.8),
    "thor": _jetson("Jetson AGX Thor (T5000)", 110, 122.8, 273, 259, 8.1, reads_whole=False),
}  # fmt: skip


def find(name: str) -> DeviceSpec:
    """A device by its name in the table, or 'cpu' for this machine. Raises DllmError for an unknown name."""
    if name == "cpu":
        return this_machine()
    if name not in DEVICES:
        raise unknown("device", name, ["cpu", *DEVICES])
    return DEVICES[name]


def this_machine() -> DeviceSpec:
    """This machine: its memory as Linux reports it, a tenth of which is left to the system; bandwidth and
    rates, measured in less than half a second. ONNX Runtime computes fp16 in fp32 on a CPU and no bf16, so
    there is no 16-bit rate."""
    total, rates = meminfo("MemTotal"), _rates()
    if rates is None:
        return DeviceSpec("this machine's CPU", total, total // 10, is_cpu=True)
    bandwidth, rate = rates
    gain = _INT8_GAIN if has_int8() else 1.0
    return DeviceSpec(
        "this machine's CPU",
        total,
        total // 10,
        bandwidth / 1e9,
        None,
        rate / 1e12,
        is_cpu=True,
        rate8=gain * rate / 1e12,
    )


@lru_cache(maxsize=1)
def _rates() -> tuple[float, float] | None:
    """Bytes and operations per second, measured once; None if so little memory is free that a forecast of a
    time would be wrong."""
    try:
        return _bandwidth(), _product_rate()
    except MemoryError:
        return None


def has_int8() -> bool:
    """Whether the processor multiplies 8-bit numbers faster than fp32, by the flags that Linux lists."""
    return bool(_INT8_FLAGS.intersection(processor.instruction_sets()))


def _bandwidth() -> float:
    """Bytes per second of a copy by all cores, counting both directions."""
    cores = len(os.sched_getaffinity(0))
    source = np.ones(_COPIED, np.uint8)
    target = np.zeros_like(source)
    pairs = list(zip(np.array_split(target, cores), np.array_split(source, cores), strict=True))
    with ThreadPoolExecutor(cores) as pool:
        return (
            2 * source.nbytes / _least(lambda: [None for _ in pool.map(np.copyto, *zip(*pairs, strict=True))])
        )


def _product_rate() -> float:
    """Operations per second of an fp32 matrix product in NumPy, with its own threads."""
    rows, inputs, outputs = 256, 1024, 1024
    x, weight = np.ones((rows, inputs), np.float32), np.ones((inputs, outputs), np.float32)
    out = np.empty((rows, outputs), np.float32)
    return 2 * rows * inputs * outputs / _least(lambda: np.matmul(x, weight, out=out))


def _least(run: Callable[[], object]) -> float:
    """The shortest time of a call, after a warm-up."""
    run()
    best, end = float("inf"), time.perf_counter() + _PATIENCE
    while True:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() > end:
            return max(best, 1e-9)


def meminfo(key: str) -> int:
    """A line of /proc/meminfo in bytes; 0 if it does not exist."""
    path = Path("/proc/meminfo")
    for line in path.read_text(encoding="ascii").splitlines() if path.is_file() else []:
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def size_text(size: float) -> str:
    """Bytes in the largest unit that gives at least one."""
    unit, name = next(
        ((unit, name) for unit, name in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")) if size >= unit),
        (1, "B"),
    )
    return (
        f"{size / unit:.2f} {name}"
        if unit == GIB
        else f"{size / unit:.1f} {name}"
        if unit > 1
        else f"{size:.0f} B"
    )
