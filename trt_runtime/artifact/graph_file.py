"""What a graph file refers to: the files and ranges of its weights, and its operators. Read from the
protobuf, without the onnx package.

A graph names the files of its weights. The manifest's hashes protect a reader only if the graph names no
other files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trt_runtime.errors import DllmError

# message -> field number -> message: the parts of onnx.proto3 that can contain tensors and nodes
_PARTS = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
    "Entry": {},
}
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # kinds of fields
_DEEPEST = 32


@dataclass
class References:
    """External data as (file, offset, length; None: to the end), and operators as (domain, name)."""

    data: set[tuple[str, int, int | None]] = field(default_factory=set)
    operators: set[tuple[str, str]] = field(default_factory=set)


def read(path: Path) -> References:
    """What the graph in a file refers to. Raises DllmError if it is not a graph."""
    references = References()
    try:
        _walk(memoryview(path.read_bytes()), "Model", references, 0)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise DllmError(
            f"{path}: not a valid ONNX graph ({error}): export it again or copy it again."
        ) from error
    if not references.operators:
        raise DllmError(
            f"{path}: not a valid ONNX graph (it has no nodes): export it again or copy it again."
        )
    return references


def _walk(data: memoryview, kind: str, references: References, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    texts: dict[int, str] = {}
    entries: dict[str, str] = {}
    for number, value in _fields(data):
        part = _PARTS[kind].get(number)
        if part == "Entry":
            pair = {key: bytes(text).decode() for key, text in _fields(value)}
            if entries.setdefault(name := pair.get(1, ""), pair.get(2, "")) != pair.get(2, ""):
                raise ValueError(f"external data with two values of {name}")
        elif part is not None:
            _walk(value, part, references, depth + 1)
        elif kind == "Node" and number in (4, 7):  # op_type, domain
            texts[number] = bytes(value).decode()
    if kind == "Node":
        if not texts.get(4):
            raise ValueError("a node has no operator")
        references.operators.add((texts.get(7, ""), texts[4]))
    if entries:
        length = entries.get("length")
        references.data.add(
            (entries.get("location", ""), int(entries.get("offset") or 0), int(length) if length else None)
        )


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a message that contain bytes: number, value."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind, number = tag & 7, tag >> 3
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _BYTES:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("it is truncated")
            yield number, data[at : at + size]
            at += size
        elif kind in (_EIGHT, _FOUR):
            at += 8 if kind == _EIGHT else 4
        else:
            raise ValueError(f"a field of kind {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if shift > 63:
            raise ValueError("a number is too long")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
