"""Decoded JSON checked against the annotations of dataclasses. Standard library only."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from trt_runtime.artifact.check import AGAIN
from trt_runtime.errors import DllmError


def finite(text: str) -> float:
    """Parse a JSON number, which must be finite: 1e400 and NaN are refused."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is not finite")
    return value


def typed(expected: Any, value: Any, where: str) -> Any:
    """`value` checked against a type annotation; dataclasses are built from mappings, unknown keys
    ignored."""
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if origin is types.UnionType:
        return None if value is None else typed(args[0], value, where)
    if isinstance(expected, type) and hasattr(expected, "__dataclass_fields__"):
        return _dataclass(expected, value, where)
    if origin is dict and isinstance(value, dict):
        return {str(key): typed(args[1], item, f"{where}: {key}") for key, item in value.items()}
    if origin in (tuple, list) and isinstance(value, list):
        return origin(typed(args[0], item, where) for item in value)
    if isinstance(value, origin or expected) and not (expected is int and isinstance(value, bool)):
        return value
    name = getattr(expected, "__name__", str(expected))
    raise DllmError(f"{where}: is {value!r}, expected {name}: {AGAIN}.")


def _dataclass(expected: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise DllmError(f"{where}: is {value!r}, expected an object: {AGAIN}.")
    hints = typing.get_type_hints(expected)
    taken = {}
    for item in fields(expected):
        if item.name in value:
            taken[item.name] = typed(hints[item.name], value[item.name], f"{where}: {item.name}")
    required = [
        f.name for f in fields(expected) if f.default is f.default_factory
    ]  # both are the MISSING marker
    missing = [name for name in required if name not in taken]
    if missing:
        raise DllmError(f"{where}: missing {', '.join(missing)}: {AGAIN}.")
    return expected(**taken)
