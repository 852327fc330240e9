"""The commands about artifacts, checkpoints and machines: info, plan, doctor, build, verify, polygraphy."""

from __future__ import annotations

import argparse
import functools
import json
import shlex
from pathlib import Path

from trt_runtime.artifact import contract, manifest
from trt_runtime.artifact.tokenizer import Tokenizer
from trt_runtime.backends.tensorrt import store
from trt_runtime.cli import next_steps, render
from trt_runtime.cli.parser import add_output, command, hint, note, progress_of, report, say
from trt_runtime.errors import DllmError, check_counts
from trt_runtime.machine import devices
from trt_runtime.machine import forecast as planning
from trt_runtime.measure import examples
from trt_runtime.optional import import_optional
from trt_runtime.system import commands


def add(commands) -> None:  # type: ignore[no-untyped-def]
    """Add the commands to the parser's subcommands."""
    info = command(commands, "info", _info, "what an artifact is", example="artifacts/llada-demo --check")
    add_output(info, "the manifest")
    info.add_argument("--check", action="store_true", help="also compare every file with its SHA-256")

    plan = command(
        commands,
        "plan",
        _plan,
        "forecast memory, time and disk, before work",
        "ARTIFACT|CHECKPOINT",
        "checkpoints/llada-demo --device l4 --batch 8",
    )
    plan.add_argument(
        "--device", help=f"cpu (this machine), {', '.join(devices.DEVICES)} (default: all of them)"
    )
    plan.add_argument("--batch", type=int, default=1, help="rows at a time (default 1)")
    most = planning.DEFAULT_LENGTH
    plan.add_argument(
        "--length",
        type=int,
        help=f"tokens of the longest canvas (default {most}, or the most that the model takes)",
    )
    plan.add_argument("--block-length", type=int, default=32, help="tokens of a block (default 32)")
    plan.add_argument(
        "--dtype", help="another dtype than the artifact's (a checkpoint's default: bf16, on a CPU fp32)"
    )
    plan.add_argument(
        "--quantize",
        help="of a checkpoint: what an export with --quantize would take (w8a8, int4, fp8, int8-sq)",
    )
    add_output(plan, "the forecast")

    doctor = command(commands, "doctor", _doctor, "what this machine can do", "-")
    add_output(doctor, "the findings")

    build = command(
        commands, "build", _build, "build TensorRT engines", example="artifacts/llada-demo --max-batch 4"
    )
    base = store.BuildConfig()
    build.add_argument(
        "--backend",
        default=base.backend,
        help="tensorrt (default; on the GPU that will run it) or tensorrt-rtx",
    )
    build.add_argument(
        "--target",
        default="",
        metavar="SM,...",
        help=f"of tensorrt-rtx: {','.join(store.SM_TARGETS)} (default: this GPU)",
    )
    build.add_argument(
        "--layout",
        default=base.layout,
        help="shared (default: one engine, weights once) or split (two engines)",
    )
    build.add_argument(
        "--max-batch", type=int, default=base.max_batch, help=f"rows at a time (default {base.max_batch})"
    )
    build.add_argument(
        "--max-length",
        type=int,
        default=base.max_length,
        help=f"tokens of the longest canvas (default {base.max_length})",
    )
    build.add_argument(
        "--block-length",
        type=int,
        default=base.block_length,
        help=f"tokens of a block (default {base.block_length})",
    )
    build.add_argument("--max-rows", type=int, help="positions asked for in one forward (default: a block)")
    build.add_argument("--optimization-level", type=int, help="0 to 5: of the builder (default its own)")
    build.add_argument(
        "--strip",
        action="store_true",
        help="leave the weights out; they come from the artifact when the engine is opened",
    )
    build.add_argument(
        "--plugins", action="store_true", help="put the kernels of plugins/ in the place of layers"
    )
    build.add_argument(
        "--inspect", action="store_true", help="also write what the builder made of each layer, as JSON"
    )
    build.add_argument(
        "--out", type=Path, default=Path("engines"), help="the cache of engines (default engines)"
    )
    add_output(build, "the engines' files")

    verify = command(
        commands,
        "verify",
        _verify,
        "compare with the PyTorch reference and note the result in the manifest",
        example="artifacts/llada-demo",
    )
    verify.add_argument(
        "--checkpoint", help="the checkpoint's directory or hub id (default: the one in the manifest)"
    )
    verify.add_argument(
        "--layers",
        action="store_true",
        help="instead, show the residual stream layer by layer: where it goes wrong",
    )
    add_output(verify, "the result")
    verify.add_argument(
        "--with-polygraphy",
        action="store_true",
        help="also compare recorded calls by Polygraphy's Comparator (debug extra)",
    )

    debug = command(
        commands,
        "polygraphy",
        _polygraphy,
        "write what Polygraphy's command line needs to work on the graphs",
        example="artifacts/llada-demo /tmp/kit",
    )
    debug.add_argument("out", type=Path, help="a new directory")
    debug.add_argument(
        "--prompts", type=Path, help="a file with one prompt a line to record (default: random token ids)"
    )
    debug.add_argument("--count", type=int, default=3, help="recorded calls of each graph (default 3)")
    debug.add_argument(
        "--link",
        action="store_true",
        help="hard-link the weights: no second copy, but the onnx package refuses links",
    )
    debug.add_argument("--no-reference", action="store_true", help="do not record PyTorch's outputs")
    debug.add_argument(
        "--checkpoint", help="the checkpoint's directory or hub id (default: the one in the manifest)"
    )
    add_output(debug, "what was written")


def _info(args: argparse.Namespace) -> int:
    with progress_of(args).task(f"reading {args.artifact}"):
        facts = manifest.load(args.artifact, check_hashes=args.check)
    checked = f"\nhashes     {len(facts.files)} files as in the manifest" if args.check else ""
    written = json.loads((args.artifact / manifest.FILE_NAME).read_text(encoding="utf-8"))
    report(args, written, render.describe(args.artifact, facts) + checked)
    return 0


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
    )
    with progress_of(args).task(f"building engines of {args.artifact}"):
        directory = store.build(args.artifact, args.out, config, lambda text: note(args, f"warning: {text}"))
    files = {str(file): file.stat().st_size for file in sorted(directory.glob(f"*{store.SUFFIX}"))}
    value = {
        "directory": str(directory),
        "engines": [{"file": file, "bytes": size} for file, size in files.items()],
    }
    report(args, value, "\n".join(f"{file} ({size / 1e6:,.1f} MB)" for file, size in files.items()))
    hint(args, lambda: next_steps.after_build(args.artifact, args.backend, args.out))
    return 0


def _plan(args: argparse.Namespace) -> int:
    with progress_of(args).task(f"reading {args.model}"):
        text, made = planning.run(
            args.model,
            device=args.device,
            batch=args.batch,
            length=args.length,
            block_length=args.block_length,
            dtype=args.dtype,
            as_json=args.json,
            quantize=args.quantize,
        )
    report(args, made, text)
    hint(args, lambda: next_steps.after_plan(args.model, made, args.device))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from trt_runtime.machine import doctor

    with progress_of(args).task("looking at packages, GPU and disk"):
        text, healthy, mends = doctor.run(as_json=args.json)
    report(args, json.loads(text) if args.json else None, text)
    hint(args, lambda: next_steps.after_doctor(healthy, mends))
    return 0 if healthy else 1


def _verify(args: argparse.Namespace) -> int:
    mend = commands.install("export", "ort", "reference")
    with progress_of(args).task("loading PyTorch and the exporter"):
        tool = import_optional("export.cli", "verify", mend)
        import_optional("export.parity.verify", "verify", mend)
    if args.layers and args.with_polygraphy:
        raise DllmError("--layers and --with-polygraphy are two ways to look: leave one of them out.")
    run = (
        tool.verify_layers
        if args.layers
        else functools.partial(tool.verify, with_polygraphy=args.with_polygraphy)
    )
    passed, value = run(
        args.artifact, args.checkpoint, say=lambda line: say(args, line), progress=progress_of(args)
    )
    if args.json:
        report(args, value, "")
    return 0 if passed else 1


def _polygraphy(args: argparse.Namespace) -> int:
    check_counts(args, "count")
    kit = import_optional("export.debug.kit", "polygraphy", commands.install("export", "ort"))
    prompts = None
    if args.prompts is not None:
        tokenizer = Tokenizer(args.artifact / (manifest.load(args.artifact).tokenizer or "tokenizer"))
        texts = [example.prompt for example in examples.read(args.prompts)]
        prompts = [
            text if isinstance(text, list) else tokenizer.encode(_rendered(tokenizer, text)) for text in texts
        ]
    config = kit.KitConfig(
        prompts, args.count, args.link, False if args.no_reference else None, args.checkpoint
    )
    with progress_of(args).task(f"recording calls of {args.artifact}"):
        calls = kit.write(args.artifact, args.out, config, lambda text: note(args, f"note: {text}"))
    numbers = {role: sum(call.role == role for call in calls) for role in contract.ROLES}
    said = (
        f"{args.out}: both graphs, "
        f"{', '.join(f'{number} {role} calls' for role, number in numbers.items())}, run.sh and README.md"
    )
    report(args, {"directory": str(args.out), "calls": numbers, "capacity": calls[0].capacity}, said)
    hint(args, lambda: f"cd {shlex.quote(str(args.out))} && ./run.sh onnxrt")
    return 0


def _rendered(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.render_chat([{"role": "user", "content": text}]) if tokenizer.has_chat_template else text
