"""Triton kernels compiled ahead of time, without a GPU, so that TensorRT or the CUDA driver can launch them
without Triton."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_MOST_SHARED = 48 * 1024  # bytes of shared memory that a launch gets without asking


_NAMES = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}


def dtype_of(tensor: Any) -> str:
    """The type of a PyTorch tensor as kernels name it: fp32, fp16 or bf16."""
    return _NAMES[str(tensor.dtype)]


class CompiledKernel(NamedTuple):
    """What a launch needs: the entry's name, PTX, threads of a block, and bytes of shared memory. Arguments:
    the kernel's arguments that are not constants, in order."""

    name: str
    ptx: str
    threads: int
    shared: int


def ahead_of_time(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, int],
    name: str,
    compute_capability: int,
    warps: int = 4,
    stages: int = 3,
) -> CompiledKernel:
    """A kernel compiled for one compute capability (90 is 9.0); its entry is called `name`. Raises ValueError
    if it needs launch features that TensorRT and the driver launch do not set up. stages: of the pipeline
    that loads tiles ahead.

    Pointers must be aligned to 16 bytes: the compiler relies on it for wide loads.
    """
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # otherwise the PTX contains this machine's paths
        made = triton.compile(
            ASTSource(kernel, dict(signature), dict(constants), aligned),
            target=GPUTarget("cuda", compute_capability, 32),
            options={"num_warps": warps, "num_stages": stages},
        )
    facts = made.metadata
    needs = {
        item: held
        for item in (
            "global_scratch_size",
            "profile_scratch_size",
            "tmem_size",
            "launch_cooperative_grid",
            "launch_pdl",
        )
        if (held := getattr(facts, item))
    }
    if needs or facts.num_ctas != 1 or facts.shared > _MOST_SHARED:
        raise ValueError(
            f"{name}: unsupported launch requirements: {needs}, num_ctas {facts.num_ctas}, shared "
            f"{facts.shared}; expected none, num_ctas 1 and shared at most {_MOST_SHARED}"
        )
    ptx = re.sub(rf"\b{facts.name}(?=\b|_param_)", name, without_scratch(made.asm["ptx"]))
    return CompiledKernel(name, ptx, facts.num_warps * 32, facts.shared)


def without_scratch(ptx: str) -> str:
    """PTX without the two pointers (global and profile scratch) that Triton appends to the parameters of its
    only entry.

    Raises ValueError when there is no such entry, or when the kernel reads one of them.
    """
    entries = re.findall(r"^\s*(?:\.visible|\.weak)?\s*\.entry\s+(\w+)\s*\(([^)]*)\)", ptx, re.MULTILINE)
    if len(entries) != 1:
        raise ValueError(f"the PTX has {len(entries)} entries, expected one")
    ((name, declared),) = entries
    parameters = [line.strip() for line in declared.split(",")]
    found = [re.search(r"\.param\s+(\.\w+)\s.*?(\w+)$", line, re.DOTALL) for line in parameters[-2:]]
    if len(parameters) < 2 or any(item is None or item[1] not in (".u64", ".b64") for item in found):
        raise ValueError(f"{name}: its last two parameters are {parameters[-2:]}, expected two pointers")
    for item in found:
        if item is not None and len(re.findall(rf"\b{re.escape(item[2])}\b", ptx)) != 1:
            raise ValueError(f"{name}: uses its scratch pointer {item[2]}, which is not supported")
    kept = ",\n\t".join(parameters[:-2])
    return ptx.replace(f"({declared})", f"(\n\t{kept}\n)", 1)
