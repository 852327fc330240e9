"""The command line of the exporter: options -> ExportConfig -> pipeline, with its progress and the
verification after it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import TARGETS, Manifest, ModelFacts
from trt_runtime.cli import next_steps
from trt_runtime.cli import parser as cli_parser
from trt_runtime.cli.parser import note, progress_of, report, say
from trt_runtime.errors import DllmError
from trt_runtime.machine.devices import GIB, meminfo
from trt_runtime.machine.forecast import MEMORY_LAYOUTS, Work, memory
from trt_runtime.measure.examples import MATCHES
from trt_runtime.system import atomic, commands, program
from trt_runtime.system.progress import SILENT, Progress

from . import families, uptodate
from .graph.lowering import LOWERINGS
from .pipeline import ExportConfig, export, read
from .quantize import export as quantize
from .schemes import NAMES
from .weights.plan import MODES

_FOR_CPU = "DTYPE=fp32 (--dtype fp32), or QUANTIZE=w8a8 (--quantize w8a8)"
# what is exported without --checkpoint, and what it is
DEMO_CHECKPOINTS = {
    "llada": ("checkpoints/llada-demo", "the demo checkpoint"),
    "dream": ("tests/data/goldens/dream_tiny", "a tiny random checkpoint (no text to expect of it)"),
}


def main(argv: list[str] | None = None, *, prog: str = "python -m export") -> int:
    """Run the exporter; returns the exit status. `prog`: the command as it was typed."""
    mend = "nothing was written; check the disk and the rights"
    return program.run(lambda words: _main(words, prog), argv, aftermath="nothing was written", advice=mend)


def _main(argv: list[str] | None, prog: str) -> int:
    args = _parser(prog).parse_args(argv)
    atomic.end_on_signals()  # so that the temporary directory is removed
    return cli_parser.execute(args)


def _parser(prog: str = "python -m export") -> argparse.ArgumentParser:
    parser = cli_parser.Parser(
        prog=prog,
        description="Export a diffusion LLM's checkpoint to an artifact: two ONNX graphs over one weights "
        "file.",
        epilog=f"models: {', '.join(families.names())}. Without --checkpoint the demo checkpoint of the "
        f"model is exported.\n\n"
        f"example:\n  {prog} --model llada --checkpoint GSAI-ML/LLaDA-8B-Instruct --dtype bf16",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("--version", action=cli_parser.Version)
    parser.add_argument("--model", help="the model type; checked against the checkpoint's config.json")
    parser.add_argument(
        "--checkpoint",
        help="a checkpoint directory (config.json, *.safetensors), or a hub id org/name[@revision]",
    )
    parser.add_argument("--out", type=Path, help="the artifact directory to write (default artifacts/NAME)")
    parser.add_argument(
        "--dtype", choices=list(contract.DTYPES), default="fp32", help="of weights and caches (default fp32)"
    )
    parser.add_argument(
        "--head",
        choices=contract.HEADS,
        default="statistics",
        help="'logits' adds the logits to the outputs; ONNX Runtime has them anyway (default statistics)",
    )
    parser.add_argument(
        "--lowering",
        choices=("auto", *LOWERINGS),
        default="auto",
        help="'modern' is opset 24, 'legacy' opset 17; 'auto' is modern unless the ONNX Runtime here is "
        "older than 1.24",
    )
    parser.add_argument(
        "--ignore-key",
        action="append",
        default=[],
        metavar="KEY",
        help="a key of config.json that is not known and does not change the computation (may be repeated)",
    )
    parser.add_argument(
        "--mask-token",
        metavar="TOKEN",
        help="the mask token, as its text or its id, where neither config.json nor the tokenizer names it, "
        "or names another",
    )
    parser.add_argument(
        "--weights",
        choices=MODES,
        default="copy",
        help="'link' uses the checkpoint's own files where they lie (same dtype), in seconds and without a "
        "copy (default copy)",
    )
    parser.add_argument(
        "--quantize",
        choices=NAMES,
        help="linear layers in fewer bits: w8a8 or int4 on a CPU, fp8, int8-sq or int4 with TensorRT; "
        "judged with --data",
    )
    parser.add_argument(
        "--target", choices=TARGETS, help="of --quantize int4, which both have (default ort-cpu)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="of --quantize: a prompt a line, or lines of JSON with prompt and answers, to calibrate and "
        "judge it on",
    )
    parser.add_argument(
        "--match",
        choices=MATCHES,
        default="exact",
        help="of --data: how answers are compared: exact (default), or json: values",
    )
    parser.add_argument(
        "--gate",
        choices=("yes", "no"),
        default="yes",
        help="of --quantize: 'no' leaves out the measurement of its quality (default yes)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an artifact that is there already")
    parser.add_argument(
        "--verify",
        choices=("auto", "yes", "no"),
        default="auto",
        help="compare with PyTorch afterwards; 'auto' (default) does so if torch and transformers are there "
        "and the memory suffices",
    )
    cli_parser.add_output(parser, "what was exported, and the verification,")
    return parser


def _run(args: argparse.Namespace) -> int:
    checkpoint = args.checkpoint if args.checkpoint is not None else _demo_checkpoint(args)
    suffix = f"-{args.quantize}" if args.quantize else ""
    out = args.out or Path("artifacts") / (_name_of(checkpoint) + suffix)
    config = ExportConfig(
        checkpoint,
        out,
        args.dtype,
        args.head,
        _lowering(args.lowering, lambda line: say(args, line)),
        args.model,
        tuple(args.ignore_key),
        args.overwrite,
        args.weights,
        args.mask_token,
    )
    can_verify = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    if args.verify == "yes" and not can_verify:
        raise DllmError(
            f"--verify yes needs torch and transformers: {commands.install('reference')}, or leave it out."
        )
    how, begin = _quantize_config(args), time.perf_counter()
    inputs = uptodate.inputs_of(config, how)
    manifest = None if args.overwrite else uptodate.current(out, inputs)
    is_new = manifest is None
    if manifest is not None:
        read(config.checkpoint, config.family, config.ignored_keys)  # --model must still be the checkpoint's
        say(
            args,
            f"{out}: up to date: made by this version from the same files and options; OVERWRITE=1 "
            f"(--overwrite) makes it again",
        )
    else:
        if args.dtype == "bf16" and how is None:
            note(
                args,
                f"note: ONNX Runtime computes no bf16 on a CPU: this artifact is for TensorRT; for a CPU "
                f"export {_FOR_CPU}",
            )
        with progress_of(args).task(f"exporting {checkpoint}"):
            manifest = uptodate.noted(_export(config, how, args), inputs, out)
    size, seconds = sum(facts.size for facts in manifest.files.values()), time.perf_counter() - begin
    if is_new:
        say(
            args,
            f"{out}: {manifest.model.parameters / 1e6:,.1f} M parameters, {args.dtype}, {size / 1e6:,.1f} "
            f"MB, {seconds:.1f} s",
        )
    made = {
        "artifact": str(out),
        "is_new": is_new,
        "parameters": manifest.model.parameters,
        "dtype": args.dtype,
        "bytes": size,
        "seconds": seconds,
        "quantization": None if manifest.quantization is None else asdict(manifest.quantization),
    }
    try:
        passed, verified = _verified(args, out, manifest, can_verify)
    except KeyboardInterrupt:
        print(f"interrupted: {out} is written, and not verified", file=sys.stderr)
        return program.INTERRUPTED
    if args.json:
        report(args, made | {"verified": verified}, "")
    if passed:
        cli_parser.hint(args, lambda: next_steps.of_artifact(out, manifest))
    return 0 if passed else 1


def _verified(
    args: argparse.Namespace, out: Path, manifest: Manifest, can_verify: bool
) -> tuple[bool, dict[str, Any] | None]:
    """Verify what was exported, if that was asked for and is possible; whether nothing failed, and what was
    found."""
    if manifest.verified is not None:
        passed = bool(manifest.verified.get("passed"))
        say(
            args,
            "verified before: the result is in the manifest"
            if passed
            else "NOT VERIFIED before: do not deploy this artifact",
        )
        return passed, manifest.verified
    if args.verify == "no":
        return True, None
    if not can_verify:
        say(args, f"not verified: torch and transformers are not installed ({commands.install('reference')})")
        return True, None
    needed, free = _verification_bytes(manifest.model), meminfo("MemAvailable")
    if args.verify == "auto" and free and needed > free and manifest.quantization is None:
        say(
            args,
            f"not verified: it would take about {needed / GIB:.0f} GiB of memory, {free / GIB:.0f} GiB are "
            f"available: run "
            f"'{commands.command('verify', out)}' on a larger machine, or add --verify yes",
        )
        return True, None
    return verify(out, None, say=lambda line: say(args, line), progress=progress_of(args))


def _quantize_config(args: argparse.Namespace) -> quantize.QuantizeConfig | None:
    if args.quantize is not None:
        return quantize.QuantizeConfig(args.quantize, args.target, args.data, args.match, args.gate == "yes")
    for name, default in (("target", None), ("data", None), ("match", "exact"), ("gate", "yes")):
        if getattr(args, name) != default:
            raise DllmError(f"--{name} goes with --quantize: leave it out, or say how to quantise.")
    return None


def _export(config: ExportConfig, how: quantize.QuantizeConfig | None, args: argparse.Namespace) -> Manifest:
    shown = progress_of(args)

    def tell(text: str) -> None:
        note(args, f"note: {text}")

    if how is not None:
        return quantize.export(config, how, _weights_progress(shown), tell, shown)
    return export(config, _weights_progress(shown), tell)


def _verification_bytes(facts: ModelFacts) -> int:
    """Memory of a verification: the reference in fp32, and ONNX Runtime beside it."""
    dtype = "fp32" if facts.dtype == "bf16" else facts.dtype  # by a twin
    work = Work(batch=2, length=64, block_length=32)
    return sum(
        memory(replace(facts, dtype=kind), work, layout, on_cpu=True).total
        for kind, layout in ((dtype, MEMORY_LAYOUTS[0]), ("fp32", MEMORY_LAYOUTS[-1]))
    )


def _name_of(checkpoint: str) -> str:
    """A directory's own name, or the model's part of a hub id."""
    return (
        Path(checkpoint).resolve().name
        if Path(checkpoint).is_dir()
        else checkpoint.rpartition("/")[2].split("@")[0]
    )


def verify_layers(
    artifact: Path,
    checkpoint: str | None,
    *,
    say: Callable[[str], object] = print,
    progress: Progress = SILENT,
) -> tuple[bool, dict[str, Any]]:
    """Say the residual stream beside the reference's, layer by layer; whether all agree, and the rows of each
    kind of forward."""
    from .parity.bisect import table
    from .parity.verify import bisect

    with progress.task(f"comparing the layers of {artifact} with PyTorch's"):
        tables = bisect(artifact, checkpoint)
    for kind, rows in tables.items():
        say(f"{kind}: residual stream after each layer, beside PyTorch's")
        for line in table(rows):
            say(f"  {line}")
    bad = [f"{kind}: {row.name}" for kind, rows in tables.items() for row in rows if not row.passed]
    say(f"it begins at {bad[0]}" if bad else "all layers agree")
    layers = {kind: [asdict(row) | {"passed": row.passed} for row in rows] for kind, rows in tables.items()}
    return not bad, {
        "artifact": str(artifact),
        "passed": not bad,
        "first": bad[0] if bad else None,
        "layers": layers,
    }


def verify(
    artifact: Path,
    checkpoint: str | None,
    *,
    say: Callable[[str], object] = print,
    progress: Progress = SILENT,
    with_polygraphy: bool = False,
) -> tuple[bool, dict[str, Any]]:
    """Run the verification and say its stages; whether all passed, and what the manifest says of it."""
    with program.importing(), progress.task("loading PyTorch"):
        from .parity.verify import verify as run_verification

    passed, is_quantised = True, manifests.load(artifact).quantization is not None
    say(f"verifying {artifact} against {'its checkpoint' if is_quantised else 'the PyTorch reference'}")
    with progress.task("hashing the artifact's files") as task:
        for stage in run_verification(artifact, checkpoint, task.doing, with_polygraphy=with_polygraphy):
            say(f"  {stage}")
            passed = passed and stage.passed
    where = "" if is_quantised else f"; 'dllm-trt verify {artifact} --layers' shows where it begins"
    say(
        "verified: the result is in the manifest"
        if passed
        else f"NOT VERIFIED: do not deploy this artifact{where}"
    )
    return passed, {"artifact": str(artifact), **(manifests.load(artifact).verified or {})}


def _lowering(asked: str, say: Callable[[str], object] = print) -> str:
    if asked != "auto":
        return asked
    try:
        major, minor = importlib.metadata.version("onnxruntime").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return "modern"
    if (int(major), int(minor)) >= (1, 24):
        return "modern"
    say(f"onnxruntime {major}.{minor} has no opset 24: exporting with --lowering legacy (opset 17)")
    return "legacy"


def _demo_checkpoint(args: argparse.Namespace) -> str:
    name = (args.model or "llada").lower()
    if name not in DEMO_CHECKPOINTS:
        families.find(name)  # names what exists if the model is unknown
        raise DllmError(f"no demo checkpoint for '{name}': give one with CHECKPOINT=dir (--checkpoint).")
    path, title = DEMO_CHECKPOINTS[name]
    root = commands.checkout()
    if root is None and not Path(path).exists():
        raise DllmError(
            f"no checkpoint: give one with --checkpoint ({title} is a part of the repository, {path}, not of the wheel)."
        )
    shown = path if root is None or Path(path).exists() else str(root / path)
    say(args, f"no checkpoint given: exporting {title} {shown}")
    return shown


def _weights_progress(progress: Progress) -> Callable[[int], Callable[[int], object]]:
    """How far the weights are, for the pipeline: it is told their bytes, and then those that are done."""

    def begin(total: int) -> Callable[[int], object]:
        task = progress.begin("weights", total, unit="B")

        def advance(done: int) -> None:
            task.advance(done)
            if task.done >= total:
                task.end()

        return advance

    return begin
