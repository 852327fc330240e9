"""Devices as data: memory, bandwidth and dense rates, for forecasts. Not measurements: what the makers publish.

Rates are dense (no sparsity), of tensor cores with 16-bit inputs and float32 sums, and of float32 without tensor cores.
Sources: A100, L4, H100 and H200 data sheets (SXM versions); Ada and RTX Blackwell architecture white papers ("FP16 Tensor TFLOPS with
FP32 Accumulate"); Jetson AGX Orin technical brief (1,024 FP16 FMA a clock and SM;
16 SMs at 1.3 GHz with 64 GB, 14 at 0.93 GHz with 32 GB); Jetson T5000 (Thor) data sheet,
whose dense 16-bit rate is an eighth of its 2,070 sparse FP4 TFLOPS.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trt_runtime.errors import unknown

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """memory in bytes, of which `reserved` are not for models (driver, context, operating system); GB/s; TFLOPS.

    A rate of None is not known: no time is forecast.
    """

    name: str
    memory: int
    reserved: int
    bandwidth: float | None = None
    rate16: float | None = None
    rate32: float | None = None
    is_cpu: bool = False


def _gpu(name: str, gib: float, bandwidth: float, rate16: float, rate32: float, reserved: float = 0.7) -> Device:
    return Device(name, int(gib * GIB), int(reserved * GIB), bandwidth, rate16, rate32)


# memory of data-centre cards and Jetsons as the driver reports it; GeForce cards as named (the driver reports up to 2 % less)
DEVICES = {
    "a100-40g": _gpu("A100 40 GB", 39.4, 1555, 312, 19.5),
    "a100-80g": _gpu("A100 80 GB", 79.2, 2039, 312, 19.5),
    "h100": _gpu("H100 SXM", 79.6, 3350, 989.4, 66.9),
    "h200": _gpu("H200 SXM", 140.4, 4800, 989.4, 66.9),
    "l4": _gpu("L4", 22.5, 300, 121, 30.3),
    "orin-32g": _gpu("Jetson AGX Orin 32 GB", 29.9, 204.8, 26.6, 3.3, reserved=4),
    "orin-64g": _gpu("Jetson AGX Orin 64 GB", 61.3, 204.8, 42.5, 5.3, reserved=4),
    "rtx-4090": _gpu("GeForce RTX 4090", 24.0, 1008, 165.2, 82.6),
    "rtx-5070": _gpu("GeForce RTX 5070", 12.0, 672, 61.7, 30.9),
    "rtx-5070-ti": _gpu("GeForce RTX 5070 Ti", 16.0, 896, 87.9, 43.9),
    "rtx-5080": _gpu("GeForce RTX 5080", 16.0, 960, 112.6, 56.3),
    "rtx-5090": _gpu("GeForce RTX 5090", 32.0, 1792, 209.5, 104.8),
    "thor": _gpu("Jetson AGX Thor (T5000)", 122.8, 273, 259, 8.1, reserved=4),
}  # fmt: skip


def find(name: str) -> Device:
    """A device by its name in the table, or 'cpu' for this machine. Raises DllmError for an unknown one."""
    if name == "cpu":
        return this_machine()
    if name not in DEVICES:
        raise unknown("device", name, ["cpu", *DEVICES])
    return DEVICES[name]


def this_machine() -> Device:
    """This machine's memory, as Linux gives it; a tenth of it is left to the system."""
    total = meminfo("MemTotal")
    return Device("this machine's CPU", total, total // 10, is_cpu=True)


def meminfo(key: str) -> int:
    """A line of /proc/meminfo in bytes; 0 where there is none."""
    path = Path("/proc/meminfo")
    for line in path.read_text(encoding="ascii").splitlines() if path.is_file() else []:
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0
