"""The command line of the exporter (`make export`, `dllm-trt export`, `python -m export`): export, then
verify."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trt_runtime.artifact.manifest import Manifest
from trt_runtime.cli import next_steps
from trt_runtime.cli import parser as cli_parser
from trt_runtime.cli.parser import note, progress_of, report, say
from trt_runtime.errors import DllmError
from trt_runtime.machine.devices import GIB, meminfo
from trt_runtime.system import atomic, commands, program
from trt_runtime.system.progress import Progress

from . import options, uptodate
from .parity.report import memory_needed, verify
from .pipeline import ExportConfig, export, read
from .quantize import export as quantize

_FOR_CPU = "DTYPE=fp32 (--dtype fp32), or QUANTIZE=w8a8 (--quantize w8a8)"


def main(argv: list[str] | None = None, *, prog: str = "python -m export") -> int:
    """Run the exporter; returns the exit status. prog: the command as it was typed."""
    advice = "nothing was written; check disk space and permissions"
    return program.run(lambda words: _main(words, prog), argv, aftermath="nothing was written", advice=advice)


def _main(argv: list[str] | None, prog: str) -> int:
    parser = options.build_parser(prog)
    parser.set_defaults(run=_run)
    args = parser.parse_args(argv)
    atomic.end_on_signals()  # so that the temporary directory is removed
    return cli_parser.execute(args)


def _run(args: argparse.Namespace) -> int:
    config = options.config_of(args)
    can_verify = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    if args.verify == "yes" and not can_verify:
        raise DllmError(
            f"--verify yes needs torch and transformers: {commands.install('reference')}, or leave it out."
        )
    manifest, facts = _exported(args, config)
    try:
        passed, verified = _verified(args, config.out, manifest, can_verify)
    except KeyboardInterrupt:
        print(f"interrupted: {config.out} was written but not verified", file=sys.stderr)
        return program.INTERRUPTED
    if args.json:
        report(args, facts | {"verified": verified}, "")
    if passed:
        cli_parser.hint(args, lambda: next_steps.of_artifact(config.out, manifest))
    return 0 if passed else 1


def _exported(args: argparse.Namespace, config: ExportConfig) -> tuple[Manifest, dict[str, Any]]:
    """Export, unless the artifact is up to date; returns its manifest, and what --json prints."""
    how, begin = options.quantization_of(args), time.perf_counter()
    out, inputs = config.out, uptodate.inputs_of(config, how)
    manifest = None if args.overwrite else uptodate.current(out, inputs)
    is_new = manifest is None
    if manifest is not None:
        read(config.checkpoint, config.family, config.ignored_keys)  # --model must still be the checkpoint's
        say(
            args,
            f"{out}: up to date: exported by this version from the same files and options; OVERWRITE=1 "
            f"(--overwrite) exports it again",
        )
    else:
        if args.dtype == "bf16" and how is None:
            note(
                args,
                f"note: ONNX Runtime has no bf16 on a CPU: this artifact is for TensorRT; for a CPU "
                f"export {_FOR_CPU}",
            )
        with progress_of(args).task(f"exporting {config.checkpoint}"):
            manifest = uptodate.recorded(_export(config, how, args), inputs, out)
    size, seconds = sum(file.size for file in manifest.files.values()), time.perf_counter() - begin
    if is_new:
        say(
            args,
            f"{out}: {manifest.model.parameters / 1e6:,.1f} M parameters, {args.dtype}, {size / 1e6:,.1f} "
            f"MB, {seconds:.1f} s",
        )
    return manifest, {
        "artifact": str(out),
        "is_new": is_new,
        "parameters": manifest.model.parameters,
        "dtype": args.dtype,
        "bytes": size,
        "seconds": seconds,
        "quantization": None if manifest.quantization is None else asdict(manifest.quantization),
    }


def _export(config: ExportConfig, how: quantize.QuantizeConfig | None, args: argparse.Namespace) -> Manifest:
    shown = progress_of(args)

    def tell(text: str) -> None:
        note(args, f"note: {text}")

    if how is not None:
        return quantize.export(config, how, _weights_progress(shown), tell, shown)
    return export(config, _weights_progress(shown), tell)


def _verified(
    args: argparse.Namespace, out: Path, manifest: Manifest, can_verify: bool
) -> tuple[bool, dict[str, Any] | None]:
    """Verify the export if that was asked for and is possible. Returns whether nothing failed, and the
    result."""
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
    needed, free = memory_needed(manifest.model), meminfo("MemAvailable")
    if args.verify == "auto" and free and needed > free and manifest.quantization is None:
        say(
            args,
            f"not verified: it would take about {needed / GIB:.0f} GiB of memory, {free / GIB:.0f} GiB are "
            f"available: run '{commands.command('verify', out)}' on a larger machine, or add --verify yes",
        )
        return True, None
    return verify(out, None, say=lambda line: say(args, line), progress=progress_of(args))


def _weights_progress(progress: Progress) -> Callable[[int], Callable[[int], object]]:
    """The progress of the weights, for the pipeline: called with the total bytes, it returns a function to
    call with the bytes written."""

    def begin(total: int) -> Callable[[int], object]:
        task = progress.begin("weights", total, unit="B")

        def advance(done: int) -> None:
            task.advance(done)
            if task.done >= total:
                task.end()

        return advance

    return begin
