"""Weights: where each lies in weights.data, and the stream that puts them there.

A plan is made from shapes alone, so graphs can be built before a byte is read. The stream then goes through the checkpoint
in small pieces: conversion and hashing happen in the same pass, and memory stays at one piece, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from export import decoder
from export.checkpoint import Checkpoint, StoredTensor
from export.decoder import DecoderConfig, weight_shapes
from export.families.base import Family
from export.graphs import IR_DTYPES
from trt_runtime.errors import DllmError
from trt_runtime.manifest import FileFacts

FILE_NAME = "weights.data"
ALIGNMENT = 4096  # so that the file can be memory-mapped tensor by tensor
_PIECE = 1 << 22  # elements converted at a time
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Weight:
    """One tensor of weights.data: `size` bytes at `offset`; `source` is a checkpoint tensor or a computed array."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    source: StoredTensor | Array
    source_name: str

    def external(self) -> ir.ExternalTensor:
        """The initializer that refers to this weight without holding it."""
        return ir.ExternalTensor(
            FILE_NAME, self.offset, self.size, IR_DTYPES[self.dtype], shape=ir.Shape(self.shape), name=self.name
        )


def plan(config: DecoderConfig, family: Family, checkpoint: Checkpoint, dtype: str) -> list[Weight]:
    """The layout of weights.data. Raises DllmError, with names, for missing, surplus or misshapen tensors."""
    shapes = weight_shapes(config)
    names = {family.tensor_name(weight): weight for weight in shapes}
    _account(names, family, checkpoint)
    weights: list[Weight] = []
    offset = 0

    def add(name: str, dtype: str, shape: tuple[int, ...], source: StoredTensor | Array, source_name: str) -> None:
        nonlocal offset
        size = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
        weights.append(Weight(name, dtype, shape, offset, size, source, source_name))
        offset = -(-(offset + size) // ALIGNMENT) * ALIGNMENT

    for source_name, name in names.items():
        stored = checkpoint.tensors[source_name]
        if stored.shape != shapes[name]:
            raise DllmError(
                f"{checkpoint.path}: tensor {source_name} has shape {list(stored.shape)}, config.json asks for "
                f"{list(shapes[name])}: config and weights are not of one model."
            )
        add(name, dtype, shapes[name], stored, source_name)
    for name, table in zip((decoder.ROPE_COS, decoder.ROPE_SIN), rope_tables(config), strict=True):
        add(name, "fp32", table.shape, table, name)
    return weights


def rope_tables(config: DecoderConfig) -> tuple[Array, Array]:
    """cos and sin of `position * theta^(-2i/head_dim)`, float32 [max_length, head_dim/2]."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequency = (np.float32(1.0) / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    angle = np.outer(np.arange(config.max_length, dtype=np.float32), frequency)
    return np.cos(angle), np.sin(angle)


def stream(weights: Iterable[Weight], path: Path, progress: Callable[[int], object]) -> FileFacts:
    """Write weights.data at `path`; `progress` is told the bytes written. Returns size and SHA-256."""
    digest, position = hashlib.sha256(), 0

    def put(data: bytes | memoryview) -> None:
        nonlocal position
        file.write(data)
        digest.update(data)
        position += len(data)
        progress(len(data))

    with open(path, "xb") as file:
        for weight in weights:
            put(b"\0" * (weight.offset - position))
            flat = weight.source.open() if isinstance(weight.source, StoredTensor) else weight.source.reshape(-1)
            for start in range(0, flat.size, _PIECE):
                piece = _convert(flat[start : start + _PIECE], weight)
                put(np.ascontiguousarray(piece).view(np.uint8).data)
    return FileFacts(position, digest.hexdigest())


def _convert(piece: Array, weight: Weight) -> Array:
    target = NUMPY_DTYPES[weight.dtype]
    if piece.dtype == target:
        return np.asarray(piece)
    with np.errstate(over="ignore"):
        converted = piece.astype(np.float32).astype(target)
    if target == np.float16 and not np.isfinite(converted).all():
        largest = float(np.abs(piece.astype(np.float32)).max())
        raise DllmError(
            f"tensor {weight.source_name}: holds {largest:g}, more than fp16 can (65504): export with DTYPE=bf16 (--dtype bf16)."
        )
    return converted


def _account(names: Mapping[str, str], family: Family, checkpoint: Checkpoint) -> None:
    """Every weight has its tensor, and every tensor its weight or a place on the family's list."""
    held = set(checkpoint.tensors)
    if missing := [name for name in names if name not in held]:
        raise DllmError(
            f"{checkpoint.path}: {len(missing)} tensors are missing: {_some(missing)}: download the checkpoint again."
        )
    surplus = [
        name for name in sorted(held - set(names)) if not any(re.fullmatch(pattern, name) for pattern in family.allowed_surplus)
    ]
    if surplus:
        raise DllmError(
            f"{checkpoint.path}: {len(surplus)} tensors are not part of a {family.title} of this config: {_some(surplus)}: "
            "they would be left out silently; check that config.json belongs to these weights (adapters must be merged first)."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
