"""The artifact's manifest: reading, checking, writing. Standard library only.

An artifact is a directory: manifest.json (written last), prefix.onnx, refine.onnx, weights.data and, if the checkpoint had
one, tokenizer/. Readers ignore keys they do not know, check types, paths and sizes always, and hashes on request.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from trt_runtime import artifact_check, atomic, contract
from trt_runtime.artifact_check import FILE_NAME, FileFacts, sha256_of
from trt_runtime.errors import DllmError, shown

__all__ = ["FILE_NAME", "FileFacts", "sha256_of"]  # besides what is defined here
FORMAT = "dllm-trt"
FORMAT_VERSION = 1
GUMBEL, CATEGORICAL = SAMPLINGS = ("gumbel", "categorical")
ORT_CPU, TENSORRT = TARGETS = ("ort-cpu", "tensorrt")  # what a quantised artifact is for
_AGAIN = artifact_check.AGAIN
_MEASURED = (
    "kl_mean",
    "same_token",
    "same_commit",
    "judged",
    "right",
    "right_before",
)  # of quantization.quality, what readers show


@dataclass(frozen=True)
class ModelFacts:
    """What the network is. `dtype` is one of contract.DTYPES; `max_length` is the longest canvas in tokens.

    parameters: of the network alone. tied_head: whether the head is the embedding. weight_bytes: of a quantised model's weights as they are
    stored; None: `parameters` numbers of `dtype`.
    """

    family: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_length: int
    dtype: str
    parameters: int
    tied_head: bool = False
    weight_bytes: int | None = None


@dataclass(frozen=True)
class DecodingFacts:
    """What the loop must know. `logit_shift`: the logits of row i - logit_shift predict token i.

    sampling: how proposals are drawn, 'gumbel' (LLaDA) or 'categorical' (Dream): see sampling.py.
    first_commit: with a cache, a prefix pass commits the block's first position alone, whatever the policy (Dream).
    tuned: options of a generation (config.py) that 'dllm-trt tune' found best here; they hold where the user gives none.
    blocks_without_cache: whether cache=none decodes block by block when no block_length is given (Dream: the whole canvas).
    """

    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    logit_shift: int
    defaults: dict[str, Any] = field(default_factory=dict)
    sampling: str = GUMBEL
    first_commit: bool = False
    blocks_without_cache: bool = True
    tuned: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantization:
    """How linear layers are quantised, and for what: `scheme` is a name of export/quantization, `target` one of TARGETS.

    Graphs for 'ort-cpu' hold operators of ONNX Runtime's own, which run there on a CPU alone; those for 'tensorrt' hold QuantizeLinear and
    DequantizeLinear. calibration: what it was calibrated on. quality: what the gate of the export measured; None if it was left out.
    """

    scheme: str
    target: str
    calibration: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None


@dataclass(frozen=True)
class GraphFacts:
    """File of a graph, and its inputs and outputs as [name, dtype, axes] rows: a copy of the contract for readers."""

    file: str
    inputs: list[Any]
    outputs: list[Any]


@dataclass(frozen=True)
class Manifest:
    """The whole manifest. `files` is keyed by the path relative to the artifact, with forward slashes.

    weight_maxima: the largest magnitude of each checkpoint tensor that is stored as it is, by the name of its initializer.
    """

    producer: dict[str, str]
    source: dict[str, Any]
    model: ModelFacts
    decoding: DecodingFacts
    head: str
    lowering: str
    opset: int
    graphs: dict[str, GraphFacts]
    files: dict[str, FileFacts]
    tokenizer: str | None = None
    verified: dict[str, Any] | None = None
    weight_maxima: dict[str, float] = field(default_factory=dict)
    quantization: Quantization | None = None

    @property
    def dims(self) -> contract.Dims:
        """What fixes the inputs and outputs of its graphs."""
        sizes = (self.model.num_layers, self.model.num_kv_heads, self.model.head_dim, self.model.vocab_size)
        return contract.Dims(*sizes, contract.DTYPES[self.model.dtype], self.lowering)


def load(artifact: Path, *, check_hashes: bool = False) -> Manifest:
    """The manifest of an artifact directory, with every listed file checked for path and size.

    `check_hashes` also reads every file and compares its SHA-256. Raises DllmError.
    """
    path = artifact / FILE_NAME
    if not path.is_file():
        raise DllmError(
            f"{artifact}: not an artifact: no {FILE_NAME} in it (an interrupted export leaves none). "
            "Give the directory that an export wrote, e.g. artifacts/llada-demo."
        )
    try:
        read = json.loads(path.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
    except (ValueError, OSError, RecursionError) as error:
        raise DllmError(f"{path}: not readable as JSON ({error}): {_AGAIN}.") from error
    manifest = parse(read, str(path))
    held = manifest.quantization
    artifact_check.check(
        artifact,
        manifest.files,
        [graph.file for graph in manifest.graphs.values()],
        check_hashes=check_hashes,
        may_be_microsoft=held is not None and held.target == ORT_CPU,
    )
    return manifest


def parse(read: object, where: str) -> Manifest:
    """A manifest from decoded JSON; `where` names it in errors."""
    if not isinstance(read, dict) or read.get("format") != FORMAT:
        got = read.get("format") if isinstance(read, dict) else type(read).__name__
        raise DllmError(f"{where}: format is {got!r}, expected '{FORMAT}': this is not the manifest of a dllm-trt artifact.")
    version = read.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DllmError(f"{where}: format_version is {version!r}, expected a whole number from 1: {_AGAIN}.")
    if version > FORMAT_VERSION:
        raise DllmError(
            f"{where}: format_version is {version}, this dllm-trt reads up to {FORMAT_VERSION}: "
            "update dllm-trt, or export the artifact with this version."
        )
    manifest: Manifest = _typed(Manifest, read, where)
    for role in contract.ROLES:
        if role not in manifest.graphs:
            raise DllmError(f"{where}: graphs lacks '{role}': {_AGAIN}.")
        if manifest.graphs[role].file not in manifest.files:
            raise DllmError(f"{where}: graph '{role}' is not among the files: {_AGAIN}.")
    if manifest.model.dtype not in contract.DTYPES:
        raise DllmError(f"{where}: model.dtype is {manifest.model.dtype!r}, expected one of {sorted(contract.DTYPES)}.")
    if manifest.head not in contract.HEADS:
        raise DllmError(f"{where}: head is {manifest.head!r}, expected one of {list(contract.HEADS)}.")
    _check_facts(manifest, where)
    _check_notes(manifest, where)
    for name in [*manifest.files, *([manifest.tokenizer] if manifest.tokenizer else [])]:
        _check_name(name, where)
    return manifest


def check_runs_on_gpu(manifest: Manifest, where: str) -> None:
    """Raise DllmError for an artifact that is quantised for the CPU."""
    held = manifest.quantization
    if held is not None and held.target == ORT_CPU:
        raise DllmError(
            f"{where}: is quantised ({held.scheme}) with ONNX Runtime's own operators, which run on a CPU: for a GPU export it with "
            "--quantize fp8, int8-sq, or int4 --target tensorrt, or without --quantize."
        )


def _check_notes(manifest: Manifest, where: str) -> None:
    """What tuning and the gate noted, as far as readers use it."""
    for key, value in manifest.decoding.tuned.items():
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise DllmError(
                f"{where}: decoding.tuned: {key} is {shown(value)}, expected a number, a text or null: tune it again."
            )
    measured = manifest.quantization.quality if manifest.quantization else None
    if measured is not None and (lacking := [key for key in _MEASURED if type(measured.get(key)) not in (int, float)]):
        raise DllmError(
            f"{where}: quantization.quality: {lacking[0]} is {measured.get(lacking[0])!r}, expected a number: {_AGAIN}."
        )


def _check_facts(manifest: Manifest, where: str) -> None:
    model, decoding = manifest.model, manifest.decoding
    if not any(name.endswith(".data") for name in manifest.files):
        raise DllmError(f"{where}: lists no weights: {_AGAIN}.")
    for key, value in decoding.defaults.items():
        if type(value) is not int or not 1 <= value < 2**31:
            raise DllmError(f"{where}: decoding.defaults: {key} is {value!r}, expected a whole number from 1: {_AGAIN}.")
    for item in fields(model):
        value = getattr(model, item.name)
        if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value < 2**48:
            raise DllmError(f"{where}: model.{item.name} is {str(value)[:40]}, expected a whole number from 1: {_AGAIN}.")
    if manifest.quantization is not None and manifest.quantization.target not in TARGETS:
        raise DllmError(
            f"{where}: quantization.target is {manifest.quantization.target!r}, expected one of {list(TARGETS)}: {_AGAIN}."
        )
    if decoding.sampling not in SAMPLINGS:
        raise DllmError(f"{where}: decoding.sampling is {decoding.sampling!r}, expected one of {list(SAMPLINGS)}.")
    for token in (decoding.mask_token_id, decoding.pad_token_id, *decoding.eos_token_ids):
        if not 0 <= token < model.vocab_size:
            raise DllmError(f"{where}: token id {token} is outside the vocabulary of {model.vocab_size}: {_AGAIN}.")
    if decoding.mask_token_id in decoding.eos_token_ids or decoding.logit_shift not in (0, 1):
        raise DllmError(
            f"{where}: mask token {decoding.mask_token_id}, end tokens {list(decoding.eos_token_ids)}, logit_shift "
            f"{decoding.logit_shift}: the mask cannot end a text, and the shift is 0 or 1: {_AGAIN}."
        )
    if decoding.logit_shift and not decoding.first_commit:  # the row before a refine window would be needed
        raise DllmError(
            f"{where}: logit_shift is {decoding.logit_shift} without first_commit, which cannot be decoded: {_AGAIN}."
        )


def write(manifest: Manifest, artifact: Path) -> None:
    """Write (or atomically replace) the manifest of `artifact`."""
    text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}, indent=2)
    atomic.replace(artifact / FILE_NAME, (text + "\n").encode())


def update(artifact: Path, change: Callable[[Manifest], Manifest], *, since: Manifest) -> None:
    """Note something in the manifest as it is now, one process after another. `since`: what the caller read before; raises DllmError if the
    artifact was exported anew meanwhile, for what is to be noted then holds for another one."""
    with atomic.locked(artifact):
        held = load(artifact)
        if held.files != since.files or held.model != since.model:
            raise DllmError(f"{artifact}: was replaced by another export meanwhile: nothing was noted; run the command again.")
        write(change(held), artifact)


def foreign_files(artifact: Path) -> list[str]:
    """Files in an artifact's directory that neither an export wrote nor a reader overlooks; all of them if the manifest is none."""
    try:
        listed = set(parse(json.loads((artifact / FILE_NAME).read_text(encoding="utf-8")), str(artifact)).files)
    except (OSError, ValueError, RecursionError, DllmError):
        return sorted(artifact_check.found(artifact))
    return list(artifact_check.unlisted(artifact, listed))


def _check_name(name: str, where: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise DllmError(
            f"{where}: the path {name!r} leaves the artifact; expected a relative path without '..': do not use this artifact."
        )


def _finite(text: str) -> float:
    """A number of JSON, which knows no infinity: 1e400 is none, nor is NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is not finite")
    return value


def _typed(expected: Any, value: Any, where: str) -> Any:
    """`value` checked against a type annotation; dataclasses are built from mappings, unknown keys ignored."""
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if origin is types.UnionType:
        return None if value is None else _typed(args[0], value, where)
    if isinstance(expected, type) and hasattr(expected, "__dataclass_fields__"):
        return _typed_dataclass(expected, value, where)
    if origin is dict and isinstance(value, dict):
        return {str(key): _typed(args[1], item, f"{where}: {key}") for key, item in value.items()}
    if origin in (tuple, list) and isinstance(value, list):
        return origin(_typed(args[0], item, where) for item in value)
    if isinstance(value, origin or expected) and not (expected is int and isinstance(value, bool)):
        return value
    name = getattr(expected, "__name__", str(expected))
    raise DllmError(f"{where}: is {value!r}, expected {name}: {_AGAIN}.")


def _typed_dataclass(expected: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise DllmError(f"{where}: is {value!r}, expected an object: {_AGAIN}.")
    hints = typing.get_type_hints(expected)
    taken = {}
    for item in fields(expected):
        if item.name in value:
            taken[item.name] = _typed(hints[item.name], value[item.name], f"{where}: {item.name}")
    required = [f.name for f in fields(expected) if f.default is f.default_factory]  # both are the MISSING mark
    missing = [name for name in required if name not in taken]
    if missing:
        raise DllmError(f"{where}: lacks {', '.join(missing)}: {_AGAIN}.")
    return expected(**taken)
