"""The longest canvas that a server takes by default: as long as memory allows for all slots."""

from __future__ import annotations

import importlib
import resource
from pathlib import Path
from typing import Any

from trt_runtime.artifact.contract import SPARE_ROWS
from trt_runtime.artifact.manifest import ModelFacts
from trt_runtime.errors import DllmError
from trt_runtime.machine import devices
from trt_runtime.machine.roofline import Work, cache_bytes
from trt_runtime.model import Model

SHARE = (
    # share of the memory that is free once the model is open: the rest is for activations, answers and other
    # processes
    0.5
)
_STEP, _LEAST = 64, 64


def longest_canvas(
    facts: ModelFacts, slots: int, asked: int | None, free: int | None = None, share: float = SHARE
) -> int:
    """Tokens of the longest canvas: `asked`, else the longest whose caches for `slots` fit into a share of
    the `free` bytes (default: this machine's; 0: unknown), and never more than the model's. Raises DllmError
    if even a short one does not fit, or too much is asked for."""
    if asked is not None:
        if asked > facts.max_length:
            raise DllmError(
                f"--max-length is {asked}, expected at most {facts.max_length}, the model's maximum."
            )
        return asked
    free = free_memory() if free is None else free
    each = cache_bytes(facts, Work(slots, 1, 1))
    if not free or each * (facts.max_length + SPARE_ROWS) <= share * free:
        return facts.max_length
    length = (int(share * free / each) - SPARE_ROWS) // _STEP * _STEP
    if length < min(_LEAST, facts.max_length):
        raise DllmError(
            f"{slots} slots do not fit into memory: one token in every slot takes {each / 1024:g} KiB, and "
            f"{free / 2**20:,.0f} MiB are free: use fewer --slots, or set a shorter --max-length."
        )
    return min(length, facts.max_length)


def longest_of(model: Model, slots: int, asked: int | None, share: float = SHARE) -> int:
    """longest_canvas for an opened model, in the memory of its device; engines limit it to the length they
    were built for. Raises DllmError."""
    backend = model.backend
    longest = longest_canvas(
        model.manifest.model, slots, asked, free_memory() if backend.is_on_cpu else _of_gpu(), share
    )
    capacity = getattr(backend, "capacity", None)
    return longest if asked is not None or capacity is None else max(1, min(longest, capacity - SPARE_ROWS))


def free_memory() -> int:
    """Bytes that this process can still allocate, limited by the machine, its control group and its address
    space. 0 if unknown."""
    known = [devices.meminfo("MemAvailable"), _of_group(), _of_process()]
    return min((size for size in known if size), default=0)


def _of_gpu() -> int:
    """Free bytes of the current GPU; 0 if cuda-python is missing or finds none."""
    try:
        runtime: Any = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return 0
    status, *sizes = runtime.cudaMemGetInfo()
    return int(sizes[0]) if int(status) == 0 else 0


def _of_group() -> int:
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        return max(1, limit - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no such control group, or 'max'
        return 0


def _of_process() -> int:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return 0
    try:
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 0
    return max(1, limit - used)
