"""Quantised linear layers, one file per kind: w8a8 and int4 for ONNX Runtime on a CPU; fp8, int8-sq and int4
for TensorRT."""

from __future__ import annotations

from trt_runtime.artifact.manifest import TARGETS
from trt_runtime.errors import DllmError, unknown

from .base import Scheme
from .int4 import Int4
from .qdq import Fp8, Int4Blocks, SmoothQuant
from .w8a8 import W8A8

SCHEMES: tuple[type[Scheme], ...] = (W8A8, Int4, Fp8, SmoothQuant, Int4Blocks)
NAMES = tuple(dict.fromkeys(scheme.name for scheme in SCHEMES))


def names_for(target: str | None) -> list[str]:
    """The names of a target's schemes; None: all of them."""
    return list(dict.fromkeys(scheme.name for scheme in SCHEMES if target in (None, scheme.target)))


def find(name: str, target: str | None = None) -> type[Scheme]:
    """A scheme by name, and by target if several have the name (None: the first). Raises DllmError."""
    named = [scheme for scheme in SCHEMES if scheme.name == name]
    if not named:
        raise unknown("scheme of quantisation", name, NAMES)
    if target is not None and target not in TARGETS:
        raise unknown("target of quantisation", target, TARGETS)
    match = next((scheme for scheme in named if target in (None, scheme.target)), None)
    if match is None:
        others = ", ".join(scheme.name for scheme in SCHEMES if scheme.target == target)
        raise DllmError(
            f"{name} is for {named[0].target}, not for {target}: leave the target out, or quantise with "
            f"{others}."
        )
    return match
