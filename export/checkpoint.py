"""A Hugging Face checkpoint directory: config.json and safetensors (one file, or shards with an index), memory-mapped.

The safetensors header is read here and not by the safetensors package because the byte offsets are needed: tensors are
streamed, and may be used where they lie, without ever being loaded. Format: eight bytes of length, a JSON header, the data.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trt_runtime.advice import package
from trt_runtime.errors import DllmError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt")
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_MAX_HEADER = 100_000_000  # the format's own bound


@dataclass(frozen=True)
class StoredTensor:
    """A tensor where it lies: `size` bytes at `offset` of `file`."""

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    size: int

    def open(self) -> np.ndarray[Any, Any]:
        """The tensor, memory-mapped read-only: flat, one dimension."""
        return np.memmap(self.file, self.dtype, "r", self.offset, (self.size // self.dtype.itemsize,))


@dataclass(frozen=True)
class Checkpoint:
    """`config` is config.json; `generation_config` is generation_config.json, or empty."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    revision: str | None = None


def locate(name: str) -> tuple[Path, str | None]:
    """A checkpoint directory and its revision, from a directory or a hub id ('org/name' or 'org/name@revision')."""
    path = Path(name)
    if path.is_dir():
        return path, None
    hub, repo, revision = _hub(name)
    try:
        snapshot = hub.snapshot_download(repo, revision=revision, allow_patterns=list(_HUB_PATTERNS))
    except Exception as error:  # the hub's client raises errors of a dozen unrelated types
        raise _unreachable(name, error) from error
    return Path(snapshot), Path(snapshot).name


def _hub(name: str) -> tuple[Any, str, str | None]:
    """huggingface_hub, the repository and the revision of a hub id."""
    if not _HUB_ID.fullmatch(name) or Path(name).exists():
        raise DllmError(
            f"{name}: no such directory, and not a hub id: give a checkpoint directory with config.json and "
            "*.safetensors, or a hub id like org/name."
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise DllmError(
            f"{name}: no such directory; to download it from the hub, install huggingface_hub: {package('huggingface_hub')}."
        ) from error
    repo, _, revision = name.partition("@")
    return huggingface_hub, repo, revision or None


def _unreachable(name: str, error: Exception) -> DllmError:
    said = str(error).splitlines()[0] if str(error) else "no message"
    return DllmError(
        f"{name}: no such directory, and not to be had from the hub ({type(error).__name__}: {said}): check the name and the "
        "network, or download it yourself and give its directory."
    )


def config_of(name: str) -> tuple[dict[str, Any], str]:
    """config.json alone, and where it came from: of a directory, or of a hub id, whose weights are not downloaded."""
    path = Path(name)
    if path.is_dir() or not _HUB_ID.fullmatch(name):
        path = locate(name)[0]
        return read_json(path / "config.json", "a checkpoint directory has config.json"), str(path / "config.json")
    hub, repo, revision = _hub(name)
    try:
        file = Path(hub.hf_hub_download(repo, "config.json", revision=revision))
    except Exception as error:  # the hub's client raises errors of a dozen unrelated types
        raise _unreachable(name, error) from error
    return read_json(file), f"{name}: config.json"


def load(path: Path, revision: str | None = None) -> Checkpoint:
    """Read the headers of a checkpoint directory. Raises DllmError for anything missing, cut short or contradictory."""
    config = read_json(path / "config.json", "a checkpoint directory has config.json and *.safetensors")
    generation = path / "generation_config.json"
    return Checkpoint(path, config, read_json(generation) if generation.is_file() else {}, _tensors(path), revision)


def read_json(path: Path, advice: str = "download the file again") -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises DllmError."""
    if not path.is_file():
        raise DllmError(f"{path}: missing: {advice}.")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DllmError(f"{path}: not JSON ({error}): {advice}.") from error
    if not isinstance(read, dict):
        raise DllmError(f"{path}: holds a {type(read).__name__}, expected an object: {advice}.")
    return read


def _tensors(path: Path) -> dict[str, StoredTensor]:
    if not (path / INDEX).is_file():
        if (path / SINGLE).is_file():
            return _header(path / SINGLE)
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        advice = (
            f"{pickles[0]} is a pickle, which can run code and is not read: convert it with transformers' save_pretrained"
            if pickles
            else "a checkpoint needs one of them"
        )
        raise DllmError(f"{path}: neither {SINGLE} nor {INDEX}: {advice}.")
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise DllmError(f"{path / INDEX}: has no weight_map: download the file again.")
    tensors: dict[str, StoredTensor] = {}
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise DllmError(f"{path / INDEX}: the shard {shard!r} is not a bare file name like model-00001.safetensors: "
                            "do not use this checkpoint.")  # fmt: skip
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).is_file():
            raise DllmError(f"{path / shard}: missing, {INDEX} lists it: download it again.")
        held = _header(path / shard)
        expected = {name for name, file in weight_map.items() if file == shard}
        if difference := sorted(expected ^ set(held)):
            raise DllmError(
                f"{path / shard}: {INDEX} and the shard disagree on {', '.join(difference[:5])}"
                f"{' ...' if len(difference) > 5 else ''}: download both again."
            )
        tensors |= held
    return tensors


def _header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise DllmError(f"{path}: not a safetensors file, or cut short ({size} bytes): download it again.")
        try:
            header = json.loads(file.read(length))
            held = {
                name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DllmError(f"{path}: its safetensors header is damaged ({error}): download it again.") from error
    ordered = sorted((stored.offset, stored.offset + stored.size, name) for name, stored in held.items())
    for (_, end, name), (begin, _, other) in pairwise(ordered):
        if begin < end:
            raise DllmError(f"{path}: tensors {name} and {other} overlap: the file is damaged: download it again.")
    return held


def _stored(path: Path, name: str, entry: Mapping[str, Any], data: int, size: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise DllmError(
            f"{path}: tensor {name} is {entry['dtype']}, supported are {', '.join(_DTYPES)}: "
            "convert the checkpoint to bf16 (a quantised checkpoint cannot be exported)."
        )
    dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise DllmError(f"{path}: tensor {name} has {end - begin} bytes for shape {list(shape)}: download it again.")
    if data + end > size:
        raise DllmError(f"{path}: cut short: {size} bytes, but tensor {name} ends at byte {data + end}: download it again.")
    return StoredTensor(path, dtype, shape, data + begin, end - begin)
