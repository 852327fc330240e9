"""The command line `dllm-trt`: its entry, serve and triton-repo; the others are in cli_generate.py,
cli_artifact.py and cli_measure.py.

Nothing heavy is imported before a command runs: an interrupt is one line from the first moment on.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # the same in `typing`, whose import takes longer than all of this file
if TYPE_CHECKING:
    import argparse

    from trt_runtime.cli.parser import Parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 a mismatch or an error, 2 wrong usage, 130
    interrupted."""
    try:
        from trt_runtime.system import program
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return program.run(_run, argv)


def _run(argv: list[str] | None) -> int:
    from trt_runtime.system import program

    words = sys.argv[1:] if argv is None else argv
    with program.importing(at_once=argv is None):
        from trt_runtime.cli import parser as cli_parser

        if words[:1] == ["export"]:
            return _export(words[1:])
        from trt_runtime.cli.options import load_modules

        load_modules(words)
        parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on prompts that stand behind an option
    if any(item.startswith("-") and item != "-" for item in rest) or (rest and not hasattr(args, "prompt")):
        args.parser.refuse(rest)
    if rest:
        args.prompt += rest
    return cli_parser.execute(args)


def _parser() -> Parser:
    from pathlib import Path

    from trt_runtime.cli import artifact as cli_artifact
    from trt_runtime.cli import generate as cli_generate
    from trt_runtime.cli import measure as cli_measure
    from trt_runtime.cli import parser as cli_parser
    from trt_runtime.cli.options import add_backend

    parser = cli_parser.Parser(
        prog="dllm-trt",
        description="Decode diffusion LLMs from an exported artifact.",
        epilog="'dllm-trt COMMAND --help' lists a command's options, with an example.",
    )
    parser.add_argument("--version", action=cli_parser.Version)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    commands.add_parser(
        "export", help="make an artifact from a checkpoint (export extra)", add_help=False
    )  # _export runs it
    cli_generate.add(commands)

    serve = cli_parser.command(
        commands, "serve", _serve, "serve OpenAI's API over HTTP", example="artifacts/llada-demo --port 8000"
    )
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    serve.add_argument(
        "--port", type=int, default=8000, help="port to listen on (default 8000; 0 takes a free one)"
    )
    serve.add_argument("--name", help="the model's name in requests (default: the artifact's directory)")
    serve.add_argument("--slots", type=int, default=8, help="answers under way at a time (default 8)")
    serve.add_argument(
        "--lanes",
        type=int,
        default=1,
        help="threads that make forwards, on a CPU, each for its share of the slots (default 1)",
    )
    serve.add_argument(
        "--max-length",
        type=int,
        help="tokens of prompt and answer (default: the model's most, or what half of the free memory holds)",
    )
    serve.add_argument(
        "--queue", type=int, default=64, help="answers that may wait for a slot; more get 429 (default 64)"
    )
    serve.add_argument("--max-body", type=int, default=1 << 20, help="bytes of a request (default 1 MiB)")
    serve.add_argument(
        "--timeout", type=float, default=300.0, help="seconds that an answer may take (default 300)"
    )
    serve.add_argument(
        "--ray",
        type=int,
        metavar="N",
        help="serve with N replicas, which Ray watches and replaces (default: one process)",
    )
    serve.add_argument(
        "--api-key",
        action="append",
        help="ask clients for this key, or one of several (better: DLLM_API_KEY, with commas)",
    )
    serve.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin ask ('*': all)",
    )
    serve.add_argument(
        "--examples",
        type=Path,
        metavar="FILE",
        help="prompts that the page offers (default: prompts.txt beside the checkpoint)",
    )
    add_backend(serve)
    cli_parser.add_output(serve)

    triton = cli_parser.command(
        commands,
        "triton-repo",
        _triton_repo,
        "write a model repository for Triton Inference Server",
        example="artifacts/llada-demo model-repository",
    )
    triton.add_argument("out", type=Path, help="the repository's directory")
    triton.add_argument("--name", help="the model's name (default: the artifact's directory)")
    triton.add_argument("--slots", type=int, default=8, help="answers under way at a time (default 8)")
    triton.add_argument("--max-length", type=int, help="tokens of prompt and answer (default as for serve)")
    add_backend(triton)
    cli_parser.add_output(triton)

    cli_artifact.add(commands)
    cli_measure.add(commands)
    return parser


def _export(words: list[str]) -> int:
    """The exporter, which has a parser of its own (`python -m export`)."""
    from trt_runtime.optional import import_optional
    from trt_runtime.system import commands

    exporter = import_optional("export.cli", "export", commands.install("export"))
    status: int = exporter.main(words, prog="dllm-trt export")
    return status


def _serve(args: argparse.Namespace) -> int:
    from trt_runtime.backends import BACKENDS
    from trt_runtime.cli.options import backend_options, open_model
    from trt_runtime.errors import DllmError, check_counts
    from trt_runtime.optional import import_optional
    from trt_runtime.system import commands

    serving = import_optional("trt_runtime.serving.process", "serve", commands.install("serve"))
    check_counts(args, "slots", "max_body", "max_length", "lanes", "ray")
    for name, is_right, expected in (
        ("queue", args.queue >= 0, "from 0"),
        ("port", 0 <= args.port <= 65535, "0 to 65535"),
        ("timeout", 0 < args.timeout <= 86_400, "above 0 and at most 86400 seconds"),
    ):
        if not is_right:
            raise DllmError(f"--{name} is {getattr(args, name):g}, expected {expected}.")
    serving.cors.check(tuple(args.cors))
    if args.name is not None and not (args.name.strip() and args.name.isprintable()):
        raise DllmError(
            "--name is empty, or has line breaks or other characters that cannot be shown: give another one."
        )
    options = serving.ServeOptions(
        args.name or args.artifact.resolve().name,
        slots=args.slots,
        lanes=args.lanes,
        max_length=args.max_length,
        most_queued=args.queue,
        api_key=_api_keys(args.api_key),
        most_body=args.max_body,
        timeout=args.timeout,
        cors=tuple(args.cors),
        examples=serving.examples(args.artifact, args.examples),
    )
    on_cpu = BACKENDS.find(args.backend).is_on_cpu({"device": args.device})
    if args.threads is None and on_cpu and (parts := args.lanes * (args.ray or 1)) > 1:
        args.threads = max(1, (os.cpu_count() or 1) // parts)
    if args.ray is None:
        return int(serving.run(open_model(args), options, args.host, args.port))
    replicas = import_optional(
        "trt_runtime.serving.replicas", "serve --ray", commands.install("serve", "ray")
    )
    setup = replicas.Setup(str(args.artifact.resolve()), args.backend, backend_options(args))
    return int(replicas.run(setup, options, args.host, args.port, args.ray))


def _api_keys(given: list[str] | None) -> tuple[str, ...] | None:
    """The keys that clients may send: those given, else those of the environment, with commas between them.
    Raises DllmError."""
    from trt_runtime.errors import DllmError

    held = os.environ.get("DLLM_API_KEY") or None
    keys = given if given is not None else [key.strip() for key in held.split(",")] if held else []
    if any(not key or not key.isascii() or key != key.strip() for key in keys):
        raise DllmError(
            "an API key is empty, or has spaces around it or letters beyond ASCII: give another one."
        )
    return tuple(keys) or None


def _triton_repo(args: argparse.Namespace) -> int:
    from pathlib import Path

    from trt_runtime.cli.options import backend_options
    from trt_runtime.errors import check_counts
    from trt_runtime.serving.triton import repository as triton_repo

    check_counts(args, "slots", "max_length")
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in backend_options(args).items()
    }
    made = triton_repo.write(
        args.artifact,
        args.out,
        name=args.name,
        backend=args.backend,
        options=options,
        slots=args.slots,
        max_length=args.max_length,
    )
    print(f"{made} written: tritonserver --model-repository {args.out}")
    return 0
