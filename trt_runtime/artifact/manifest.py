"""The artifact's manifest: reading, checking, writing. Standard library only.

An artifact is a directory: manifest.json (written last), prefix.onnx, refine.onnx, weights.data and, if the
checkpoint had one, tokenizer/. Readers ignore keys they do not know, check types, paths and sizes always, and
hashes on request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from trt_runtime.artifact import check, contract
from trt_runtime.artifact.check import FILE_NAME, FileFacts, sha256_of
from trt_runtime.artifact.typed import finite, typed
from trt_runtime.errors import DllmError, shown
from trt_runtime.system import atomic

__all__ = ["FILE_NAME", "FileFacts", "finite", "sha256_of"]  # in addition to those defined here
FORMAT = "dllm-trt"
FORMAT_VERSION = 1
GUMBEL, CATEGORICAL = SAMPLINGS = ("gumbel", "categorical")
ORT_CPU, TENSORRT = TARGETS = ("ort-cpu", "tensorrt")  # targets of quantised artifacts
_AGAIN = check.AGAIN
_MEASURED = (
    "kl_mean",
    "same_token",
    "same_commit",
    "judged",
    "right",
    "right_before",
)  # of quantization.quality, as readers show it


@dataclass(frozen=True)
class ModelFacts:
    """What the network is. `dtype` is one of contract.DTYPES; `max_length` is the longest canvas in tokens.

    parameters: of the network only. tied_head: whether the head is the embedding. weight_bytes: of a
    quantised model's weights as they are stored; None: `parameters` numbers of `dtype`.
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
    """How the model decodes. `logit_shift`: the logits of row i - logit_shift predict token i.

    sampling: how proposals are drawn, 'gumbel' (LLaDA) or 'categorical' (Dream): see sampling.py.
    first_commit: with a cache, the block's prefix pass commits only the block's first position, whatever the
    policy (Dream).
    tuned: options of a generation (config.py) that 'dllm-trt tune' found best here; used where the user
    gives none.
    blocks_without_cache: whether cache=none decodes block by block when no block_length is given (Dream: the
    whole canvas).
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

    @property
    def special_token_ids(self) -> set[int]:
        """The tokens that are not part of a text."""
        return {self.mask_token_id, self.pad_token_id, *self.eos_token_ids}


@dataclass(frozen=True)
class Quantization:
    """How linear layers are quantised, and for what: `scheme` is a name of export/quantization, `target` one
    of TARGETS.

    Graphs for 'ort-cpu' contain ONNX Runtime's own operators, which run only on its CPU provider; those for
    'tensorrt' contain QuantizeLinear and DequantizeLinear. calibration: what it was calibrated on. quality:
    what the export's gate measured; None if it was skipped.
    """

    scheme: str
    target: str
    calibration: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None


@dataclass(frozen=True)
class GraphFacts:
    """File of a graph, and its inputs and outputs as [name, dtype, axes] rows: a copy of the contract for
    readers."""

    file: str
    inputs: list[Any]
    outputs: list[Any]


@dataclass(frozen=True)
class Manifest:
    """The whole manifest. `files` is keyed by the path relative to the artifact, with forward slashes.

    weight_maxima: the largest magnitude of each checkpoint tensor that is stored as it is, by the name of its
    initializer.
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
        """What determines the inputs and outputs of its graphs."""
        sizes = (self.model.num_layers, self.model.num_kv_heads, self.model.head_dim, self.model.vocab_size)
        return contract.Dims(*sizes, contract.DTYPES[self.model.dtype], self.lowering)


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
    quantization = manifest.quantization
    check.check(
        artifact,
        manifest.files,
        [graph.file for graph in manifest.graphs.values()],
        check_hashes=check_hashes,
        may_be_microsoft=quantization is not None and quantization.target == ORT_CPU,
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
    _check_facts(manifest, where)
    _check_notes(manifest, where)
    for name in [*manifest.files, *([manifest.tokenizer] if manifest.tokenizer else [])]:
        _check_name(name, where)
    return manifest


def check_runs_on_gpu(manifest: Manifest, where: str) -> None:
    """Raise DllmError for an artifact that is quantised for the CPU."""
    quantization = manifest.quantization
    if quantization is not None and quantization.target == ORT_CPU:
        raise DllmError(
            f"{where}: is quantised ({quantization.scheme}) with ONNX Runtime's own operators, which run on "
            "a CPU: for a GPU export it with --quantize fp8, int8-sq, or int4 --target tensorrt, or without "
            "--quantize."
        )


def _check_notes(manifest: Manifest, where: str) -> None:
    """Check what tuning and the gate recorded, as far as readers use it."""
    for key, value in manifest.decoding.tuned.items():
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise DllmError(
                f"{where}: decoding.tuned: {key} is {shown(value)}, expected a number, a string or null: "
                f"tune it again."
            )
    measured = manifest.quantization.quality if manifest.quantization else None
    if measured is not None and (
        lacking := [key for key in _MEASURED if type(measured.get(key)) not in (int, float)]
    ):
        raise DllmError(
            f"{where}: quantization.quality: {lacking[0]} is {measured.get(lacking[0])!r}, expected a "
            f"number: {_AGAIN}."
        )


def _check_facts(manifest: Manifest, where: str) -> None:
    model, decoding = manifest.model, manifest.decoding
    if not any(name.endswith(".data") for name in manifest.files):
        raise DllmError(f"{where}: files lists no weights (*.data): {_AGAIN}.")
    for key, value in decoding.defaults.items():
        if type(value) is not int or not 1 <= value < 2**31:
            raise DllmError(
                f"{where}: decoding.defaults: {key} is {value!r}, expected a whole number from 1: {_AGAIN}."
            )
    for item in fields(model):
        value = getattr(model, item.name)
        if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value < 2**48:
            raise DllmError(
                f"{where}: model.{item.name} is {str(value)[:40]}, expected a whole number from 1: {_AGAIN}."
            )
    if manifest.quantization is not None and manifest.quantization.target not in TARGETS:
        raise DllmError(
            f"{where}: quantization.target is {manifest.quantization.target!r}, expected one of "
            f"{list(TARGETS)}: {_AGAIN}."
        )
    if decoding.sampling not in SAMPLINGS:
        raise DllmError(
            f"{where}: decoding.sampling is {decoding.sampling!r}, expected one of {list(SAMPLINGS)}."
        )
    for token in (decoding.mask_token_id, decoding.pad_token_id, *decoding.eos_token_ids):
        if not 0 <= token < model.vocab_size:
            raise DllmError(
                f"{where}: token id {token} is outside the vocabulary of {model.vocab_size}: {_AGAIN}."
            )
    if decoding.mask_token_id in decoding.eos_token_ids or decoding.logit_shift not in (0, 1):
        raise DllmError(
            f"{where}: mask token {decoding.mask_token_id}, end tokens {list(decoding.eos_token_ids)}, "
            f"logit_shift "
            f"{decoding.logit_shift}: expected a mask token that is not an end token, and a shift of 0 or 1: "
            f"{_AGAIN}."
        )
    if decoding.logit_shift and not decoding.first_commit:  # the row before a refine window would be needed
        raise DllmError(
            f"{where}: logit_shift is {decoding.logit_shift} without first_commit, which is not supported: "
            f"{_AGAIN}."
        )


def write(manifest: Manifest, artifact: Path) -> None:
    """Write (or atomically replace) the manifest of `artifact`."""
    text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}, indent=2)
    atomic.replace(artifact / FILE_NAME, (text + "\n").encode())


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
