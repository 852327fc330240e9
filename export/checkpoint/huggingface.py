"""A Hugging Face checkpoint directory: config.json and safetensors (one file, or shards with an index),
memory-mapped.

The safetensors header is parsed here rather than by the safetensors package, because the byte offsets are
needed: tensors are streamed, or used in place, without ever being loaded. Format: eight bytes of length, a
JSON header, the data.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trt_runtime.errors import DllmError
from trt_runtime.system.commands import package

ADAPTER = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)  # files of the peft package
MERGE = (
    "merge the adapter into its base model first: model = "
    "PeftModel.from_pretrained(AutoModel.from_pretrained(BASE, trust_remote_code=True), "
    "ADAPTER); model.merge_and_unload().save_pretrained(OUT)"
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt")
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_MAX_HEADER = 100_000_000  # the limit of the format
_MAX_RANK = 8


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor: `size` bytes at `offset` of `file`."""

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
    """A checkpoint's files. config: config.json; generation_config: generation_config.json, or empty; notes:
    what a user should know about the files."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    revision: str | None = None
    notes: tuple[str, ...] = ()


def locate(name: str) -> tuple[Path, str | None]:
    """A checkpoint directory and its revision, from a directory or a hub id ('org/name' or
    'org/name@revision')."""
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
    if (
        parent := Path(name).parent
    ).is_dir() and "@" not in name:  # more likely a misspelt directory than a hub id
        neighbours = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
        raise DllmError(
            f"{name}: no such directory; {parent} has "
            f"{', '.join(neighbours[:8]) or 'no directories'}. "
            f"For the hub's repository of this name, give {name}@main."
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise DllmError(
            f"{name}: no such directory; to download it from the hub, install huggingface_hub: "
            f"{package('huggingface_hub')}."
        ) from error
    if (
        "HF_HUB_VERBOSITY" not in os.environ
    ):  # its client logs every attempt as a warning; the failure is reported once, as an error
        from huggingface_hub.utils import logging as client

        client.set_verbosity_error()
    repo, _, revision = name.partition("@")
    return huggingface_hub, repo, revision or None


def _unreachable(name: str, error: Exception) -> DllmError:
    said = str(error).splitlines()[0] if str(error) else "no message"
    return DllmError(
        f"{name}: no such directory, and the hub does not provide it ({type(error).__name__}: {said}): check "
        "the name and the network, or download it yourself and give its directory."
    )


def config_of(name: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """config.json and generation_config.json, and the place of the first, of a directory or a hub id. From
    the hub, only config.json is downloaded, and no weights."""
    path = Path(name)
    if path.is_dir() or not _HUB_ID.fullmatch(name):
        path = locate(name)[0]
        _refuse_adapter(path)
        config = read_json(path / "config.json", "a checkpoint directory has config.json")
        return config, generation_config_of(path), str(path / "config.json")
    hub, repo, revision = _hub(name)
    try:
        file = Path(hub.hf_hub_download(repo, "config.json", revision=revision))
    except Exception as error:  # the hub's client raises errors of a dozen unrelated types
        raise _unreachable(name, error) from error
    return read_json(file), {}, f"{name}: config.json"


def load(path: Path, revision: str | None = None) -> Checkpoint:
    """Read the headers of a checkpoint directory. Raises DllmError for anything missing, truncated or
    contradictory."""
    _refuse_adapter(path)
    config = read_json(path / "config.json", "a checkpoint directory has config.json and *.safetensors")
    tensors, notes = _tensors(path)
    return Checkpoint(path, config, generation_config_of(path), tensors, revision, notes)


def generation_config_of(path: Path) -> dict[str, Any]:
    """generation_config.json of a checkpoint directory; empty if there is none."""
    file = path / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def read_json(path: Path, advice: str = "download the file again") -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises DllmError."""
    if not path.is_file():
        raise DllmError(f"{path}: missing: {advice}.")
    try:
        read = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_contradiction)
    except (ValueError, RecursionError) as error:
        raise DllmError(f"{path}: not JSON ({error}): {advice}.") from error
    if not isinstance(read, dict):
        raise DllmError(f"{path}: contains a {type(read).__name__}, expected an object: {advice}.")
    return read


def _without_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a repeated key must have the same value."""
    read: dict[str, Any] = {}
    for key, value in pairs:
        if key in read and read[key] != value:
            raise ValueError(f"the key {key!r} is repeated with different values")
        read[key] = value
    return read


def _refuse_adapter(path: Path) -> None:
    """Raise DllmError for a directory with adapter files: transformers applies the adapter, an export of the
    weights next to it would not."""
    if adapter_files := [name for name in ADAPTER if (path / name).is_file()]:
        here = (
            ""
            if not (path / SINGLE).is_file() and not (path / INDEX).is_file()
            else (
                f", or move {' and '.join(adapter_files)} elsewhere to export the weights without the adapter"
            )
        )
        raise DllmError(
            f"{path}: {adapter_files[0]} belongs to an adapter (LoRA) whose weights are not merged into "
            f"the model: {MERGE}{here}."
        )


def _tensors(path: Path) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The tensors of a directory, and notes. As in transformers, model.safetensors is used if it exists, and
    the index only otherwise."""
    has_single, has_index = (path / SINGLE).is_file(), (path / INDEX).is_file()
    if not has_single and not has_index:
        raise _no_weights(path)
    if has_single:
        tensors, used = _header(path / SINGLE), {SINGLE}
    else:
        tensors, used = _sharded(path)
    unread = sorted(file.name for file in path.glob("*.safetensors") if file.name not in used)
    notes = []
    if has_single and has_index:
        notes.append(f"read the weights from {SINGLE}, as transformers does; {INDEX} is ignored")
    if unread:
        source = SINGLE if has_single else INDEX
        notes.append(f"{some(unread)}: ignored, the weights come from {source}")
    return tensors, tuple(notes)


def _no_weights(path: Path) -> DllmError:
    others = sorted(file.name for file in path.glob("*.safetensors"))
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    advice = "a checkpoint needs one of them"
    if others:
        advice = (
            f"there are {some(others)}: download the index of these shards too, or rename a file that "
            f"holds all weights to {SINGLE}"
        )
    elif pickles:
        advice = (
            f"{pickles[0]} is a pickle, which can run code and is not read: convert it with "
            f"transformers' save_pretrained"
        )
    return DllmError(f"{path}: neither {SINGLE} nor {INDEX}: {advice}.")


def _sharded(path: Path) -> tuple[dict[str, StoredTensor], set[str]]:
    """The tensors of the shards that the index lists, and the shards' names."""
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DllmError(f"{path / INDEX}: has no weight_map: download the file again.")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise DllmError(
                f"{path / INDEX}: the shard {shard!r} is not a bare file name like model-00001.safetensors: "
                "do not use this checkpoint."
            )
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (path / shard).is_file()]:
        here = sorted(file.name for file in path.glob("*.safetensors"))
        raise DllmError(
            f"{path / missing[0]}: missing. {len(missing)} of the {len(shards)} shards listed in {INDEX} are "
            f"missing; safetensors files present: {some(here) if here else 'none'}. Download the missing "
            "files; if the index belongs to other files, replace it."
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        in_shard = _header(path / shard)
        expected = {name for name, file in weight_map.items() if file == shard}
        if difference := sorted(expected ^ set(in_shard)):
            raise DllmError(
                f"{path / shard}: {INDEX} and the shard disagree on {some(difference)}: download both again."
            )
        tensors |= in_shard
    return tensors, set(shards)


def some(names: Sequence[str]) -> str:
    """The first of some names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. Raises DllmError for a header that the format does not allow: it is
    a table of byte offsets, so everything in it is checked."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise DllmError(
                f"{path}: not a safetensors file, or cut short ({size} bytes): download it again."
            )
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
            tensors = {
                name: _stored(path, name, entry, 8 + length, size)
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            said = " ".join(ascii(str(error)).split())[:200]
            raise DllmError(
                f"{path}: its safetensors header is damaged ({said}): download it again."
            ) from error
    ordered = sorted((stored.offset, stored.offset + stored.size, name) for name, stored in tensors.items())
    ends = [(8 + length, 8 + length, "the header"), *ordered, (size, size, "the end of the file")]
    for (_, end, name), (begin, _, other) in pairwise(ends):
        if begin < end:
            raise DllmError(
                f"{path}: tensors {name} and {other} overlap: the file is damaged: download it again."
            )
        if begin > end:
            raise DllmError(
                f"{path}: {begin - end} bytes between {name} and {other} belong to no tensor: download it "
                f"again."
            )
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys."""
    read = dict(pairs)
    if len(read) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is repeated")
    return read


def _stored(path: Path, name: str, entry: Mapping[str, Any], data: int, size: int) -> StoredTensor:
    if not name.isprintable():
        raise ValueError(f"a tensor is called {name!r}")
    if entry["dtype"] not in _DTYPES:
        raise DllmError(
            f"{path}: tensor {name} is {ascii(entry['dtype'])[1:-1][:20]}, supported are "
            f"{', '.join(_DTYPES)}: "
            "convert the checkpoint to bf16 (a quantised checkpoint cannot be exported)."
        )
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if len(shape) > _MAX_RANK or any(
        type(number) is not int or not 0 <= number < 1 << 63 for number in (*shape, begin, end)
    ):
        raise ValueError(
            f"tensor {name}: invalid shape {str(list(shape))[:60]} or offsets {str([begin, end])[:60]}"
        )
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise DllmError(
            f"{path}: tensor {name} has {end - begin} bytes, but its shape {list(shape)} takes "
            f"{math.prod(shape) * dtype.itemsize}: download it again."
        )
    if data + end > size:
        raise DllmError(
            f"{path}: cut short: {size} bytes, but tensor {name} ends at byte {data + end}: download it "
            f"again."
        )
    return StoredTensor(path, dtype, shape, data + begin, end - begin)
