"""The commands that put an artifact behind a server: serve, triton-repo."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from trt_runtime.backends import BACKENDS
from trt_runtime.cli.options import add_backend, backend_options, open_model
from trt_runtime.cli.parser import add_output, command
from trt_runtime.errors import DllmError, check_counts
from trt_runtime.optional import import_optional
from trt_runtime.system import commands as advice


def add(commands) -> None:  # type: ignore[no-untyped-def]
    """Add the commands to the parser's subcommands."""
    _add_serve(commands)
    _add_triton_repo(commands)


def _add_serve(commands) -> None:  # type: ignore[no-untyped-def]
    parser = command(
        commands, "serve", _serve, "serve OpenAI's API over HTTP", example="artifacts/llada-demo --port 8000"
    )
    option = parser.add_argument
    option("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    option("--port", type=int, default=8000, help="port to listen on; 0 picks a free one (default 8000)")
    option("--name", help="the model's name in requests (default: the artifact's directory)")
    option("--slots", type=int, default=8, help="answers decoded at the same time (default 8)")
    lanes = "on a CPU: threads that run forwards; the slots are divided among them (default 1)"
    option("--lanes", type=int, default=1, help=lanes)
    length = "most tokens of prompt and answer (default: the model's, or what half of the free memory holds)"
    option("--max-length", type=int, help=length)
    queue = "answers that may wait for a slot; further requests get status 429 (default 64)"
    option("--queue", type=int, default=64, help=queue)
    option("--max-body", type=int, default=1 << 20, help="most bytes of a request (default 1 MiB)")
    option("--timeout", type=float, default=300.0, help="seconds that an answer may take (default 300)")
    ray = "serve with N replicas; Ray watches and replaces them (default: one process)"
    option("--ray", type=int, metavar="N", help=ray)
    key = "require this key from clients; may be repeated (better: DLLM_API_KEY, keys separated by commas)"
    option("--api-key", action="append", help=key)
    cors = "allow requests from web pages of this origin; '*' allows all (may be repeated)"
    option("--cors", action="append", default=[], metavar="ORIGIN", help=cors)
    examples = "prompts that the page offers (default: prompts.txt next to the checkpoint)"
    option("--examples", type=Path, metavar="FILE", help=examples)
    add_backend(parser)
    add_output(parser)


def _add_triton_repo(commands) -> None:  # type: ignore[no-untyped-def]
    parser = command(
        commands,
        "triton-repo",
        _triton_repo,
        "write a model repository for Triton Inference Server",
        example="artifacts/llada-demo model-repository",
    )
    option = parser.add_argument
    option("out", type=Path, help="the repository's directory")
    option("--name", help="the model's name (default: the artifact's directory)")
    option("--slots", type=int, default=8, help="answers decoded at the same time (default 8)")
    option("--max-length", type=int, help="most tokens of prompt and answer (default: as for serve)")
    add_backend(parser)
    add_output(parser)


def _serve(args: argparse.Namespace) -> int:
    serving = import_optional("trt_runtime.serving.process", "serve", advice.install("serve"))
    _check(args)
    serving.cors.check(tuple(args.cors))
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
    replicas = import_optional("trt_runtime.serving.replicas", "serve --ray", advice.install("serve", "ray"))
    setup = replicas.Setup(str(args.artifact.resolve()), args.backend, backend_options(args))
    return int(replicas.run(setup, options, args.host, args.port, args.ray))


def _check(args: argparse.Namespace) -> None:
    """Raise DllmError for an option of `serve` that is out of range."""
    check_counts(args, "slots", "max_body", "max_length", "lanes", "ray")
    for name, is_right, expected in (
        ("queue", args.queue >= 0, "from 0"),
        ("port", 0 <= args.port <= 65535, "0 to 65535"),
        ("timeout", 0 < args.timeout <= 86_400, "above 0 and at most 86400 seconds"),
    ):
        if not is_right:
            raise DllmError(f"--{name} is {getattr(args, name):g}, expected {expected}.")
    if args.name is not None and not (args.name.strip() and args.name.isprintable()):
        raise DllmError("--name is empty or has line breaks or unprintable characters: choose another name.")


def _api_keys(options: list[str] | None) -> tuple[str, ...] | None:
    """The keys that clients may send: those of --api-key, else those of DLLM_API_KEY, separated by commas.
    Raises DllmError."""
    keys = options
    if keys is None:
        variable = os.environ.get("DLLM_API_KEY")
        keys = [key.strip() for key in variable.split(",")] if variable else []
    if any(not key or not key.isascii() or key != key.strip() for key in keys):
        raise DllmError(
            "an API key is empty, or has spaces around it or characters beyond ASCII: choose another key."
        )
    return tuple(keys) or None


def _triton_repo(args: argparse.Namespace) -> int:
    from trt_runtime.serving.triton import repository

    check_counts(args, "slots", "max_length")
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in backend_options(args).items()
    }
    directory = repository.write(
        args.artifact,
        args.out,
        name=args.name,
        backend=args.backend,
        options=options,
        slots=args.slots,
        max_length=args.max_length,
    )
    print(f"{directory} written: tritonserver --model-repository {args.out}")
    return 0
