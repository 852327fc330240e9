"""The steps of an export, in order: read, plan, build, lint, stream, seal. A failed export leaves nothing
behind."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_ir as ir

from trt_runtime import __version__
from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import ORT_CPU, FileFacts, GraphFacts, Manifest, Quantization
from trt_runtime.errors import DllmError
from trt_runtime.system import atomic

from .checkpoint import tokenizer as tokenizer_files
from .graph import lint, roles
from .graph import lowering as lowerings
from .graph.linears import FusedLinears, Linears
from .schemes.base import Scheme
from .source import (
    Source,
    checked_facts,
    decoding_of,
    facts_of_checkpoint,
    facts_of_config,
    facts_of_source,
    read,
    understood,
)
from .weights import plan as weights
from .weights import stream

__all__ = [
    "ExportConfig",
    "Source",
    "checked_facts",
    "decoding_of",
    "export",
    "facts_of_checkpoint",
    "facts_of_config",
    "facts_of_source",
    "read",
    "understood",
]

Progress = Callable[[int], Callable[[int], object]]


@dataclass(frozen=True)
class ExportConfig:
    """What to export and how. checkpoint: a directory or a hub id; out: the artifact to write.

    weights: 'copy' streams them into weights.data; 'link' uses the checkpoint's own files in place.
    mask_token: as text or id, for a checkpoint that does not name it or names the wrong one.
    attention: of manifest.ATTENTIONS, for a checkpoint whose config does not say. block_length: of
    block-causal attention, for a checkpoint whose config does not say, or says it wrong. target: 'ort-cpu'
    computes experts by ONNX Runtime's own operator; None: by standard ones.
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
    attention: str | None = None
    block_length: int | None = None
    target: str | None = None

    def read(self) -> Source:
        """The checkpoint, read. Raises DllmError."""
        return read(
            self.checkpoint,
            self.family,
            self.ignored_keys,
            self.mask_token,
            self.attention,
            self.block_length,
        )


def export(
    config: ExportConfig,
    progress: Progress,
    note: Callable[[str], object] = lambda text: None,
    scheme: Scheme | None = None,
    complete: Callable[[Path, Manifest], Manifest] = lambda directory, manifest: manifest,
) -> Manifest:
    """Write the artifact at `config.out` and return its manifest. Raises DllmError.

    progress: called with the total bytes, returns a function to call with the bytes written. note: called
    with a sentence that the user should know about a successful export. scheme: quantises linear layers.
    complete: called with the complete artifact, before it is moved into place, and its manifest; returns the
    final manifest, and undoes the export by raising.
    """
    source = config.read()
    for text in source.notes:
        note(text)
    check_target(config, source.checkpoint.path)
    source, linears = _for_target(config, source, scheme)
    planned = weights.plan(
        source.decoder, source.family, source.checkpoint, config.dtype, config.weights, scheme
    )
    with atomic.sealed(config.out, overwrite=config.overwrite) as directory:
        for role in contract.ROLES:
            _write_graph(role, source, config, planned, directory, linears)
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


def _for_target(config: ExportConfig, source: Source, scheme: Scheme | None) -> tuple[Source, Linears | None]:
    """The source with its experts in the form of ONNX Runtime's own operator, if that is wanted, and what
    builds its linear layers. Raises DllmError."""
    if scheme is not None:
        return (source.fused() if scheme.fuses_experts else source), scheme
    if config.target != ORT_CPU:
        return source, None
    if facts_of_source(source, config.dtype).experts is None:
        raise DllmError(
            f"--target {ORT_CPU} without --quantize is for models with a mixture of experts: remove it."
        )
    if config.dtype == "bf16":
        raise DllmError(f"--target {ORT_CPU} computes in fp32 or fp16, got bf16: export with DTYPE=fp32.")
    return source.fused(), FusedLinears()


def check_target(config: ExportConfig, checkpoint: Path) -> None:
    """Raise DllmError unless an export may write to `config.out`."""
    out = config.out
    if checkpoint.resolve() == out.resolve() or out.resolve() in checkpoint.resolve().parents:
        raise DllmError(f"{out}: is the checkpoint's own directory, or contains it: choose another OUT.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / manifests.FILE_NAME).is_file():
        raise DllmError(f"{out}: exists and is not an artifact: choose another OUT, or remove it yourself.")
    if not config.overwrite:
        raise DllmError(
            f"{out}: an artifact already exists: add --overwrite to replace it, or choose another OUT."
        )
    for own in manifests.foreign_files(out):
        raise DllmError(
            f"{out}: contains {own}, which no export wrote: choose another OUT, or remove it yourself."
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
    """The graph of a role for a checkpoint, with its weights at their planned offsets and its linear layers
    built by `linears`."""
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
    linears: Linears | None = None,
) -> None:
    model = graph_of(role, source, config.dtype, config.head, config.lowering, planned, linears)
    operators = frozenset[str]() if linears is None else linears.operators
    lint.check(
        model, role, roles.dims_of(source.decoder, config.dtype, config.lowering), config.head, operators
    )
    ir.save(model, directory / f"{role}.onnx")


def _check_graphs(directory: Path, data: Iterable[str]) -> None:
    """Run the ONNX checker by path, so that it loads no weights. It refuses external data with several hard
    links (as linked files have), so it is shown sparse files of the same sizes instead."""
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        for name in data:
            with open(Path(temporary) / name, "wb") as file:
                file.truncate((directory / name).stat().st_size)
        for role in contract.ROLES:
            path = Path(temporary) / f"{role}.onnx"
            shutil.copyfile(directory / f"{role}.onnx", path)
            onnx.checker.check_model(path, full_check=True)


def _manifest(
    source: Source,
    config: ExportConfig,
    directory: Path,
    written: stream.StreamedWeights,
    scheme: Scheme | None,
) -> Manifest:
    checkpoint = source.checkpoint
    dims = roles.dims_of(source.decoder, config.dtype, config.lowering)
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
    facts = facts_of_source(source, config.dtype)
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
            **({} if source.attention is None else {"attention": source.attention}),
            **({} if source.block_length is None else {"block_length": source.block_length}),
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
