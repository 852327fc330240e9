"""The artifact's manifest: reading, checking, writing. Standard library only.

An artifact is a directory: manifest.json (written last), prefix.onnx, refine.onnx, weights.data and, if the
checkpoint had one, tokenizer/. Readers ignore keys they do not know, check types, paths and sizes always, and
hashes on request.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from trt_runtime.artifact import check, contract
from trt_runtime.artifact.check import FILE_NAME, FileFacts, sha256_of
from trt_runtime.artifact.facts import (
    ABSOLUTE,
    ATTENTIONS,
    BLOCK_CAUSAL,
    CATEGORICAL,
    FULL,
    GUMBEL,
    MULTINOMIAL,
    ORIGINS,
    ORT_CPU,
    PROMPT_END,
    SAMPLINGS,
    SINCE_2,
    TARGETS,
    TENSORRT,
    DecodingFacts,
    ExpertFacts,
    GraphFacts,
    Manifest,
    ModelFacts,
    Quantization,
    check_facts,
    check_notes,
)
from trt_runtime.artifact.typed import finite, typed
from trt_runtime.errors import DllmError
from trt_runtime.system import atomic

__all__ = [
    "ABSOLUTE",
    "ATTENTIONS",
    "BLOCK_CAUSAL",
    "CATEGORICAL",
    "FILE_NAME",
    "FULL",
    "GUMBEL",
    "MULTINOMIAL",
    "ORIGINS",
    "ORT_CPU",
    "PROMPT_END",
    "SAMPLINGS",
    "TARGETS",
    "TENSORRT",
    "DecodingFacts",
    "ExpertFacts",
    "FileFacts",
    "GraphFacts",
    "Manifest",
    "ModelFacts",
    "Quantization",
    "finite",
    "sha256_of",
]  # in addition to those defined here
FORMAT = "dllm-trt"
FORMAT_VERSION = 2  # of artifacts that readers of version 1 would misread; the others are written as 1
_AGAIN = check.AGAIN


def load(artifact: Path, *, check_hashes: bool = False) -> Manifest:
    """The manifest of an artifact directory, with the path and size of every listed file checked.
    check_hashes: also read every file and compare its SHA-256. Raises DllmError."""
    path = artifact / FILE_NAME
    if not path.is_file():
        raise DllmError(
            f"{artifact}: not an artifact: no {FILE_NAME} in it (an interrupted export leaves none). "
            "Give the directory that an export wrote, e.g. artifacts/llada-demo."
        )
    try:
        read = json.loads(path.read_text(encoding="utf-8"), parse_float=finite, parse_constant=finite)
    except (ValueError, OSError, RecursionError) as error:
        raise DllmError(f"{path}: not readable as JSON ({error}): {_AGAIN}.") from error
    manifest = parse(read, str(path))
    check.check(
        artifact,
        manifest.files,
        [graph.file for graph in manifest.graphs.values()],
        check_hashes=check_hashes,
        may_be_microsoft=manifest.is_for_cpu,
    )
    return manifest


def parse(read: object, where: str) -> Manifest:
    """A manifest from decoded JSON; `where` names it in errors."""
    if not isinstance(read, dict) or read.get("format") != FORMAT:
        got = read.get("format") if isinstance(read, dict) else type(read).__name__
        raise DllmError(
            f"{where}: format is {got!r}, expected '{FORMAT}': this is not the manifest of a dllm-trt "
            f"artifact."
        )
    version = read.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DllmError(f"{where}: format_version is {version!r}, expected a whole number from 1: {_AGAIN}.")
    if version > FORMAT_VERSION:
        raise DllmError(
            f"{where}: format_version is {version}, this dllm-trt reads up to {FORMAT_VERSION}: "
            "update dllm-trt, or export the artifact with this version."
        )
    manifest: Manifest = typed(Manifest, read, where)
    for role in contract.ROLES:
        if role not in manifest.graphs:
            raise DllmError(f"{where}: graphs has no '{role}': {_AGAIN}.")
        if manifest.graphs[role].file not in manifest.files:
            raise DllmError(f"{where}: the file of graph '{role}' is not listed in files: {_AGAIN}.")
    if manifest.model.dtype not in contract.DTYPES:
        raise DllmError(
            f"{where}: model.dtype is {manifest.model.dtype!r}, expected one of {sorted(contract.DTYPES)}."
        )
    if manifest.head not in contract.HEADS:
        raise DllmError(f"{where}: head is {manifest.head!r}, expected one of {list(contract.HEADS)}.")
    check_facts(manifest, where)
    check_notes(manifest, where)
    for name in [*manifest.files, *([manifest.tokenizer] if manifest.tokenizer else [])]:
        _check_name(name, where)
    return manifest


def check_runs_on_gpu(manifest: Manifest, where: str) -> None:
    """Raise DllmError for an artifact with operators of ONNX Runtime's own, which run on a CPU."""
    if not manifest.is_for_cpu:
        return
    if (quantization := manifest.quantization) is None:
        raise DllmError(
            f"{where}: computes its experts by ONNX Runtime's own operator, which runs on a CPU: for a GPU "
            f"export it without --target ort-cpu."
        )
    raise DllmError(
        f"{where}: is quantised ({quantization.scheme}) with ONNX Runtime's own operators, which run on "
        "a CPU: for a GPU export it with --quantize fp8, int8-sq, or int4 --target tensorrt, or without "
        "--quantize."
    )


def write(manifest: Manifest, artifact: Path) -> None:
    """Write (or atomically replace) the manifest of `artifact`. One that decodes as format 1 takes for
    granted is written without the facts that came after it, as version 1, which earlier readers know."""
    facts, version = asdict(manifest), FORMAT_VERSION
    if all(facts["decoding"][name] == value for name, value in SINCE_2.items()):
        version = 1
        for name in SINCE_2:
            del facts["decoding"][name]
    if manifest.model.experts is None:
        del facts["model"]["experts"]
    written = _readable({"format": FORMAT, "format_version": version, **facts})
    text = json.dumps(written, indent=2, allow_nan=False)
    atomic.replace(artifact / FILE_NAME, (text + "\n").encode())


def _readable(fact: Any) -> Any:
    """A fact as JSON can hold it: a measured number that is not finite becomes a text, because readers refuse
    a manifest with NaN or Infinity."""
    if isinstance(fact, dict):
        return {name: _readable(value) for name, value in fact.items()}
    if isinstance(fact, list | tuple):
        return [_readable(value) for value in fact]
    return f"not finite ({fact})" if isinstance(fact, float) and not math.isfinite(fact) else fact


def update(artifact: Path, change: Callable[[Manifest], Manifest], *, since: Manifest) -> None:
    """Change the current manifest, one process after another. since: what the caller read before; raises
    DllmError if the artifact was exported again in the meantime, because the change would belong to another
    artifact."""
    with atomic.locked(artifact):
        manifest = load(artifact)
        if manifest.files != since.files or manifest.model != since.model:
            raise DllmError(
                f"{artifact}: was replaced by another export in the meantime: nothing was recorded; run "
                f"the command again."
            )
        write(change(manifest), artifact)


def foreign_files(artifact: Path) -> Iterator[str]:
    """Files in an artifact's directory that no export wrote and readers do not ignore; all files if the
    manifest is invalid."""
    try:
        listed = set(
            parse(json.loads((artifact / FILE_NAME).read_text(encoding="utf-8")), str(artifact)).files
        )
    except (OSError, ValueError, RecursionError, DllmError):
        return check.found(artifact)
    return check.unlisted(artifact, listed)


def _check_name(name: str, where: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise DllmError(
            f"{where}: the path {name!r} leaves the artifact; expected a relative path without '..': do not "
            f"use this artifact."
        )
