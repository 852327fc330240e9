"""ONNX Runtime, on a CPU or a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trt_runtime.backends.ort.cpu import OrtBackend
from trt_runtime.backends.ort.cuda import OrtCudaBackend
from trt_runtime.backends.ort.session import OrtSession
from trt_runtime.backends.spec import CPU
from trt_runtime.errors import unknown

__all__ = ["OrtBackend", "OrtCudaBackend", "OrtSession", "open_ort"]
_CLASSES: dict[str, type[OrtSession]] = {cls.device: cls for cls in (OrtBackend, OrtCudaBackend)}


def open_ort(
    artifact: Path,
    *,
    threads: int | None = None,
    device: str = CPU,
    steps_per_sync: int = 1,
    spin: bool = False,
    **options: Any,
) -> OrtSession:
    """An artifact on the device 'cpu' or 'cuda'; other options are those of OrtSession. Raises DllmError."""
    if device not in _CLASSES:
        raise unknown("device of ONNX Runtime", device, _CLASSES)
    return _CLASSES[device](artifact, threads=threads, steps_per_sync=steps_per_sync, spin=spin, **options)
