"""Weights: where each lies in weights.data, and the stream that puts them there.

A plan is made from shapes alone, so graphs can be built before a byte is read. The stream then goes through the checkpoint
in small pieces: conversion, hashing and the largest magnitudes happen in the same pass, every byte is written once, and memory
stays at two pieces, whatever the model's size. With `link` the weights stay in the checkpoint's own files, which are hard-linked
into the artifact and only read once, to hash them.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trt_runtime.artifact.manifest import ORT_CPU, FileFacts, Manifest
from trt_runtime.errors import DllmError

from ..checkpoint.huggingface import Checkpoint, StoredTensor, some
from ..families.base import Family
from ..graph import decoder
from ..graph.decoder import DecoderConfig, weight_shapes
from ..schemes import portable
from ..schemes.base import Scheme
from . import tensor_names

FILE_NAME = "weights.data"
MODES = ("copy", "link")
ALIGNMENT = 4096  # so that the file can be memory-mapped tensor by tensor
FP16_LARGEST = 65504.0
FP16_NEAR = FP16_LARGEST / 4  # from here on a layer's sums are likely to leave the range
_PIECE = 1 << 22  # bytes read at a time
_CACHED = 1 << 19  # elements looked at at a time: they stay in the processor's cache
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
_DTYPE_OF = {known: name for name, known in NUMPY_DTYPES.items()}
# what a stored tensor may hold: NumPy's type and ONNX's. int4: two numbers a byte, the first in the lower half
STORED: dict[str, tuple[np.dtype[Any], ir.DataType]] = {
    "fp32": (NUMPY_DTYPES["fp32"], ir.DataType.FLOAT), "fp16": (NUMPY_DTYPES["fp16"], ir.DataType.FLOAT16),
    "bf16": (NUMPY_DTYPES["bf16"], ir.DataType.BFLOAT16), "int8": (np.dtype(np.int8), ir.DataType.INT8),
    "uint8": (np.dtype(np.uint8), ir.DataType.UINT8), "fp8": (np.dtype(ml_dtypes.float8_e4m3fn), ir.DataType.FLOAT8E4M3FN),
    "int4": (np.dtype(np.uint8), ir.DataType.INT4),
}  # fmt: skip

Array = np.ndarray[Any, Any]
Origin = StoredTensor | Array | Callable[[], Array]  # a checkpoint tensor, a computed array, or what is made when its turn comes


class Quantized:
    """What a scheme makes of one weight: all its parts when the first is asked for; each is given once, and then held no longer."""

    def __init__(self, scheme: Scheme, name: str, stored: StoredTensor) -> None:
        self.scheme, self.name, self.stored = scheme, name, stored
        self._made: dict[str, Array] = {}

    def take(self, part: str) -> Array:
        if part not in self._made:
            outputs, inputs = self.stored.shape
            self._made = self.scheme.quantize(self.name, (outputs, inputs), self._rows())
        return self._made.pop(part)

    def _rows(self) -> Iterator[Array]:
        """The weight in pieces, with the scheme's factors."""
        by_row, by_column = self.scheme.factors(self.name)
        at = 0
        for piece in rows_of(self.stored, self.name):
            there = slice(at, at := at + len(piece))
            scaled = piece if by_row is None else piece * by_row[there, None]
            yield scaled if by_column is None else scaled * by_column


@dataclass(frozen=True)
class Weight:
    """One initializer: `size` bytes at `offset` of `file`, and where they come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    size: int
    source: Origin
    source_name: str

    def external(self) -> ir.ExternalTensor:
        """The initializer that refers to this weight without holding it."""
        return ir.ExternalTensor(
            self.file, self.offset, self.size, STORED[self.dtype][1], shape=ir.Shape(self.shape), name=self.name
        )


@dataclass
class Written:
    """What a stream left behind: facts of the files, and the largest magnitude of every checkpoint tensor, by its weight."""

    files: dict[str, FileFacts] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)


def plan(
    config: DecoderConfig,
    family: Family,
    checkpoint: Checkpoint,
    dtype: str,
    mode: str = "copy",
    scheme: Scheme | None = None,
) -> list[Weight]:
    """Where every weight will lie, those of linear layers as the parts that `scheme` makes of them. Raises DllmError, with names, for
    missing, surplus or misshapen tensors."""
    shapes = weight_shapes(config)
    names = {family.tensor_name(weight): weight for weight in shapes}
    _account(names, family, checkpoint)
    weights: list[Weight] = []
    end = 0

    def append(name: str, dtype: str, shape: tuple[int, ...], source: Origin, source_name: str) -> None:
        nonlocal end
        size = math.prod(shape) * STORED[dtype][0].itemsize if dtype != "int4" else -(-math.prod(shape) // 2)
        weights.append(Weight(name, dtype, shape, FILE_NAME, end, size, source, source_name))
        end = -(-(end + size) // ALIGNMENT) * ALIGNMENT

    for source_name, name in names.items():
        stored = checkpoint.tensors[source_name]
        if stored.shape != shapes[name]:
            raise DllmError(
                f"{checkpoint.path}: tensor {source_name} has shape {list(stored.shape)}, config.json asks for "
                f"{list(shapes[name])}: config and weights are not of one model."
            )
        if scheme is not None:
            for part in _quantized(name, stored, scheme, config, dtype):
                append(*part, source_name)
            continue
        if mode == "copy":
            append(name, dtype, shapes[name], stored, source_name)
            continue
        if stored.dtype != NUMPY_DTYPES[dtype]:
            held = _DTYPE_OF.get(stored.dtype, stored.dtype.name)
            raise DllmError(
                f"{checkpoint.path}: tensor {source_name} is {held}, and --weights link cannot convert it to {dtype}: "
                f"export with DTYPE={held}, or with --weights copy."
            )
        if stored.offset % 8:
            raise DllmError(
                f"{stored.file}: tensor {source_name} lies at byte {stored.offset}, which --weights link cannot use (multiples of 8): "
                "export with --weights copy."
            )
        weights.append(Weight(name, dtype, stored.shape, stored.file.name, stored.offset, stored.size, stored, source_name))
    for name, table in zip((decoder.ROPE_COS, decoder.ROPE_SIN), rope_tables(config), strict=True):
        append(name, "fp32", table.shape, table, name)
    return weights


def _quantized(
    name: str, stored: StoredTensor, scheme: Scheme, config: DecoderConfig, dtype: str
) -> Iterator[tuple[str, str, tuple[int, ...], Origin]]:
    """Name, type, shape and source of what is stored for a checkpoint tensor. A tied head is stored beside the embedding."""
    is_head = name == (decoder.EMBEDDING if config.tied_head else decoder.HEAD)
    is_covered = scheme.covers_head if is_head else decoder.is_linear(name)
    if not is_covered or name == decoder.EMBEDDING:
        factor, _ = scheme.factors(name)
        if name == decoder.EMBEDDING and scheme.target == ORT_CPU:
            dtype = _DTYPE_OF.get(stored.dtype, dtype)  # rows of it are widened as they are looked up
        yield name, dtype, stored.shape, stored if factor is None else partial(_scaled, stored, factor, NUMPY_DTYPES[dtype])
    if is_covered:
        outputs, inputs = stored.shape
        made = Quantized(scheme, name, stored)
        for suffix, part in scheme.parts(name, (outputs, inputs)).items():
            yield f"{name}.{suffix}", part.dtype, part.shape, partial(made.take, suffix)


def _scaled(stored: StoredTensor, factor: Array, dtype: np.dtype[Any]) -> Array:
    return (stored.open().astype(np.float32) * factor).astype(dtype)


def total_size(weights: Iterable[Weight]) -> int:
    """Bytes that a stream of these weights goes through."""
    return sum(weight.size for weight in weights)


def rope_tables(config: DecoderConfig) -> tuple[Array, Array]:
    """cos and sin of `position * theta^(-2i/head_dim)`, float32 [max_length, head_dim/2], the same on every processor."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequency = np.float32(1.0) / portable.power(config.rope_theta, exponent)
    angle = np.outer(np.arange(config.max_length, dtype=np.float32), frequency)
    return np.cos(angle), np.sin(angle)


def stream(weights: list[Weight], directory: Path, progress: Callable[[int], object]) -> Written:
    """Put the weights' files into `directory`; `progress` is told the bytes done. Raises DllmError for what fp16 cannot hold."""
    written = Written()
    shards = {weight.file: weight.source.file for weight in weights
              if weight.file != FILE_NAME and isinstance(weight.source, StoredTensor)}  # fmt: skip
    for name, shard in shards.items():
        link(shard.resolve(), directory / name)
        within = [weight for weight in weights if weight.file == name]
        written.files[name] = _hash_shard(directory / name, within, written.maxima, progress)
    own = [weight for weight in weights if weight.file == FILE_NAME]
    with open(directory / FILE_NAME, "xb") as file, _Hasher() as hasher:
        for weight in own:
            file.write(padding := b"\0" * (weight.offset - hasher.size))
            hasher.update(padding)
            for piece in _pieces(weight.source):
                converted = _bytes_of(piece, weight, written.maxima)
                hasher.update(converted)  # hashes while the same bytes are written
                file.write(converted)
                progress(len(converted))
        written.files[FILE_NAME] = hasher.facts()
    return written


def holds_all(manifest: Manifest) -> bool:
    """Whether weights.data holds the weights, and not the checkpoint's own files beside it."""
    return not any(name.endswith(".safetensors") for name in manifest.files)


def near_fp16(maxima: Mapping[str, float]) -> str:
    """A warning that names the largest weight near the end of fp16's range; empty if none is."""
    near = {name: largest for name, largest in maxima.items() if largest > FP16_NEAR}
    if not near:
        return ""
    name = max(near, key=lambda item: near[item])
    return (
        f"{name} holds {near[name]:g}, near the end of fp16's range ({FP16_LARGEST:g}), as do {len(near) - 1} other weights: sums may "
        "overflow; prefer DTYPE=bf16"
    )


def is_in(weight: Weight, artifact: Path) -> bool:
    """Whether the bytes at a weight's place in an artifact are its source, converted."""
    if isinstance(weight.source, StoredTensor) and weight.source.file.samefile(artifact / weight.file):
        return True  # linked
    if isinstance(weight.source, np.ndarray) and weight.name in (decoder.ROPE_COS, decoder.ROPE_SIN):
        return _is_table(weight.source, np.memmap(artifact / weight.file, np.float32, "r", weight.offset, weight.shape))
    with open(artifact / weight.file, "rb") as file:
        file.seek(weight.offset)
        for piece in _pieces(weight.source):
            expected = _bytes_of(piece, weight, {})
            if file.read(len(expected)) != expected:
                return False
    return True


def _is_table(expected: Array, held: Array) -> bool:
    """Whether a rotation table is the expected one but for the last bits of its frequencies (at most 1), as another machine or version computes them."""
    allowed = np.float32(2.0**-22) * (1 + np.arange(len(expected), dtype=np.float32))[:, None]
    return bool((np.abs(expected - held) <= allowed).all())  # false for values that are no number


def rows_of(stored: StoredTensor, name: str) -> Iterator[Array]:
    """A matrix [N, K] in pieces of whole rows, float32 [n, K]. Raises DllmError for values that are no number."""
    outputs, inputs = stored.shape
    flat, step = stored.open(), max(1, _PIECE // (4 * inputs))
    for start in range(0, outputs, step):
        piece = flat[start * inputs : (start + step) * inputs].astype(np.float32).reshape(-1, inputs)
        if not np.isfinite(piece).all():
            raise _no_number(name)
        yield piece


def link(source: Path, target: Path) -> None:
    """Hard-link a file; where that cannot be (another disk), copy it."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        shutil.copyfile(source, target)


class _Hasher:
    """SHA-256 in a thread of its own, one piece behind: the caller must not change a piece before the next call."""

    def __init__(self) -> None:
        self.size, self._digest, self._pool = 0, hashlib.sha256(), ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> _Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def update(self, data: bytes | memoryview) -> None:
        if self._pending is not None:
            self._pending.result()
        self.size += len(data)
        self._pending = self._pool.submit(self._digest.update, data)

    def facts(self) -> FileFacts:
        if self._pending is not None:
            self._pending.result()
        return FileFacts(self.size, self._digest.hexdigest())


def _pieces(source: Origin) -> Iterator[Array]:
    """The elements of a weight in order, flat, a piece at a time; a piece is good until the second after it."""
    if not isinstance(source, StoredTensor):
        yield (source() if callable(source) else source).reshape(-1)
        return
    step = _PIECE // source.dtype.itemsize
    buffers = [np.empty(min(step, source.size // source.dtype.itemsize), source.dtype) for _ in range(2)]
    with open(source.file, "rb") as file:
        file.seek(source.offset)
        for number, start in enumerate(range(0, source.size, _PIECE)):
            piece = buffers[number % 2][: min(_PIECE, source.size - start) // source.dtype.itemsize]
            if file.readinto(piece.view(np.uint8).data) != piece.nbytes:
                raise DllmError(f"{source.file}: cut short while it was read: download it again.")
            yield piece


def _hash_shard(path: Path, weights: list[Weight], maxima: dict[str, float], progress: Callable[[int], object]) -> FileFacts:
    """Hash a whole safetensors file, and note the largest magnitudes of the tensors in it."""
    ordered = sorted(weights, key=lambda weight: weight.offset)
    with _Hasher() as hasher:
        for weight in ordered:
            for piece in _bytes(path, hasher.size, weight.offset):
                hasher.update(piece)
            assert isinstance(weight.source, StoredTensor)
            for elements in _pieces(weight.source):
                _note_maximum(elements, weight, maxima)
                hasher.update(elements.view(np.uint8).data)
                progress(elements.nbytes)
        for piece in _bytes(path, hasher.size, path.stat().st_size):
            hasher.update(piece)
        return hasher.facts()


def _bytes(path: Path, start: int, end: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        while start < end and (piece := file.read(min(_PIECE, end - start))):
            start += len(piece)
            yield piece


def _bytes_of(piece: Array, weight: Weight, maxima: dict[str, float]) -> memoryview:
    """A piece as it lies in the file."""
    return np.ascontiguousarray(_convert(piece, weight, maxima)).view(np.uint8).data


def _convert(piece: Array, weight: Weight, maxima: dict[str, float]) -> Array:
    """A piece in the weight's dtype; its largest magnitude is noted."""
    if not isinstance(weight.source, StoredTensor):
        return piece
    target = NUMPY_DTYPES[weight.dtype]
    _note_maximum(piece, weight, maxima)
    if piece.dtype == target:
        return piece
    wide = piece
    if piece.dtype == ml_dtypes.bfloat16:  # the upper half of a float32
        wide = (piece.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        converted = wide.astype(np.float32, copy=False).astype(target, copy=False)
    if target == np.float16 and maxima[weight.name] > FP16_LARGEST:
        raise DllmError(
            f"tensor {weight.source_name}: holds {maxima[weight.name]:g}, more than fp16 can ({FP16_LARGEST:g}): export with "
            "DTYPE=bf16 (--dtype bf16)."
        )
    return converted


def _note_maximum(piece: Array, weight: Weight, maxima: dict[str, float]) -> None:
    """Without their sign, floating-point numbers are ordered as their bits are: no conversion is needed to compare them."""
    kind = np.dtype(f"u{piece.dtype.itemsize}")
    magnitude, most = kind.type(np.iinfo(kind).max >> 1), kind.type(0)
    bits = piece.view(kind)
    for start in range(0, bits.size, _CACHED):
        most = max(most, (bits[start : start + _CACHED] & magnitude).max())
    largest = float(np.array([most], kind).view(piece.dtype)[0])
    if not math.isfinite(largest):
        raise _no_number(weight.source_name)
    maxima[weight.name] = max(maxima.get(weight.name, 0.0), largest)


def _no_number(name: str) -> DllmError:
    return DllmError(f"tensor {name}: holds values that are no number (NaN, infinite): the checkpoint is damaged.")


def _account(names: Mapping[str, str], family: Family, checkpoint: Checkpoint) -> None:
    """Every weight has its tensor, and every tensor its weight or a place on the family's list."""
    held = set(checkpoint.tensors)
    surplus = [
        name for name in sorted(held - set(names)) if not any(re.fullmatch(pattern, name) for pattern in family.allowed_surplus)
    ]
    missing = [name for name in names if name not in held]
    if why := tensor_names.why_different(list(names), missing, surplus):
        raise DllmError(f"{checkpoint.path}: {why}")
    if missing:
        raise DllmError(f"{checkpoint.path}: {len(missing)} tensors are missing: {some(missing)}: download the checkpoint again.")
    if surplus:
        advice = "they would be left out silently; check that config.json belongs to these weights"
        if all(name.endswith(".bias") for name in surplus):
            advice = f"{family.title} is implemented without these biases (a config.json that does not mention them leaves them to the class)"
        raise DllmError(
            f"{checkpoint.path}: {len(surplus)} tensors are not part of a {family.title} of this config: {some(surplus)}: {advice}."
        )
