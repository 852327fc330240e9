"""The steps of an export, in order: read, plan, build, lint, stream, seal. Nothing half-made is ever left
behind."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from trt_runtime import __version__
from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import (
    DecodingFacts,
    FileFacts,
    GraphFacts,
    Manifest,
    ModelFacts,
    Quantization,
)
from trt_runtime.artifact.tokenizer import Tokenizer
from trt_runtime.errors import DllmError
from trt_runtime.system import atomic

from . import families
from .checkpoint import huggingface as checkpoints
from .checkpoint import token_names
from .checkpoint import tokenizer as tokenizer_files
from .checkpoint.huggingface import Checkpoint
from .families.base import ConfigReader, Family
from .graph import lint, roles
from .graph import lowering as lowerings
from .graph.decoder import DecoderConfig, weight_shapes
from .graph.linears import Linears
from .schemes.base import Scheme
from .weights import plan as weights
from .weights import stream

Progress = Callable[[int], Callable[[int], object]]


@dataclass(frozen=True)
class ExportConfig:
    """What to export and how. `checkpoint` is a directory or a hub id; `out` the artifact to write.

    weights: 'copy' streams them into weights.data; 'link' uses the checkpoint's own files where they lie.
    mask_token: the mask token, as its text or its id, for a checkpoint that does not name it, or names
    another.
    """

    checkpoint: str
    out: Path
    dtype: str = "fp32"
    head: str = "statistics"
    lowering: str = contract.MODERN
    family: str | None = None
    ignored_keys: tuple[str, ...] = ()
    overwrite: bool = False
    weights: str = "copy"
    mask_token: str | None = None


@dataclass(frozen=True)
class Source:
    """A checkpoint that was read and understood. mask_token: its id, where it was given and not found. notes:
    what a user should know."""

    checkpoint: Checkpoint
    family: Family
    decoder: DecoderConfig
    decoding: DecodingFacts
    mask_token: int | None = None
    notes: tuple[str, ...] = ()


def read(
    name: str, family: str | None = None, ignored_keys: tuple[str, ...] = (), mask_token: str | None = None
) -> Source:
    """Locate a checkpoint and understand its config. `family`, where given, must be the checkpoint's own;
    `mask_token` comes before the one that the checkpoint names."""
    source = checkpoints.load(*checkpoints.locate(name))
    where = str(source.path / "config.json")
    found, reader, decoder = understood(source.config, where)
    if family is not None and families.find(family) is not found:
        model_type = source.config["model_type"]
        raise DllmError(
            f"{where}: model_type is '{model_type}', but MODEL={family} was asked for: give "
            f"MODEL={model_type.lower()}."
        )
    named = token_names.find(source, decoder.vocab_size, mask_token)
    decoding, notes = _decoding(found, reader, decoder, source.generation_config, named.ids, ignored_keys)
    given = None if mask_token is None else decoding.mask_token_id
    return Source(source, found, decoder, decoding, given, (*source.notes, *notes, *named.notes))


def _decoding(
    family: Family,
    reader: ConfigReader,
    decoder: DecoderConfig,
    generation_config: Mapping[str, Any],
    ids: Mapping[str, Any],
    ignored_keys: tuple[str, ...],
) -> tuple[DecodingFacts, list[str]]:
    """How a model decodes, with the token `ids` that its config lacks; every key is accounted for, with a
    note on the ignored ones."""
    reader.supply(ids)
    decoding = family.decoding(reader, generation_config)
    noted = reader.finish(ignored_keys)
    if decoding.mask_token_id in decoding.eos_token_ids:
        raise DllmError(
            f"{reader.where}: mask_token_id {decoding.mask_token_id} is also an end token: take the "
            f"config.json of the checkpoint, or "
            "give the mask with --mask-token."
        )
    for token in (decoding.mask_token_id, decoding.pad_token_id, *decoding.eos_token_ids):
        if token >= decoder.vocab_size:
            raise DllmError(
                f"{reader.where}: token id {token} is outside the vocabulary of {decoder.vocab_size}."
            )
    said = f"config.json: ignored, as it does not change what the model computes: {', '.join(noted)}"
    return decoding, [said] if noted else []


def facts_of_checkpoint(name: str, dtype: str, ignored_keys: tuple[str, ...] = ()) -> ModelFacts:
    """The model of a checkpoint (a directory or hub id) from its configuration alone. What an export would
    refuse of it is refused here; a token that it does not name may be the tokenizer's, and is not asked for.
    Raises DllmError."""
    return checked_facts(*checkpoints.config_of(name), dtype, ignored_keys)


def checked_facts(
    config: dict[str, Any],
    generation_config: dict[str, Any],
    where: str,
    dtype: str,
    ignored_keys: tuple[str, ...] = (),
) -> ModelFacts:
    """The same of a configuration that was read already; `where` names it in errors."""
    family, reader, decoder = understood(config, where)
    token_names.check_agreed(config, generation_config, where)
    named = [held.get(key) for key in token_names.KEYS for held in (config, generation_config)]
    taken = [token for value in named for token in (value if isinstance(value, list) else [value])]
    free = (token for token in itertools.count() if token not in taken)
    ids = {key: next(free) for key in token_names.missing(config, generation_config)}
    if config.get(token_names.MASK) is None and generation_config.get(token_names.MASK) is not None:
        ids[token_names.MASK] = generation_config[token_names.MASK]
    _decoding(family, reader, decoder, generation_config, ids, ignored_keys)
    return facts_of_config(decoder, config, dtype)


def decoding_of(source: Source, tokenizer: Tokenizer) -> DecodingFacts:
    """How a checkpoint decodes with its tokenizer. Raises DllmError."""
    is_given = source.mask_token is not None
    return tokenizer_files.completed(
        source.decoding, tokenizer, source.decoder.vocab_size, mask_is_given=is_given
    )


def facts_of_source(source: Source, dtype: str) -> ModelFacts:
    """What a manifest says of the network of a checkpoint."""
    return facts_of_config(source.decoder, source.checkpoint.config, dtype)


def understood(config: dict[str, Any], where: str) -> tuple[Family, ConfigReader, DecoderConfig]:
    """The family of a config.json, its reader, and the network. Raises DllmError."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise DllmError(
            f"{where}: model_type is {model_type!r}, expected one of {', '.join(families.names())}."
        )
    family, reader = families.find(model_type), ConfigReader(config, where)
    decoder = family.decoder(reader)
    _check_sizes(decoder, where)
    return family, reader, decoder


def export(
    config: ExportConfig,
    progress: Progress,
    note: Callable[[str], object] = lambda text: None,
    scheme: Scheme | None = None,
    complete: Callable[[Path, Manifest], Manifest] = lambda directory, manifest: manifest,
) -> Manifest:
    """Write the artifact at `config.out`. `progress(total)` gives a function that is told bytes written;
    `note` is told in a sentence what a user should know of an export that succeeded. `scheme` quantises
    linear layers. `complete` is given the artifact, whole but not yet in its place, and its manifest, and
    returns the final one; what it raises undoes the export."""
    source = read(config.checkpoint, config.family, config.ignored_keys, config.mask_token)
    for text in source.notes:
        note(text)
    check_target(config, source.checkpoint.path)
    planned = weights.plan(
        source.decoder, source.family, source.checkpoint, config.dtype, config.weights, scheme
    )
    with atomic.sealed(config.out, overwrite=config.overwrite) as directory:
        for role in contract.ROLES:
            _write_graph(role, source, config, planned, directory, scheme)
        written = stream.stream(planned, directory, progress(weights.total_size(planned)))
        if scheme is not None and scheme.is_calibrated:
            scheme.calibration.write(directory)
        tokenizer = tokenizer_files.assemble(source.checkpoint.path, directory / "tokenizer")
        if tokenizer is not None:
            source = replace(source, decoding=decoding_of(source, tokenizer))
        else:
            note(tokenizer_files.note(source.checkpoint.path))
        if config.dtype == "fp16" and (near := stream.near_fp16(written.maxima)):
            note(near)
        _check_graphs(directory, written.files)
        manifest = _manifest(source, config, directory, written, scheme)
        manifests.write(manifest, directory)
        completed = complete(directory, manifest)
        if completed is not manifest:
            manifests.write(completed, directory)
    return completed


def _check_sizes(decoder: DecoderConfig, where: str) -> None:
    most = {"layers": (decoder.num_layers, 10_000), "positions": (decoder.max_length, 1 << 22)}
    for what, (value, limit) in most.items():
        if value > limit:
            raise DllmError(
                f"{where}: {value} {what}, supported are up to {limit}: take the config.json of the "
                f"checkpoint."
            )
    if decoder.vocab_size < 4:
        raise DllmError(f"{where}: a vocabulary of {decoder.vocab_size}, expected 4 tokens or more.")
    attention = decoder.attention
    if (
        decoder.hidden_size % attention.num_heads
        or attention.num_heads % attention.num_kv_heads
        or attention.head_dim % 2
    ):
        raise DllmError(
            f"{where}: hidden size {decoder.hidden_size}, {attention.num_heads} heads and "
            f"{attention.num_kv_heads} KV heads do not "
            "divide one another (heads must divide the hidden size, KV heads the heads, and head_dim be "
            "even)."
        )


def check_target(config: ExportConfig, checkpoint: Path) -> None:
    """Raise DllmError unless an export may write to `config.out`."""
    out = config.out
    if checkpoint.resolve() == out.resolve() or out.resolve() in checkpoint.resolve().parents:
        raise DllmError(f"{out}: is the checkpoint's own directory, or holds it: choose another OUT.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / manifests.FILE_NAME).is_file():
        raise DllmError(
            f"{out}: exists and is not an artifact: it is left alone; choose another OUT or remove it."
        )
    if not config.overwrite:
        raise DllmError(
            f"{out}: an artifact already exists: add --overwrite to replace it, or choose another OUT."
        )
    for own in manifests.foreign_files(out):
        raise DllmError(
            f"{out}: holds {own}, which no export wrote: it is left alone; choose another OUT or remove it."
        )


def graph_of(
    role: str,
    source: Source,
    dtype: str,
    head: str,
    lowering: str,
    planned: list[weights.Weight],
    linears: Linears | None = None,
) -> ir.Model:
    """The graph of a role for a checkpoint, its weights where they are planned, its linear layers as
    `linears` spells them."""
    return roles.build(
        role,
        source.decoder,
        dtype=dtype,
        head=head,
        mask_token_id=source.decoding.mask_token_id,
        lowering=lowering,
        weights={weight.name: weight.external() for weight in planned},
        linears=linears,
    )


def _write_graph(
    role: str,
    source: Source,
    config: ExportConfig,
    planned: list[weights.Weight],
    directory: Path,
    scheme: Scheme | None = None,
) -> None:
    model = graph_of(role, source, config.dtype, config.head, config.lowering, planned, scheme)
    operators = frozenset[str]() if scheme is None else scheme.operators
    lint.check(
        model, role, roles.dims_of(source.decoder, config.dtype, config.lowering), config.head, operators
    )
    ir.save(model, directory / f"{role}.onnx")


def _check_graphs(directory: Path, data: Iterable[str]) -> None:
    """Run the ONNX checker by path, which never loads the weights. It takes no file with several hard links
    for external data (a linked one has), so it sees empty files of the same size in their place."""
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        for name in data:
            with open(Path(temporary) / name, "wb") as file:
                file.truncate((directory / name).stat().st_size)
        for role in contract.ROLES:
            path = Path(temporary) / f"{role}.onnx"
            shutil.copyfile(directory / f"{role}.onnx", path)
            onnx.checker.check_model(path, full_check=True)


def facts_of_config(decoder: DecoderConfig, config: dict[str, Any], dtype: str) -> ModelFacts:
    """What a manifest says of a network."""
    return ModelFacts(
        family=config["model_type"].lower(),
        num_layers=decoder.num_layers,
        num_heads=decoder.attention.num_heads,
        num_kv_heads=decoder.attention.num_kv_heads,
        head_dim=decoder.attention.head_dim,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.feed_forward.intermediate_size,
        vocab_size=decoder.vocab_size,
        max_length=decoder.max_length,
        dtype=dtype,
        parameters=sum(math.prod(shape) for shape in weight_shapes(decoder).values()),
        tied_head=decoder.tied_head,
    )


def _manifest(
    source: Source,
    config: ExportConfig,
    directory: Path,
    written: stream.StreamedWeights,
    scheme: Scheme | None,
) -> Manifest:
    decoder, checkpoint = source.decoder, source.checkpoint
    dims = roles.dims_of(decoder, config.dtype, config.lowering)
    files = dict(written.files)
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in files:
            files[name] = FileFacts(path.stat().st_size, manifests.sha256_of(path))
    described = {
        role: GraphFacts(
            f"{role}.onnx",
            [[spec.name, spec.dtype, list(spec.axes)] for spec in contract.inputs(role, dims)],
            [[spec.name, spec.dtype, list(spec.axes)] for spec in contract.outputs(role, dims, config.head)],
        )
        for role in contract.ROLES
    }
    facts = facts_of_config(decoder, checkpoint.config, config.dtype)
    if scheme is not None:
        facts = replace(facts, weight_bytes=written.files[weights.FILE_NAME].size)
    versions = {name: importlib.metadata.version(name) for name in ("onnx", "onnx-ir", "onnxscript", "numpy")}
    return Manifest(
        producer={"dllm-trt": __version__, "python": platform.python_version(), **versions},
        source={
            "checkpoint": f"{config.checkpoint.split('@')[0]}@{checkpoint.revision}"
            if checkpoint.revision
            else str(checkpoint.path.resolve()),
            "ignored_keys": list(config.ignored_keys),
            **({} if source.mask_token is None else {"mask_token": source.mask_token}),
            "revision": checkpoint.revision,
            "config_sha256": manifests.sha256_of(checkpoint.path / "config.json"),
        },
        model=facts,
        decoding=source.decoding,
        head=config.head,
        lowering=config.lowering,
        opset=lowerings.find(config.lowering).OPSET,
        graphs=described,
        files=files,
        tokenizer="tokenizer" if (directory / "tokenizer").is_dir() else None,
        weight_maxima=written.maxima,
        quantization=None if scheme is None else Quantization(scheme.name, scheme.target),
    )
