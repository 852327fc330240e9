"""The stream that writes the weights into an artifact.

It reads the checkpoint in small pieces: conversion, hashing and the largest magnitudes happen in the same
pass, every byte is written once, and memory stays at two pieces, whatever the model's size. Linked weights
stay in the checkpoint's own files, which are hard-linked into the artifact and only read once, to hash them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trt_runtime.artifact.manifest import FileFacts, Manifest

from .plan import FILE_NAME, Weight
from .sources import FP16_LARGEST, Maximum, bytes_of

FP16_NEAR = FP16_LARGEST / 4  # above this, sums in a layer are likely to leave the range
_PIECE = 1 << 22  # bytes read at a time


@dataclass
class StreamedWeights:
    """The result of a stream: facts about the files, and the largest magnitude of every checkpoint tensor, by
    its weight."""

    files: dict[str, FileFacts] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def note(self, weight: Weight, largest: Maximum) -> None:
        """Record a finished weight."""
        if largest.largest is not None:
            self.maxima[weight.name] = max(self.maxima.get(weight.name, 0.0), largest.largest)


def stream(weights: list[Weight], directory: Path, progress: Callable[[int], object]) -> StreamedWeights:
    """Write the weights' files into `directory`. progress: called with the bytes done. Raises DllmError for
    values that fp16 cannot represent."""
    written = StreamedWeights()
    shards = {weight.file: weight.linked_to for weight in weights if weight.linked_to is not None}
    for name, shard in shards.items():
        link(shard.resolve(), directory / name)
        within = [weight for weight in weights if weight.file == name]
        written.files[name] = _hash_shard(directory / name, within, written, progress)
    own = [weight for weight in weights if weight.file == FILE_NAME]
    with open(directory / FILE_NAME, "xb") as file, _Hasher() as hasher:
        for weight in own:
            file.write(padding := b"\0" * (weight.offset - hasher.size))
            hasher.update(padding)
            largest = Maximum(weight.source_name)
            for piece in weight.source.pieces():
                converted = bytes_of(weight.source.converted(piece, weight.dtype, largest))
                hasher.update(converted)  # hashes while the same bytes are written
                file.write(converted)
                progress(len(converted))
            written.note(weight, largest)
        written.files[FILE_NAME] = hasher.facts()
    return written


def holds_all(manifest: Manifest) -> bool:
    """Whether weights.data contains the weights, rather than the checkpoint's own files next to it."""
    return not any(name.endswith(".safetensors") for name in manifest.files)


def near_fp16(maxima: Mapping[str, float]) -> str:
    """A warning that names the largest weight close to fp16's limit; empty if there is none."""
    near = {name: largest for name, largest in maxima.items() if largest > FP16_NEAR}
    if not near:
        return ""
    name = max(near, key=lambda item: near[item])
    return (
        f"{name} has the value {near[name]:g}, close to fp16's largest ({FP16_LARGEST:g}), as do "
        f"{len(near) - 1} other weights: sums may overflow; prefer DTYPE=bf16"
    )


def link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if that is impossible (another disk)."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        shutil.copyfile(source, target)


class _Hasher:
    """SHA-256 in a thread of its own, one piece behind: the caller must not change a piece before the next
    call."""

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


def _hash_shard(
    path: Path, weights: list[Weight], written: StreamedWeights, progress: Callable[[int], object]
) -> FileFacts:
    """Hash a whole safetensors file, and record the largest magnitudes of its tensors."""
    ordered = sorted(weights, key=lambda weight: weight.offset)
    with _Hasher() as hasher:
        for weight in ordered:
            for piece in _bytes(path, hasher.size, weight.offset):
                hasher.update(piece)
            largest = Maximum(weight.source_name)
            for elements in weight.source.pieces():
                largest.note(elements)
                hasher.update(elements.view(np.uint8).data)
                progress(elements.nbytes)
            written.note(weight, largest)
        for piece in _bytes(path, hasher.size, path.stat().st_size):
            hasher.update(piece)
        return hasher.facts()


def _bytes(path: Path, start: int, end: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        while start < end and (piece := file.read(min(_PIECE, end - start))):
            start += len(piece)
            yield piece
