"""The CPU as Linux reports it: its name, and the instruction sets that determine the speed of matrix
products."""

from __future__ import annotations

import platform
from pathlib import Path

# as /proc/cpuinfo spells them: x86, then Arm
SETS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)


def name() -> str:
    """The model's name; the architecture's if the system gives none."""
    return _field("model name") or platform.machine()


def instruction_sets() -> list[str]:
    """Those of SETS that the processor has; empty if the system does not say."""
    flags = set((_field("flags") or _field("Features")).split())
    return [item for item in SETS if item in flags]


def _field(key: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        if line.partition(":")[0].strip() == key:
            return line.partition(":")[2].strip()
    return ""
