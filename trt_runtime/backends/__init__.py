"""Backends: what runs a graph. One table; nothing heavy is imported before a backend is opened."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

from trt_runtime.artifact.manifest import ORT_CPU, TENSORRT
from trt_runtime.backends.spec import CPU, BackendSpec, Layout
from trt_runtime.decoding.backend import Backend
from trt_runtime.errors import unknown
from trt_runtime.optional import import_optional
from trt_runtime.registry import Registry
from trt_runtime.system import commands

DEFAULT, REFERENCE = "ort", "torch"
_RENAMED = {"steps_per_look": "steps_per_sync"}
_ENGINE_OPTIONS = ("device", "steps_per_sync", "engines")
_ENGINES = tuple(
    Layout(
        f"tensorrt, {words} ({label})",
        f"trt {label}",
        copies,
        scores=False,
        quantized_for=TENSORRT,
        reads_whole=True,
    )
    for words, label, copies in (("one engine", "shared", 1), ("two engines", "split", 2))
)

BACKENDS: Registry[BackendSpec] = Registry(
    "backend",
    "dllm_trt.backends",
    "a trt_runtime.backends.spec.BackendSpec",
    lambda item: isinstance(item, BackendSpec),
    (
        BackendSpec(
            "ort",
            "trt_runtime.backends.ort:open_ort",
            partial(commands.install, "ort"),
            ("threads", "device", "steps_per_sync", "spin"),
            devices=(CPU, "cuda"),
            is_concurrent=True,
            renamed=_RENAMED,
            layouts=(Layout("ort, one session", "ort", on_cpu=True, widens=True, quantized_for=ORT_CPU),),
        ),
        BackendSpec(
            "tensorrt",
            "trt_runtime.backends.tensorrt.backend:TensorRTBackend",
            partial(commands.by_driver, "trt"),
            _ENGINE_OPTIONS,
            renamed=_RENAMED,
            layouts=_ENGINES,
        ),
        BackendSpec(
            "tensorrt-rtx",
            "trt_runtime.backends.tensorrt.backend:TensorRTRTXBackend",
            partial(commands.by_driver, "rtx"),
            _ENGINE_OPTIONS,
            renamed=_RENAMED,
        ),
        BackendSpec(
            "torch",
            "export.parity.reference:TorchBackend",
            partial(commands.install, "export", "reference"),
            ("threads", "checkpoint"),
            devices=(CPU, "cuda"),
            is_reference=True,
            layouts=(Layout("torch (the reference)", "torch", wide_head=False, scores=False, on_cpu=True),),
        ),
    ),
)


def names() -> list[str]:
    return sorted(BACKENDS.names())


def open_backend(name: str, artifact: Path, **options: Any) -> Backend:
    """Open an artifact on a backend. The options are the backend's own (see its class). Raises DllmError."""
    spec = BACKENDS.find(name)
    module, _, cls = spec.opener.partition(":")
    opener = getattr(import_optional(module, f"the backend '{name}'", spec.install()), cls)
    options = {spec.renamed.get(option, option): value for option, value in options.items()}
    known = set(inspect.signature(opener).parameters) - {"artifact"}
    if strange := sorted(set(options) - known):
        raise unknown(f"option of the backend '{name}'", strange[0], known)
    backend: Backend = opener(Path(artifact), **options)
    return backend
