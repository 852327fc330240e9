"""The commands about this machine and its GPU: plan, doctor, build."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from trt_runtime.backends.tensorrt import store
from trt_runtime.cli import next_steps
from trt_runtime.cli.parser import add_output, command, hint, note, progress_of, report
from trt_runtime.machine import devices
from trt_runtime.machine import forecast as planning


def add(commands) -> None:  # type: ignore[no-untyped-def]
    """Add the commands to the parser's subcommands."""
    _add_plan(commands)
    parser = command(commands, "doctor", _doctor, "what this machine can do", "-")
    add_output(parser, "the findings")
    _add_build(commands)


def _add_plan(commands) -> None:  # type: ignore[no-untyped-def]
    parser = command(
        commands,
        "plan",
        _plan,
        "forecast memory, time and disk before any work is done",
        "ARTIFACT|CHECKPOINT",
        "checkpoints/llada-demo --device l4 --batch 8",
    )
    option = parser.add_argument
    option("--device", help=f"cpu (this machine), {', '.join(devices.DEVICES)} (default: all of them)")
    option("--batch", type=int, default=1, help="rows decoded together (default 1)")
    length = f"tokens of the longest canvas (default {planning.DEFAULT_LENGTH}, or the model's maximum)"
    option("--length", type=int, help=length)
    option("--block-length", type=int, default=32, help="tokens per block (default 32)")
    dtype = "dtype to forecast (default: the artifact's, or for a checkpoint bf16, on a CPU fp32)"
    option("--dtype", help=dtype)
    quantize = "for a checkpoint: forecast an export with --quantize (w8a8, int4, fp8, int8-sq)"
    option("--quantize", help=quantize)
    add_output(parser, "the forecast")


def _add_build(commands) -> None:  # type: ignore[no-untyped-def]
    parser = command(
        commands, "build", _build, "build TensorRT engines", example="artifacts/llada-demo --max-batch 4"
    )
    option, base = parser.add_argument, store.BuildConfig()
    backend = "tensorrt (default; build on the GPU that will run it) or tensorrt-rtx"
    option("--backend", default=base.backend, help=backend)
    target = f"with tensorrt-rtx: architectures {','.join(store.SM_TARGETS)} (default: this GPU's)"
    option("--target", default="", metavar="SM,...", help=target)
    layout = "shared (default: one engine, weights stored once) or split (two engines)"
    option("--layout", default=base.layout, help=layout)
    option(
        "--max-batch", type=int, default=base.max_batch, help=f"maximum batch size (default {base.max_batch})"
    )
    length = f"tokens of the longest canvas (default {base.max_length})"
    option("--max-length", type=int, default=base.max_length, help=length)
    block = "tokens per block (default 32, or the model's own block length if that is more)"
    option("--block-length", type=int, help=block)
    option("--max-rows", type=int, help="most positions with outputs per forward (default: a block)")
    option("--optimization-level", type=int, help="the builder's level, 0 to 5 (default: its own)")
    strip = "build without the weights; they are read from the artifact when the engine is opened"
    option("--strip", action="store_true", help=strip)
    option("--plugins", action="store_true", help="replace layers with the kernels of plugins/")
    experts = "compute only the chosen experts where a pass has over 128 rows (a kernel; not measured yet)"
    option("--experts-plugin", action="store_true", help=experts)
    head = "compute the head and its statistics in one pass over 16-bit weights (a kernel; not measured yet)"
    option("--head-plugin", action="store_true", help=head)
    attention = "attention of refine steps over the caches in place; needs --layout split (not measured yet)"
    option("--attention-plugin", action="store_true", help=attention)
    option("--inspect", action="store_true", help="also write the builder's layers as JSON")
    option("--out", type=Path, default=Path("engines"), help="the engine cache (default engines)")
    add_output(parser, "the engines' files")


def _plan(args: argparse.Namespace) -> int:
    with progress_of(args).task(f"reading {args.model}"):
        text, forecast = planning.run(
            args.model,
            device=args.device,
            batch=args.batch,
            length=args.length,
            block_length=args.block_length,
            dtype=args.dtype,
            as_json=args.json,
            quantize=args.quantize,
        )
    report(args, forecast, text)
    hint(args, lambda: next_steps.after_plan(args.model, forecast, args.device))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from trt_runtime.machine import doctor

    with progress_of(args).task("checking packages, GPU and disk"):
        text, healthy, fixes = doctor.run(as_json=args.json)
    report(args, json.loads(text) if args.json else None, text)
    hint(args, lambda: next_steps.after_doctor(healthy, fixes))
    return 0 if healthy else 1


def _build(args: argparse.Namespace) -> int:
    config = store.BuildConfig(
        args.backend,
        args.layout,
        tuple(name for name in args.target.split(",") if name),
        args.max_batch,
        args.max_length,
        args.block_length,
        args.max_rows,
        args.optimization_level,
        args.strip,
        args.plugins,
        args.inspect,
        args.experts_plugin,
        args.head_plugin,
        args.attention_plugin,
    )
    with progress_of(args).task(f"building engines of {args.artifact}"):
        directory = store.build(args.artifact, args.out, config, lambda text: note(args, f"warning: {text}"))
    sizes = {str(file): file.stat().st_size for file in sorted(directory.glob(f"*{store.SUFFIX}"))}
    value = {
        "directory": str(directory),
        "engines": [{"file": file, "bytes": size} for file, size in sizes.items()],
    }
    report(args, value, "\n".join(f"{file} ({size / 1e6:,.1f} MB)" for file, size in sizes.items()))
    hint(args, lambda: next_steps.after_build(args.artifact, args.backend, args.out))
    return 0
