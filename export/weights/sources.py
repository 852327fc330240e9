"""Where the elements of a stored tensor come from: the checkpoint, a table, or a scheme.

A source yields its elements in order, a piece at a time, so that memory stays at two pieces whatever the
model's size.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trt_runtime.errors import DllmError

from ..checkpoint.huggingface import Checkpoint, StoredTensor
from ..families.base import StoredAs
from ..graph.feed_forward import EXPERTS_BESIDE, EXPERTS_INTERLEAVED, EXPERTS_STACKED

FP16_LARGEST = 65504.0
_PIECE = 1 << 22  # bytes read at a time
_WIDE_PIECE = 1 << 24  # the same where rows are put together from many tensors
_CACHED = 1 << 19  # elements processed at a time: they fit the processor's cache
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_OF = {known: name for name, known in NUMPY_DTYPES.items()}
# the types of stored tensors, for NumPy and ONNX. int4: two numbers per byte, the first in the lower half
STORED: dict[str, tuple[np.dtype[Any], ir.DataType]] = {
    "fp32": (NUMPY_DTYPES["fp32"], ir.DataType.FLOAT),
    "fp16": (NUMPY_DTYPES["fp16"], ir.DataType.FLOAT16),
    "bf16": (NUMPY_DTYPES["bf16"], ir.DataType.BFLOAT16),
    "int8": (np.dtype(np.int8), ir.DataType.INT8),
    "uint8": (np.dtype(np.uint8), ir.DataType.UINT8),
    "fp8": (np.dtype(ml_dtypes.float8_e4m3fn), ir.DataType.FLOAT8E4M3FN),
    "int4": (np.dtype(np.uint8), ir.DataType.INT4),
}


Array = np.ndarray[Any, Any]


def _rows(stored: StoredTensor, rows: tuple[int, int] | None) -> StoredTensor:
    """Rows [start, stop) of a tensor, which are contiguous."""
    if rows is None:
        return stored
    start, stop = rows
    each = stored.size // stored.shape[0]
    return StoredTensor(
        stored.file,
        stored.dtype,
        (stop - start, *stored.shape[1:]),
        stored.offset + start * each,
        (stop - start) * each,
    )


class TensorSource(ABC):
    """Where a stored tensor comes from."""

    @abstractmethod
    def pieces(self) -> Iterator[Array]:
        """The elements in order, flat, a piece at a time; a piece stays valid until the second one after
        it."""

    def converted(self, piece: Array, dtype: str, maxima: Maximum) -> Array:
        """A piece in the stored dtype; the largest magnitude of a checkpoint's tensor is recorded."""
        return piece

    def is_at(self, path: Path, offset: int, dtype: str) -> bool:
        """Whether the bytes at an offset of an artifact's file are these elements, converted."""
        with open(path, "rb") as file:
            file.seek(offset)
            for piece in self.pieces():
                expected = bytes_of(self.converted(piece, dtype, Maximum("")))
                if file.read(len(expected)) != expected:
                    return False
        return True


@dataclass
class Maximum:
    """The largest magnitude so far of a weight's checkpoint tensors; None if there are none."""

    name: str
    largest: float | None = None

    def note(self, piece: Array, damaged: Callable[[], str] | None = None) -> None:
        """Raises DllmError for NaN or infinite values, of the tensor that `damaged` names. Without the sign
        bit, floating-point numbers are ordered like their bits, so they are compared without conversion."""
        kind = np.dtype(f"u{piece.dtype.itemsize}")
        magnitude, most = kind.type(np.iinfo(kind).max >> 1), kind.type(0)
        bits = piece.view(kind)
        for start in range(0, bits.size, _CACHED):
            most = max(most, (bits[start : start + _CACHED] & magnitude).max())
        largest = float(np.array([most], kind).view(piece.dtype)[0])
        if not math.isfinite(largest):
            raise no_number(damaged() if damaged else self.name)
        self.largest = max(self.largest or 0.0, largest)


@dataclass(frozen=True)
class FromCheckpoint(TensorSource):
    """One or several pieces of a checkpoint, joined (feed_forward.JOINS). names: of their tensors."""

    names: tuple[str, ...]
    stored: tuple[StoredTensor, ...]
    join: str = EXPERTS_STACKED

    @classmethod
    def of(cls, checkpoint: Checkpoint, weight: StoredAs) -> FromCheckpoint:
        """A weight of a checkpoint, in its pieces."""
        stored = tuple(_rows(checkpoint.tensors[piece.tensor], piece.rows) for piece in weight.pieces)
        return cls(tuple(piece.tensor for piece in weight.pieces), stored, weight.join)

    @property
    def name(self) -> str:
        """The first tensor's."""
        return self.names[0]

    def _first(self, is_bad: Callable[[Array], bool]) -> str:
        """The name of the first tensor with elements that are bad."""
        for name, stored in zip(self.names, self.stored, strict=True):
            flat = stored.open()
            if any(is_bad(flat[start : start + _CACHED]) for start in range(0, flat.size, _CACHED)):
                return name
        return self.name

    def damaged(self) -> str:
        """The name of the first tensor with NaN or infinite values."""
        return self._first(lambda piece: not np.isfinite(piece.astype(np.float32)).all())

    def __post_init__(self) -> None:
        for piece in self.stored:
            if piece.dtype != self.dtype:
                raise DllmError(
                    f"{piece.file.parent}: the tensors that make up one weight with {self.name} are stored "
                    f"as {self.dtype} and {piece.dtype}: expected one type; save the checkpoint again in one "
                    "(save_pretrained of a model loaded with one dtype)."
                )

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.stored[0].dtype

    @property
    def size(self) -> int:
        """The number of elements."""
        return sum(math.prod(piece.shape) for piece in self.stored)

    def pieces(self) -> Iterator[Array]:
        if self.join == EXPERTS_BESIDE:
            yield from self._beside()
        elif self.join == EXPERTS_INTERLEAVED:
            yield from self._interleaved()
        else:
            yield from self._stacked()

    def _beside(self) -> Iterator[Array]:
        """Rows that consist of a row of every piece; a few at a time."""
        rows, widths = self.stored[0].shape[0], [stored.shape[1] for stored in self.stored]
        total, item = sum(widths), self.dtype.itemsize
        step = max(1, _WIDE_PIECE // (total * item))
        part = np.empty(step * max(widths), self.dtype)
        buffers = [np.empty((min(step, rows), total), self.dtype) for _ in range(2)]
        with contextlib.ExitStack() as files:
            opened = {file: files.enter_context(open(file, "rb")) for file in {s.file for s in self.stored}}
            for number, start in enumerate(range(0, rows, step)):
                piece, at = buffers[number % 2][: min(step, rows - start)], 0
                for stored, width in zip(self.stored, widths, strict=True):
                    read = part[: len(piece) * width]
                    opened[stored.file].seek(stored.offset + start * width * item)
                    _fill(opened[stored.file], read, stored)
                    piece[:, at : at + width] = read.reshape(-1, width)
                    at += width
                yield piece.reshape(-1)

    def _interleaved(self) -> Iterator[Array]:
        """A row of the one, a row of the other, pair by pair: two tensors in memory at a time."""
        for first, second in zip(self.stored[::2], self.stored[1::2], strict=True):
            pair = np.empty((first.shape[0], 2, first.shape[1]), self.dtype)
            for side, stored in enumerate((first, second)):
                whole = np.empty(first.shape, self.dtype)
                with open(stored.file, "rb") as file:
                    file.seek(stored.offset)
                    _fill(file, whole.reshape(-1), stored)
                pair[:, side] = whole
            yield pair.reshape(-1)

    def _stacked(self) -> Iterator[Array]:
        step = _PIECE // self.dtype.itemsize
        buffers = [np.empty(min(step, self.size), self.dtype) for _ in range(2)]
        number = 0
        for stored in self.stored:
            with open(stored.file, "rb") as file:
                file.seek(stored.offset)
                for start in range(0, stored.size, _PIECE):
                    piece = buffers[number % 2][: min(_PIECE, stored.size - start) // self.dtype.itemsize]
                    _fill(file, piece, stored)
                    number += 1
                    yield piece

    def rows(self, columns: int) -> Iterator[Array]:
        """A matrix [N, K] in pieces of whole rows, float32 [n, K]. Raises DllmError for NaN or infinite
        values."""
        if self.join != EXPERTS_STACKED:  # pieces of whole rows
            for piece in self.pieces():
                wide = piece.astype(np.float32).reshape(-1, columns)
                if not np.isfinite(wide).all():
                    raise no_number(self.damaged())
                yield wide
            return
        step = max(1, _PIECE // (4 * columns))
        for stored in self.stored:
            flat, outputs = stored.open(), math.prod(stored.shape) // columns
            for start in range(0, outputs, step):
                piece = (
                    flat[start * columns : (start + step) * columns].astype(np.float32).reshape(-1, columns)
                )
                if not np.isfinite(piece).all():
                    raise no_number(self.damaged())
                yield piece

    def converted(self, piece: Array, dtype: str, maxima: Maximum) -> Array:
        target = NUMPY_DTYPES[dtype]
        maxima.note(piece, self.damaged)
        if piece.dtype == target:
            return piece
        wide = piece
        if piece.dtype == ml_dtypes.bfloat16:  # the upper half of a float32
            wide = (piece.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float32, copy=False).astype(target, copy=False)
        if target == np.float16 and (maxima.largest or 0.0) > FP16_LARGEST:
            wide_one = self._first(lambda part: bool((np.abs(part.astype(np.float32)) > FP16_LARGEST).any()))
            raise DllmError(
                f"tensor {wide_one}: has the value {maxima.largest:g}, beyond fp16's largest "
                f"({FP16_LARGEST:g}): export with DTYPE=bf16 (--dtype bf16)."
            )
        return narrow

    def is_at(self, path: Path, offset: int, dtype: str) -> bool:
        return all(stored.file.samefile(path) for stored in self.stored) or super().is_at(path, offset, dtype)


@dataclass(frozen=True, eq=False)
class Table(TensorSource):
    """A rotation table [max_length, D / 2]."""

    array: Array

    def pieces(self) -> Iterator[Array]:
        yield self.array.reshape(-1)

    def is_at(self, path: Path, offset: int, dtype: str) -> bool:
        """Equal except for the last bits of its frequencies (at most 1), which another machine or version may
        compute differently."""
        there = np.memmap(path, np.float32, "r", offset, self.array.shape)
        allowed = np.float32(2.0**-22) * (1 + np.arange(len(self.array), dtype=np.float32))[:, None]
        return bool((np.abs(self.array - there) <= allowed).all())  # false for NaN


@dataclass(frozen=True)
class Made(TensorSource):
    """An array that is computed only when it is written."""

    make: Callable[[], Array] = field(repr=False)

    def pieces(self) -> Iterator[Array]:
        yield self.make().reshape(-1)


def _fill(file: BinaryIO, piece: Array, stored: StoredTensor) -> None:
    """Read the next elements of a file into `piece` [n]."""
    if file.readinto(piece.view(np.uint8).data) != piece.nbytes:  # type: ignore[attr-defined]
        raise DllmError(f"{stored.file}: ended early while being read: download it again.")


def bytes_of(array: Array) -> memoryview:
    """An array as it is stored in a file."""
    return np.ascontiguousarray(array).view(np.uint8).data


def no_number(name: str) -> DllmError:
    return DllmError(f"tensor {name}: has NaN or infinite values: the checkpoint is damaged.")
