"""Where every weight is stored in an artifact. Planned from shapes only, so that graphs can be built before
a byte is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trt_runtime.artifact.manifest import ORT_CPU
from trt_runtime.errors import DllmError

from ..checkpoint.huggingface import Checkpoint
from ..families.base import Family, StoredAs
from ..graph import decoder
from ..graph.decoder import DecoderConfig, weight_shapes
from ..graph.feed_forward import EXPERTS_STACKED
from ..schemes import portable
from ..schemes.base import Scheme
from . import accounts
from .sources import (
    DTYPE_OF,
    NUMPY_DTYPES,
    STORED,
    Array,
    FromCheckpoint,
    Made,
    Table,
    TensorSource,
)

FILE_NAME = "weights.data"
MODES = ("copy", "link")
ALIGNMENT = 4096  # so that the file can be memory-mapped tensor by tensor


class Quantized:
    """What a scheme makes from one weight: all its parts when the first is requested. Each is handed out once
    and then released."""

    def __init__(self, scheme: Scheme, name: str, shape: tuple[int, int], stored: FromCheckpoint) -> None:
        self.scheme, self.name, self.shape, self.stored = scheme, name, shape, stored
        self._made: dict[str, Array] = {}

    def take(self, part: str) -> Array:
        if part not in self._made:
            self._made = self.scheme.quantize(self.name, self.shape, self._rows())
        return self._made.pop(part)

    def _rows(self) -> Iterator[Array]:
        """The weight in pieces, with the scheme's factors applied."""
        by_row, by_column = self.scheme.factors(self.name)
        at = 0
        for piece in self.stored.rows(self.shape[1]):
            there = slice(at, at := at + len(piece))
            scaled = piece if by_row is None else piece * by_row[there, None]
            yield scaled if by_column is None else scaled * by_column


@dataclass(frozen=True)
class Weight:
    """One initializer: `size` bytes at `offset` of `file`, and their source. linked_to: the checkpoint's file
    that `file` is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    size: int
    source: TensorSource
    source_name: str
    linked_to: Path | None = None

    def external(self) -> ir.ExternalTensor:
        """The initializer that refers to this weight as external data."""
        return ir.ExternalTensor(
            self.file,
            self.offset,
            self.size,
            STORED[self.dtype][1],
            shape=ir.Shape(self.shape),
            name=self.name,
        )

    def is_in(self, artifact: Path) -> bool:
        """Whether the bytes in an artifact are the converted source."""
        return self.source.is_at(artifact / self.file, self.offset, self.dtype)


class _Layout:
    """The offsets of weights in weights.data, one after the other."""

    def __init__(self) -> None:
        self.weights: list[Weight] = []
        self._end = 0

    def append(
        self, name: str, dtype: str, shape: tuple[int, ...], source: TensorSource, source_name: str
    ) -> None:
        count = math.prod(shape)
        size = count * STORED[dtype][0].itemsize if dtype != "int4" else -(-count // 2)
        self.weights.append(Weight(name, dtype, shape, FILE_NAME, self._end, size, source, source_name))
        self._end = -(-(self._end + size) // ALIGNMENT) * ALIGNMENT

    def link(self, name: str, shape: tuple[int, ...], source: FromCheckpoint, dtype: str) -> None:
        """A weight that stays in the checkpoint's file. Raises DllmError if a graph cannot refer to it
        there."""
        (stored,) = source.stored
        if stored.dtype != NUMPY_DTYPES[dtype]:
            own_dtype = DTYPE_OF.get(stored.dtype, stored.dtype.name)
            raise DllmError(
                f"{stored.file.parent}: tensor {source.name} is {own_dtype}, and --weights link cannot "
                f"convert it to {dtype}: export with DTYPE={own_dtype}, or with --weights copy."
            )
        if stored.offset % 8:
            raise DllmError(
                f"{stored.file}: tensor {source.name} starts at byte {stored.offset}, but --weights link "
                "needs a multiple of 8: export with --weights copy."
            )
        self.weights.append(
            Weight(
                name,
                dtype,
                shape,
                stored.file.name,
                stored.offset,
                stored.size,
                source,
                source.name,
                linked_to=stored.file,
            )
        )


def plan(
    config: DecoderConfig,
    family: Family,
    checkpoint: Checkpoint,
    dtype: str,
    mode: str = "copy",
    scheme: Scheme | None = None,
) -> list[Weight]:
    """The place of every weight; linear layers are stored as the parts that `scheme` makes of them. Raises
    DllmError, with names, for missing, surplus or misshapen tensors."""
    shapes = weight_shapes(config)
    stored = {name: family.stored_as(name, config) for name in shapes}
    accounts.check({name: each.pieces for name, each in stored.items()}, family, checkpoint)
    if scheme is not None:
        scheme.shapes = shapes
    joined = next((name for name, each in stored.items() if len(each.pieces) > 1), None)
    if mode == "link" and joined is not None:
        raise DllmError(
            f"{checkpoint.path}: {joined} is stored as {len(stored[joined].pieces)} tensors, which --weights "
            "link cannot join: export with --weights copy."
        )
    layout = _Layout()
    for name, shape in shapes.items():
        source = FromCheckpoint.of(checkpoint, stored[name])
        _check_shape(source, shape, stored[name], checkpoint)
        own = decoder.stored_dtype(config, name, dtype)
        if scheme is not None:
            for part in _quantized(name, shape, source, scheme, config, own):
                layout.append(*part, source.name)
        elif mode == "copy":
            layout.append(name, own, shape, source, source.name)
        else:
            layout.link(name, shape, source, own)
    for name, table in zip((decoder.ROPE_COS, decoder.ROPE_SIN), rope_tables(config), strict=True):
        layout.append(name, "fp32", table.shape, Table(table), name)
    return layout.weights


def _check_shape(
    source: FromCheckpoint, shape: tuple[int, ...], stored: StoredAs, checkpoint: Checkpoint
) -> None:
    """Raise DllmError unless the pieces of a weight make up its shape; a weight stored in one piece must have
    that shape, and tensors of experts those that make it up."""
    if stored.join != EXPERTS_STACKED or len(shape) == 3:
        expected = stored.shapes(shape)[0]
        for piece, there in zip(stored.pieces, source.stored, strict=True):
            if there.shape != expected:
                raise DllmError(
                    f"{checkpoint.path}: tensor {piece.tensor} has shape {list(there.shape)}, config.json "
                    f"asks for {list(expected)}: config and weights belong to different models."
                )
        return
    stored_shape = source.stored[0].shape
    if (stored_shape != shape) if len(source.stored) == 1 else (source.size != math.prod(shape)):
        several = f"{len(source.stored)} tensors from {source.name} on have {source.size} elements"
        said = f"tensor {source.name} has shape {list(stored_shape)}" if len(source.stored) == 1 else several
        raise DllmError(
            f"{checkpoint.path}: {said}, config.json asks for {list(shape)}: config and weights belong to "
            f"different models."
        )


def _quantized(
    name: str,
    shape: tuple[int, ...],
    stored: FromCheckpoint,
    scheme: Scheme,
    config: DecoderConfig,
    dtype: str,
) -> Iterator[tuple[str, str, tuple[int, ...], TensorSource]]:
    """Name, type, shape and source of what is stored for a weight. A tied head is stored next to the
    embedding."""
    is_head = name == (decoder.EMBEDDING if config.tied_head else decoder.HEAD)
    is_covered = scheme.covers_head if is_head else decoder.is_linear(name)
    if not is_covered or name == decoder.EMBEDDING:
        by_row, by_column = scheme.factors(name)
        is_scaled = by_row is not None or by_column is not None
        if name == decoder.EMBEDDING and scheme.target == ORT_CPU:
            dtype = DTYPE_OF.get(stored.dtype, dtype)  # rows of it are cast up when they are looked up
        yield (
            name,
            dtype,
            shape,
            Made(partial(_scaled, stored, shape, (by_row, by_column), NUMPY_DTYPES[dtype]))
            if is_scaled
            else stored,
        )
    if is_covered:
        outputs, inputs = math.prod(shape[:-1]), shape[-1]
        quantized = Quantized(scheme, name, (outputs, inputs), stored)
        for suffix, part in scheme.parts(name, shape).items():
            yield f"{name}.{suffix}", part.dtype, part.shape, Made(partial(quantized.take, suffix))


def _scaled(
    stored: FromCheckpoint,
    shape: tuple[int, ...],
    factors: tuple[Array | None, Array | None],
    dtype: np.dtype[Any],
) -> Array:
    """A tensor with its rows and columns multiplied (a vector: its elements, as rows)."""
    by_row, by_column = factors
    whole = np.concatenate([piece.open() for piece in stored.stored]).astype(np.float32).reshape(shape)
    if by_row is not None:
        whole *= by_row.reshape(-1, *[1] * (len(shape) - 1))
    return (whole if by_column is None else whole * by_column).astype(dtype)


def total_size(weights: Iterable[Weight]) -> int:
    """The bytes that a stream of these weights processes."""
    return sum(weight.size for weight in weights)


def rope_tables(config: DecoderConfig) -> tuple[Array, Array]:
    """cos and sin of `position * theta^(-2i/D)`, float32 [max_length, D / 2], the same on every processor; D
    is rotary_dim."""
    exponent = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    frequency = np.float32(1.0) / portable.power(config.attention.rope_theta, exponent)
    angle = np.outer(np.arange(config.max_length, dtype=np.float32), frequency)
    return np.cos(angle), np.sin(angle)
