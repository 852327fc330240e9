"""Whether an artifact's directory contains what its manifest says: listed files with their sizes and hashes,
no other files that are read, and graphs that refer to listed files only. Standard library only."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trt_runtime.artifact import graph_file
from trt_runtime.errors import DllmError

FILE_NAME = "manifest.json"
AGAIN = "export it again or copy it again"
_STANDARD = ("", "ai.onnx")  # domains of ONNX's own operators
_MICROSOFT = "com.microsoft"  # of ONNX Runtime, which artifacts quantised for the CPU may use
# what people and the Hub put next to an artifact's files, and no reader opens
_NOTES = ("readme*", "license*", "notice*", ".gitattributes", ".gitignore", ".git/*", ".cache/*", ".ds_store")


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and SHA-256 (hex) of a file of the artifact."""

    size: int
    sha256: str


def check(
    artifact: Path,
    listed: Mapping[str, FileFacts],
    graphs: list[str],
    *,
    check_hashes: bool,
    may_be_microsoft: bool,
) -> None:
    """Raise DllmError unless the directory contains the listed files, and the graphs among them refer to
    nothing else. Files may be links, as in the Hub's cache: their targets are checked. may_be_microsoft:
    whether graphs may contain ONNX Runtime's own operators."""
    for name, facts in listed.items():
        _check_file(artifact, name, facts, check_hashes)
    for name in unlisted(artifact, set(listed)):
        raise DllmError(
            f"{artifact / name}: the manifest does not list it: the file was added after export: remove it, "
            f"or {AGAIN}."
        )
    for name in graphs:
        _check_references(
            artifact / name, listed, (*_STANDARD, _MICROSOFT) if may_be_microsoft else _STANDARD
        )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def unlisted(artifact: Path, listed: set[str]) -> Iterator[str]:
    """Files that exist and are not listed, except for the manifest, one that is being written, and notes that
    no reader opens."""
    for name in found(artifact, _is_note):
        is_ours = name == FILE_NAME or (name.startswith(f".{FILE_NAME}.") and name.endswith(".tmp"))
        if name not in listed and not is_ours and not _is_note(name):
            yield name


def _is_note(name: str) -> bool:
    return any(fnmatch.fnmatch(name.lower(), note) for note in _NOTES)


def found(artifact: Path, passes_by: Callable[[str], bool] = lambda name: False) -> Iterator[str]:
    """Yield every file under a directory as it is encountered. A directory may be a link, as in the Hub's
    cache (even to a whole file system: a caller that wants one file does not wait for the rest). passes_by:
    directories, with a trailing slash, that are skipped."""
    seen = set[tuple[int, int]]()  # so that a link to a directory above it ends
    for where, directories, names in os.walk(artifact, followlinks=True):
        try:
            at = os.stat(where)
        except FileNotFoundError:  # a temporary directory of another process
            continue
        if (at.st_dev, at.st_ino) in seen:
            directories.clear()
            continue
        seen.add((at.st_dev, at.st_ino))
        inside = Path(where).relative_to(artifact)
        directories[:] = sorted(
            name for name in directories if not passes_by(f"{(inside / name).as_posix()}/")
        )
        for name in sorted(names):
            yield (inside / name).as_posix()


def _check_file(artifact: Path, name: str, facts: FileFacts, check_hash: bool) -> None:
    path = artifact / name
    if not path.is_file():
        what = "is a broken link" if path.is_symlink() else "missing, but the manifest lists it"
        raise DllmError(f"{path}: {what}: {AGAIN}.")
    if (size := path.stat().st_size) != facts.size:
        raise DllmError(
            f"{path}: {size} bytes, the manifest says {facts.size}: the file was changed or cut short after "
            f"export: {AGAIN}."
        )
    if check_hash and (digest := sha256_of(path)) != facts.sha256:
        raise DllmError(
            f"{path}: SHA-256 is {digest[:12]}.., the manifest says {facts.sha256[:12]}..: "
            f"the file was changed after export: {AGAIN}."
        )


def _check_references(path: Path, listed: Mapping[str, FileFacts], domains: tuple[str, ...]) -> None:
    """Check that a graph takes its weights from listed files, within their sizes, and uses operators of these
    domains only."""
    refers = graph_file.read(path)
    for file, offset, length in sorted(refers.data, key=str):
        if file not in listed:
            raise DllmError(
                f"{path}: reads weights from {file[:200]!r}, which the manifest does not list: do not use "
                f"this artifact."
            )
        size = listed[file].size
        if not 0 <= offset <= size or not 0 <= (length or 0) <= size - offset:
            raise DllmError(
                f"{path}: reads {length} bytes at offset {offset} of {file}, which has only {size}: the "
                f"files come from different exports: {AGAIN}."
            )
    for domain, operator in sorted(refers.operators):
        if domain not in domains:
            what = f"{domain}.{operator}"[:200]
            raise DllmError(
                f"{path}: contains the operator {what}, which this kind of artifact never has: do not use it."
            )
