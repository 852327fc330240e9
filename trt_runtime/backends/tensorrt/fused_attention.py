"""Which attention kernels an engine uses, read from the engine's own bytes: they contain the source and the
launch arguments of kernels that are compiled at run time (TensorRT-RTX), or the names of compiled kernels
(TensorRT).

A 16-bit attention without a fused kernel is decomposed: correct but slow, and the builder does not report it.
A kernel that sums in fp16 is less exact.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

# the call that sets up a fused kernel: types of input, output and sums, addresses and sizes, then the scale
_CALL = re.compile(rb"\.initialize\(DATA_TYPE_(\w+), DATA_TYPE_\w+, DATA_TYPE_(\w+), ([^()]{1,400})\)")
_SCALE = re.compile(rb"(-?0x[0-9a-f.]+p[+-]?\d+)f")
_NAMES = re.compile(rb"(?:gemm_mha|fmha|mha_v\d)\w{0,80}")  # TensorRT's names of compiled kernels


@dataclass(frozen=True)
class FusedKernel:
    """A kind of fused attention kernel. dtype: of q, k and v; sums: of the scores and their product with v;
    scale: the factor of the scores inside the
    kernel. None: unknown, the engine does not say."""

    dtype: str | None
    sums: str | None
    scale: float | None


def found(engine: Any) -> dict[FusedKernel, int]:
    """The fused attention kernels in the bytes of an engine (bytes or any buffer), and how often each occurs.
    Empty if there is none."""
    data = memoryview(engine)
    kernels: Counter[FusedKernel] = Counter()
    for call in _CALL.finditer(data):
        scale = _SCALE.search(call[3])
        kernels[
            FusedKernel(
                call[1].decode().lower(),
                call[2].decode().lower(),
                float.fromhex(scale[1].decode()) if scale else None,
            )
        ] += 1
    if not kernels and (named := len(set(match[0] for match in _NAMES.finditer(data)))):
        kernels[FusedKernel(None, None, None)] = named
    return dict(kernels)


def as_list(kernels: dict[FusedKernel, int]) -> list[dict[str, Any]]:
    """For engine.json."""
    return [asdict(kernel) | {"count": count} for kernel, count in sorted(kernels.items(), key=str)]


def complaint(kernels: dict[FusedKernel, int], dtype: str, name: str) -> str:
    """What a user should know about an engine's attention; empty if all is well. dtype: of the artifact."""
    if dtype == "fp32":
        return ""  # no package has a fused kernel for it
    if not kernels:
        return (
            f"{name}: the engine has no fused attention kernel: attention is decomposed, which is correct "
            f"but slow"
        )
    if any(kernel.sums is not None and kernel.sums != "fp32" for kernel in kernels):
        return (
            f"{name}: attention sums in 16 bits: expect confidences to differ; verify with 'dllm-trt replay'"
        )
    return ""
