"""Quantised exports: the unquantised model decodes the user's prompts, provides the calibration, and is the
standard that the quantised artifact is measured against before it is kept.

1. an fp32 twin of the checkpoint, in a temporary directory, decodes the prompts         (quality.expect)
2. if the scheme needs calibration, the twin runs on masked canvases of some prompts     (calibration.observe)
3. the quantised artifact is written, and measured before it is moved into place         (quality.measure)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import Manifest
from trt_runtime.backends import open_backend
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError, unknown
from trt_runtime.machine.devices import GIB, meminfo
from trt_runtime.machine.roofline import MEMORY_LAYOUTS, Work, memory
from trt_runtime.measure import examples
from trt_runtime.measure.examples import Example
from trt_runtime.model import Model
from trt_runtime.system.progress import SILENT
from trt_runtime.system.progress import Progress as Line

from .. import pipeline, schemes
from ..pipeline import ExportConfig, Progress, Source
from ..schemes.base import Calibration, Scheme
from . import calibration
from . import gate as quality
from .gate import Expected, Quality

_CALIBRATING = 32  # most prompts


@dataclass(frozen=True)
class QuantizeConfig:
    """How to quantise. scheme, target: see schemes.find. data: a file of prompts (examples.read); match: how
    answers are compared. gate: whether the result must pass; without it nothing is measured, and the manifest
    says so."""

    scheme: str
    target: str | None = None
    data: Path | None = None
    match: str = "exact"
    gate: bool = True


@dataclass(frozen=True)
class Prepared:
    """What the unquantised model provides: the calibration of a scheme, and the expectations for the
    quantised model."""

    calibration: Calibration | None = None
    calibrated_on: dict[str, Any] | None = None
    expected: Expected | None = None


def export(
    config: ExportConfig,
    how: QuantizeConfig,
    progress: Progress,
    note: Callable[[str], object] = lambda text: None,
    shown: Line = SILENT,
) -> Manifest:
    """Write a quantised artifact at `config.out`. note: called with the quality; shown: shows the progress.
    Raises DllmError, also if the gate is not passed, and then leaves nothing behind."""
    kind = schemes.find(how.scheme, how.target)
    _check(config, how, kind)
    source = config.read()
    pipeline.check_target(config, source.checkpoint.path)
    if how.data is not None and not (how.gate or kind.is_calibrated):
        note(f"{kind.name} needs no calibration and --gate no skips the measurement: --data is not used")
    prepared = (
        Prepared()
        if how.data is None
        else _prepare(config, how, source, kind, examples.read(how.data), shown)
    )
    scheme = kind(config.dtype, prepared.calibration)

    def complete(directory: Path, manifest: Manifest) -> Manifest:
        assert manifest.quantization is not None
        facts = replace(manifest.quantization, calibration=prepared.calibrated_on)
        if prepared.expected is not None:
            scheme_here = kind(_dtype_here(config), prepared.calibration)
            measured = _measure(directory, config, scheme_here, prepared.expected, how.match, shown)
            if missed := list(measured.failures()):
                raise DllmError(
                    f"{how.scheme} changes this model too much: {'; '.join(missed)}: nothing was written; "
                    "use another scheme, or skip this check with --gate no."
                )
            note(f"quality compared with the original model: {measured}")
            facts = replace(facts, quality=measured.as_dict())
        return replace(manifest, quantization=facts)

    return pipeline.export(config, progress, note, scheme, complete)


def _check(config: ExportConfig, how: QuantizeConfig, kind: type[Scheme]) -> None:
    if how.match not in examples.MATCHES:
        raise unknown("--match", how.match, examples.MATCHES)
    if config.dtype not in kind.dtypes:
        raise DllmError(
            f"--quantize {kind.name} for {kind.target} keeps everything else in {' or '.join(kind.dtypes)}, "
            f"but dtype is {config.dtype}: export with DTYPE={kind.dtypes[0]}."
        )
    if config.weights != "copy":
        raise DllmError(
            "--weights link cannot quantise, because it uses the checkpoint's files as they are: remove it."
        )
    if config.lowering != contract.MODERN:
        raise DllmError(
            "--quantize needs the modern lowering (opset 24): use ONNX Runtime 1.24 or newer, and remove "
            "--lowering."
        )
    if how.data is None and (how.gate or kind.is_calibrated):
        why = (
            "to calibrate its activations on"
            if kind.is_calibrated
            else "to measure the quality on (or skip that with --gate no)"
        )
        raise DllmError(
            f"--quantize {kind.name} needs prompts {why}: give a file of them with --data (DATA=...)."
        )


def _prepare(
    config: ExportConfig,
    how: QuantizeConfig,
    source: Source,
    kind: type[Scheme],
    examples: list[Example],
    shown: Line,
) -> Prepared:
    """Run an fp32 twin of the checkpoint on the prompts."""
    if not (how.gate or kind.is_calibrated):
        return Prepared()
    facts = pipeline.facts_of_source(source, "fp32")
    needed, free = (
        memory(facts, Work(1, min(1024, facts.max_length), 32), MEMORY_LAYOUTS[0], on_cpu=True).total,
        meminfo("MemAvailable"),
    )
    if free and needed > free:
        raise DllmError(
            f"measuring the quality runs the model in fp32: about {needed / GIB:.0f} GiB of memory, "
            f"{free / GIB:.0f} GiB are available: "
            "quantise on a larger machine" + ("." if kind.is_calibrated else ", or with --gate no.")
        )
    split = min(_CALIBRATING, (len(examples) + 1) // 2) if kind.is_calibrated else 0
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{config.out.name}.twin-", dir=config.out.parent) as temporary:
        twin = Path(temporary) / "fp32"
        with shown.task("writing the original model in fp32, for the comparison"):
            pipeline.export(
                replace(config, out=twin, dtype="fp32", head=contract.HEADS[0]),
                lambda total: lambda done: None,
            )
        model = _opened(twin)
        expected = quality.expect(model, examples[split:] or examples, shown) if how.gate else None
        base = GenerationConfig().resolved(model.manifest)
        decoded = quality.decode(model, examples[:split], base, shown, "decoding prompts to calibrate on")
        facts_of = model.manifest.decoding
        model.close()
        if not kind.is_calibrated:
            return Prepared(expected=expected)
        drawn = quality.canvases(decoded, facts_of.mask_token_id)
        observed = calibration.observe(twin, source, shown.each(drawn, "calibrating on canvases"))
    said = {"prompts": split, "canvases": len(drawn), "mask_ratios": list(quality.RATIOS)}
    return Prepared(observed, said, expected)


def _dtype_here(config: ExportConfig) -> str:
    """The dtype in which the quality is measured: ONNX Runtime has no bf16 on a CPU."""
    return "fp32" if config.dtype == "bf16" else config.dtype


def _measure(
    directory: Path, config: ExportConfig, scheme: Scheme, expected: Expected, match: str, shown: Line
) -> Quality:
    """Measure the artifact in `directory` or, if it cannot run here, an equivalent one in fp32."""
    if scheme.dtype == config.dtype:
        return _judged(directory, expected, match, shown)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        twin = Path(temporary) / scheme.dtype
        pipeline.export(
            replace(config, out=twin, dtype=scheme.dtype), lambda total: lambda done: None, scheme=scheme
        )
        return _judged(twin, expected, match, shown)


def _judged(artifact: Path, expected: Expected, match: str, shown: Line) -> Quality:
    model = _opened(artifact)
    measured = quality.measure(model, expected, match, shown)
    model.close()
    return measured


def _opened(artifact: Path) -> Model:
    parameters = manifests.load(artifact).model.parameters
    return Model(artifact, open_backend("ort", artifact, threads=quality.threads_of(parameters)))
