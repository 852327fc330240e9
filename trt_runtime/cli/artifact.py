"""The commands about an artifact: info, verify, polygraphy."""

from __future__ import annotations

import argparse
import functools
import json
import shlex
from pathlib import Path

from trt_runtime.artifact import contract, manifest
from trt_runtime.artifact.tokenizer import Tokenizer
from trt_runtime.cli import render
from trt_runtime.cli.parser import add_output, command, hint, note, progress_of, report, say
from trt_runtime.errors import DllmError, check_counts
from trt_runtime.measure import examples
from trt_runtime.optional import import_optional
from trt_runtime.system import commands as advice

_CHECKPOINT = "the checkpoint's directory or hub id (default: the one in the manifest)"


def add(commands) -> None:  # type: ignore[no-untyped-def]
    """Add the commands to the parser's subcommands."""
    parser = command(commands, "info", _info, "describe an artifact", example="artifacts/llada-demo --check")
    parser.add_argument("--check", action="store_true", help="also compare every file with its SHA-256")
    add_output(parser, "the manifest")
    _add_verify(commands)
    _add_polygraphy(commands)


def _add_verify(commands) -> None:  # type: ignore[no-untyped-def]
    parser = command(
        commands,
        "verify",
        _verify,
        "compare with the PyTorch reference and record the result in the manifest",
        example="artifacts/llada-demo",
    )
    option = parser.add_argument
    option("--checkpoint", help=_CHECKPOINT)
    layers = "compare the residual stream layer by layer instead, to see where a difference begins"
    option("--layers", action="store_true", help=layers)
    polygraphy = "also compare recorded calls with Polygraphy's Comparator (debug extra)"
    option("--with-polygraphy", action="store_true", help=polygraphy)
    add_output(parser, "the result")


def _add_polygraphy(commands) -> None:  # type: ignore[no-untyped-def]
    parser = command(
        commands,
        "polygraphy",
        _polygraphy,
        "write a debugging kit for Polygraphy's command line",
        example="artifacts/llada-demo /tmp/kit",
    )
    option = parser.add_argument
    option("out", type=Path, help="a new directory")
    option("--prompts", type=Path, help="a file with one prompt per line (default: random token ids)")
    option("--count", type=int, default=3, help="recorded calls of each graph (default 3)")
    link = "hard-link the weights instead of copying them; the onnx package refuses such files"
    option("--link", action="store_true", help=link)
    option("--no-reference", action="store_true", help="do not record PyTorch's outputs")
    option("--checkpoint", help=_CHECKPOINT)
    add_output(parser, "what was written")


def _info(args: argparse.Namespace) -> int:
    with progress_of(args).task(f"reading {args.artifact}"):
        facts = manifest.load(args.artifact, check_hashes=args.check)
    checked = f"\nhashes     {len(facts.files)} files as in the manifest" if args.check else ""
    written = json.loads((args.artifact / manifest.FILE_NAME).read_text(encoding="utf-8"))
    report(args, written, render.describe(args.artifact, facts) + checked)
    return 0


def _verify(args: argparse.Namespace) -> int:
    install = advice.install("export", "ort", "reference")
    with progress_of(args).task("loading PyTorch and the exporter"):
        tool = import_optional("export.parity.report", "verify", install)
        import_optional("export.parity.verify", "verify", install)
    if args.layers and args.with_polygraphy:
        raise DllmError("--layers and --with-polygraphy cannot be combined: choose one of them.")
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
    kit = import_optional("export.debug.kit", "polygraphy", advice.install("export", "ort"))
    prompts = None if args.prompts is None else _token_ids(args.artifact, args.prompts)
    config = kit.KitConfig(
        prompts, args.count, args.link, False if args.no_reference else None, args.checkpoint
    )
    with progress_of(args).task(f"recording calls of {args.artifact}"):
        calls = kit.write(args.artifact, args.out, config, lambda text: note(args, f"note: {text}"))
    numbers = {role: sum(call.role == role for call in calls) for role in contract.ROLES}
    counts = ", ".join(f"{number} {role} calls" for role, number in numbers.items())
    value = {"directory": str(args.out), "calls": numbers, "capacity": calls[0].capacity}
    report(args, value, f"{args.out}: both graphs, {counts}, run.sh and README.md")
    hint(args, lambda: f"cd {shlex.quote(str(args.out))} && ./run.sh onnxrt")
    return 0


def _token_ids(artifact: Path, file: Path) -> list[list[int]]:
    """The prompts of a file as token ids; texts are put into the chat template, if there is one."""
    tokenizer = Tokenizer(artifact / (manifest.load(artifact).tokenizer or "tokenizer"))
    prompts = []
    for example in examples.read(file):
        prompt = example.prompt
        if isinstance(prompt, str):
            if tokenizer.has_chat_template:
                prompt = tokenizer.render_chat([{"role": "user", "content": prompt}])
            prompts.append(tokenizer.encode(prompt))
        else:
            prompts.append(prompt)
    return prompts
