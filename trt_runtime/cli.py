"""The command line `dllm-trt`: generate, chat, serve, triton-repo; the others are in cli_artifact.py and cli_measure.py."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from trt_runtime import backends, cli_artifact, cli_measure, render
from trt_runtime.cli_options import add_backend, add_decoding, backend_options, config_of, open_model
from trt_runtime.errors import DllmError, check_counts
from trt_runtime.model import Model, Prompt, Result


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 a mismatch or an error, 2 wrong usage, 130 interrupted."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on prompts that stand behind an option
    if any(item.startswith("-") and item != "-" for item in rest) or (rest and not hasattr(args, "prompt")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.prompt += rest
    try:
        command: Callable[[argparse.Namespace], int] = args.run
        status = command(args)
        sys.stdout.flush()
        return status
    except DllmError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except UnicodeError as error:
        print(f"error: a text cannot be read or written ({error}): use UTF-8 (PYTHONUTF8=1).", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror}: check the path, the disk and the rights.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dllm-trt", description="Decode diffusion LLMs from an exported artifact.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = cli_artifact.command(commands, "generate", _generate, "complete one or several prompts")
    generate.add_argument("prompt", nargs="*", help="prompts, decoded as one batch; '-' reads one a line from standard input")
    generate.add_argument("--ids", action="append", default=[], metavar="1,2,3", help="a prompt as token ids (may be repeated)")
    generate.add_argument("--raw", action="store_true", help="take the prompt as it stands, without the chat template")
    generate.add_argument("--stream", action="store_true", help="show the block being unmasked in place")
    generate.add_argument("--json", action="store_true", help="print the results as JSON")
    add_decoding(generate)

    chat = cli_artifact.command(commands, "chat", _chat, "talk to the model, a line at a time")
    chat.add_argument("--single-turn", action="store_true", help="every line begins a conversation of its own")
    add_decoding(chat)

    serve = cli_artifact.command(commands, "serve", _serve, "serve OpenAI's API over HTTP")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000; 0 takes a free one)")
    serve.add_argument("--name", help="the model's name in requests (default: the artifact's directory)")
    serve.add_argument("--slots", type=int, default=8, help="answers under way at a time (default 8)")
    serve.add_argument(
        "--lanes", type=int, default=1, help="threads that make forwards, on a CPU, each for its share of the slots (default 1)"
    )
    serve.add_argument(
        "--max-length",
        type=int,
        help="tokens of prompt and answer (default: the model's most, or what half of the free memory holds)",
    )
    serve.add_argument("--queue", type=int, default=64, help="answers that may wait for a slot; more get 429 (default 64)")
    serve.add_argument("--max-body", type=int, default=1 << 20, help="bytes of a request (default 1 MiB)")
    serve.add_argument("--timeout", type=float, default=300.0, help="seconds that an answer may take (default 300)")
    serve.add_argument(
        "--ray", type=int, metavar="N", help="serve with N replicas, which Ray watches and replaces (default: one process)"
    )
    serve.add_argument(
        "--api-key", action="append", help="ask clients for this key, or one of several (better: DLLM_API_KEY, with commas)"
    )
    serve.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="let pages of this origin ask ('*': all)")
    serve.add_argument(
        "--examples", type=Path, metavar="FILE", help="prompts that the page offers (default: prompts.txt beside the checkpoint)"
    )
    add_backend(serve)

    triton = cli_artifact.command(commands, "triton-repo", _triton_repo, "write a model repository for Triton Inference Server")
    triton.add_argument("out", type=Path, help="the repository's directory")
    triton.add_argument("--name", help="the model's name (default: the artifact's directory)")
    triton.add_argument("--slots", type=int, default=8, help="answers under way at a time (default 8)")
    triton.add_argument("--max-length", type=int, help="tokens of prompt and answer (default as for serve)")
    add_backend(triton)

    cli_artifact.add(commands)
    cli_measure.add(commands)
    return parser


def _generate(args: argparse.Namespace) -> int:
    prompts: list[Prompt] = []
    for text in args.prompt:
        prompts += [line.rstrip("\n") for line in sys.stdin if line.strip()] if text == "-" else [text]
    prompts += [_ids(text) for text in args.ids]
    if not prompts:
        raise DllmError("no prompt: give one or more, or '-' for standard input.")
    if args.stream and (args.json or len(prompts) > 1):
        raise DllmError("--stream shows one prompt and no JSON: leave out --json, or give one prompt.")
    model = open_model(args)
    _warn_of_unknown_words(model, prompts)
    if args.stream:
        render.show_stream(model, prompts[0], config_of(args, model.manifest), raw=args.raw)
        return 0
    results = model.generate(prompts, config_of(args, model.manifest), raw=args.raw)
    if args.json:
        print(json.dumps([_as_json(result) for result in results], indent=1))
        return 0
    for prompt, result in zip(prompts, results, strict=True):
        if len(results) > 1:
            print(f"> {prompt}")
        print(render.answer(model, result, whole=args.infill))
        print(render.summary(result), file=sys.stderr)
    return 0


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise DllmError(f"--ids is {text!r}, expected token ids with commas, like 12,7,300.") from error


def _as_json(result: Result) -> dict[str, object]:
    return {**asdict(replace(result, trace=[])), "tokens_per_forward": result.tokens_per_forward,
            "trace": [step.as_list() for step in result.trace]}  # fmt: skip


def _warn_of_unknown_words(model: Model, prompts: list[Prompt]) -> None:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if model.tokenizer and (words := [w for text in texts for w in model.tokenizer.unknown_words(text)]):
        print(f"warning: not in the model's vocabulary: {', '.join(dict.fromkeys(words))}", file=sys.stderr)


def _chat(args: argparse.Namespace) -> int:
    model = open_model(args)
    if model.tokenizer is None or not model.tokenizer.has_chat_template:
        raise DllmError(f"{args.artifact}: has no chat template: use 'dllm-trt generate'.")
    config = config_of(args, model.manifest)
    config.resolved(model.manifest)
    print("an empty line or Ctrl-D ends, /new begins a new conversation", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return 0
        if not line:
            return 0
        if line == "/new":
            messages = []
            continue
        _warn_of_unknown_words(model, [line])
        kept = [] if args.single_turn else messages
        try:
            result = render.show_stream(model, [*kept, {"role": "user", "content": line}], config)
        except DllmError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        messages = [*kept, {"role": "user", "content": line}, {"role": "assistant", "content": result or ""}]


def _serve(args: argparse.Namespace) -> int:
    serving = backends.import_tool("trt_runtime.server.serve", "serve", "pip install 'dllm-trt[serve]'")
    check_counts(args, "slots", "max_body", "max_length", "lanes", "ray")
    if args.queue < 0 or not 0 <= args.port <= 65535 or not 0 < args.timeout <= 86_400:
        raise DllmError(
            f"--queue is {args.queue}, --port {args.port}, --timeout {args.timeout:g}: expected from 0, 0 to 65535, above 0 and at most 86400."
        )
    serving.cors.check(tuple(args.cors))
    options = serving.Options(
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
    on_cpu = args.backend == "torch" or (args.backend == "ort" and args.device in (None, "cpu"))
    if args.threads is None and on_cpu and (parts := args.lanes * (args.ray or 1)) > 1:
        args.threads = max(1, (os.cpu_count() or 1) // parts)
    if args.ray is None:
        return int(serving.run(open_model(args), options, args.host, args.port))
    replicas = backends.import_tool("trt_runtime.server.replicas", "serve --ray", "pip install 'dllm-trt[serve,ray]'")
    setup = replicas.Setup(str(args.artifact.resolve()), args.backend, backend_options(args))
    return int(replicas.run(setup, options, args.host, args.port, args.ray))


def _api_keys(given: list[str] | None) -> tuple[str, ...] | None:
    """The keys that clients may send: those given, else those of the environment, with commas between them. Raises DllmError."""
    held = os.environ.get("DLLM_API_KEY") or None
    keys = given if given is not None else [key.strip() for key in held.split(",")] if held else []
    if any(not key or not key.isascii() or key != key.strip() for key in keys):
        raise DllmError("an API key is empty, or has spaces around it or letters beyond ASCII: give another one.")
    return tuple(keys) or None


def _triton_repo(args: argparse.Namespace) -> int:
    from trt_runtime.server import triton_repo

    check_counts(args, "slots", "max_length")
    options = {name: str(value) if isinstance(value, Path) else value for name, value in backend_options(args).items()}
    made = triton_repo.write(args.artifact, args.out, name=args.name, backend=args.backend, options=options, slots=args.slots,
                             max_length=args.max_length)  # fmt: skip
    print(f"{made} written: tritonserver --model-repository {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
