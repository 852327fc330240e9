"""The command line `dllm-trt`: generate, chat, serve, replay, bench; the others are in cli_artifact.py."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from trt_runtime import backends, cli_artifact, render, replay, tolerances
from trt_runtime import cases as decode_cases
from trt_runtime.config import CACHES, POLICIES, GenerationConfig, check_options
from trt_runtime.errors import DllmError, check_counts
from trt_runtime.model import Model, Prompt, Result, load

MAX_THREADS = 1024


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
    _decoding_options(generate)

    chat = cli_artifact.command(commands, "chat", _chat, "talk to the model, a line at a time")
    chat.add_argument("--single-turn", action="store_true", help="every line begins a conversation of its own")
    _decoding_options(chat)

    serve = cli_artifact.command(commands, "serve", _serve, "serve OpenAI's API over HTTP")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000; 0 takes a free one)")
    serve.add_argument("--name", help="the model's name in requests (default: the artifact's directory)")
    serve.add_argument("--slots", type=int, default=8, help="answers under way at a time (default 8)")
    serve.add_argument(
        "--lanes", type=int, default=1, help="threads that make forwards, on a CPU, each for its share of the slots (default 1)"
    )
    serve.add_argument("--max-length", type=int, help="tokens of prompt and answer (default: the model's most)")
    serve.add_argument("--queue", type=int, default=64, help="answers that may wait for a slot; more get 429 (default 64)")
    serve.add_argument("--max-body", type=int, default=1 << 20, help="bytes of a request (default 1 MiB)")
    serve.add_argument("--timeout", type=float, default=300.0, help="seconds that an answer may take (default 300)")
    serve.add_argument(
        "--ray", type=int, metavar="N", help="serve with N replicas, which Ray watches and replaces (default: one process)"
    )
    serve.add_argument("--api-key", help="ask clients for this key (better: the environment variable DLLM_API_KEY)")
    _backend_options(serve)

    triton = cli_artifact.command(commands, "triton-repo", _triton_repo, "write a model repository for Triton Inference Server")
    triton.add_argument("out", type=Path, help="the repository's directory")
    triton.add_argument("--name", help="the model's name (default: the artifact's directory)")
    triton.add_argument("--slots", type=int, default=8, help="answers under way at a time (default 8)")
    triton.add_argument("--max-length", type=int, help="tokens of prompt and answer (default: the model's most)")
    _backend_options(triton)

    cli_artifact.add(commands)
    _measuring(commands)
    return parser


def _measuring(commands) -> None:  # type: ignore[no-untyped-def]
    again = cli_artifact.command(commands, "replay", _replay, "run recorded decode cases and compare, or record some")
    again.add_argument("cases", nargs="?", type=Path, metavar="CASES.json", help="cases to run; not needed with --record")
    again.add_argument("--output", type=Path, metavar="OUT.json", help="write what came out of each case")
    again.add_argument(
        "--record", type=Path, metavar="NEW.json", help="write cases made by this backend, from CASES.json or random prompts"
    )
    again.add_argument("--count", type=int, default=24, help="random cases to record (default 24)")
    again.add_argument("--seed", type=int, default=0, help="of the random prompts (default 0)")
    again.add_argument("--exact", action="store_true", help="count AMBIGUOUS differences as mismatches")
    _backend_options(again)

    bench = cli_artifact.command(commands, "bench", _bench, "measure caches and parallel unmasking side by side")
    bench.add_argument("--prompts", type=Path, help="a file with one prompt a line (default: random token ids)")
    bench.add_argument("--prompt-length", type=int, default=64, help="tokens of a random prompt (default 64)")
    bench.add_argument("--count", type=int, default=4, help="prompts of a run (default 4)")
    bench.add_argument("--repeats", type=int, default=3, help="interleaved runs of every variant (default 3)")
    bench.add_argument("--gen-length", type=int, help="tokens to generate (default: the model's)")
    bench.add_argument("--block-length", type=int, help="tokens of a block (default: the model's)")
    bench.add_argument("--threshold", type=float, default=0.9, help="of the parallel variants (default 0.9)")
    bench.add_argument("--tokens-per-step", type=int, help="measure a fixed schedule of this many tokens a forward instead")
    bench.add_argument("--variants", default="", metavar="NAMES", help="variants to run, e.g. none,dual (default all)")
    bench.add_argument(
        "--reference", default="", metavar="NAMES", help="variants to run on PyTorch too, e.g. none,dual, or 'all'"
    )
    bench.add_argument("--output", type=Path, metavar="OUT.json", help="write all figures")
    _backend_options(bench)


def _backend_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="ort", help=f"what runs the model: {', '.join(backends.names())} (default ort)")
    parser.add_argument("--threads", type=int, help="threads of a matrix product (default: physical cores)")
    parser.add_argument("--device", help="of ort: cpu (default) or cuda; of tensorrt: the GPU's number (default 0)")
    parser.add_argument("--steps-per-look", type=int, help="refine steps that the device makes before the host looks (default 1)")
    parser.add_argument("--engines", type=Path, help="of tensorrt: where 'dllm-trt build' put the engines (default engines)")
    parser.add_argument("--checkpoint", help="for the torch backend: the checkpoint (default: the one in the manifest)")


def _decoding_options(parser: argparse.ArgumentParser) -> None:
    default = GenerationConfig()
    parser.add_argument("--gen-length", type=int, help="tokens to generate (default: the model's)")
    parser.add_argument("--block-length", type=int, help="tokens of a block (default: the model's)")
    parser.add_argument("--cache", default=default.cache, help=f"{', '.join(CACHES)} (default {default.cache})")
    parser.add_argument("--policy", default=default.policy, help=f"{', '.join(POLICIES)} (default {default.policy})")
    parser.add_argument(
        "--threshold", type=float, help="of 'threshold' and most adaptive policies: above 0, at most 1 (default 0.9)"
    )
    parser.add_argument("--factor", type=float, help="of the policy 'factor' (default 1.0)")
    parser.add_argument("--gamma", type=float, help="of the policy 'eb': sum of entropies in nats (default 0.1)")
    parser.add_argument("--alpha", type=float, help="of the policy 'dynamic': how far the threshold falls (default 0.3)")
    parser.add_argument("--low-threshold", type=float, help="of 'localleap', 'hierarchy', 'slowfast' (default 0.6)")
    parser.add_argument("--speculate", type=int, help="steps that one call may verify, without changing the answer (default 1)")
    parser.add_argument(
        "--refresh-every", type=int, help="blocks from one rebuilt cache to the next; 0: the first alone (default 1)"
    )
    parser.add_argument(
        "--refresh-window", type=int, help="positions around a block that begins without a rebuilt cache (default 0)"
    )
    parser.add_argument("--suffix", type=int, help="masks behind the block that a forward sees (default all)")
    parser.add_argument("--suffix-decay", action="store_true", help="take those of --suffix at growing distances")
    parser.add_argument(
        "--steps", type=int, help="of a schedule: forwards in all (default one token a forward); bounds 'threshold'"
    )
    parser.add_argument("--alg-temp", type=float, help="of entropy, maskgit_plus, topk_margin: above 0, positions are drawn")
    parser.add_argument("--temperature", type=float, default=default.temperature, help="0 takes the best token (default 0)")
    parser.add_argument("--top-p", type=float, help="of a Dream: keep the most probable tokens up to this sum")
    parser.add_argument("--top-k", type=int, help="of a Dream: keep this many tokens")
    parser.add_argument("--seed", type=int, help="of what is drawn (default 0)")
    parser.add_argument("--no-stop-at-eos", dest="stop_at_eos", action="store_false", help="decode all gen_length tokens")
    parser.add_argument("--infill", action="store_true", help="fill the mask tokens of the prompt")
    _backend_options(parser)


# options that only some backends take
_BACKEND_OPTIONS = {"threads": ("ort", "torch"), "device": ("ort", "tensorrt", "tensorrt-rtx"), "steps_per_look": ("ort", "tensorrt", "tensorrt-rtx"), "engines": ("tensorrt", "tensorrt-rtx"),
                    "checkpoint": ("torch",)}  # fmt: skip


def _open(args: argparse.Namespace) -> Model:
    return load(args.artifact, args.backend, **_options(args))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The backend's options, checked."""
    options: dict[str, Any] = {}
    if args.threads is not None and not 1 <= args.threads <= MAX_THREADS:
        raise DllmError(f"--threads is {args.threads}, expected 1 to {MAX_THREADS}.")
    check_counts(args, "steps_per_look")
    for name, takers in _BACKEND_OPTIONS.items():
        value = getattr(args, name)
        is_of_bench = name == "checkpoint" and args.backend not in takers and getattr(args, "reference", False)
        if value is None or is_of_bench:  # bench hands the checkpoint to its variants on PyTorch
            continue
        if args.backend not in takers and args.backend in backends.names():
            raise DllmError(
                f"--{name.replace('_', '-')} goes with --backend {' or '.join(takers)}, got --backend {args.backend}."
            )
        options[name] = value
    if "device" in options and args.backend != "ort":
        if not args.device.isdecimal():
            raise DllmError(f"--device is {args.device}, expected the number of a GPU with --backend {args.backend}.")
        options["device"] = int(args.device)
    return options


def _config(args: argparse.Namespace) -> GenerationConfig:
    if args.seed is not None and not args.temperature and not args.alg_temp and args.policy != "origin":
        raise DllmError("--seed goes with a --temperature or --alg-temp above 0, or --policy origin: else nothing is drawn.")
    values = {item.name: getattr(args, item.name) for item in fields(GenerationConfig)}
    given = {name: value for name, value in values.items() if value is not None}
    check_options(given, args.policy)
    return GenerationConfig(**given)


def _generate(args: argparse.Namespace) -> int:
    prompts: list[Prompt] = []
    for text in args.prompt:
        prompts += [line.rstrip("\n") for line in sys.stdin if line.strip()] if text == "-" else [text]
    prompts += [_ids(text) for text in args.ids]
    if not prompts:
        raise DllmError("no prompt: give one or more, or '-' for standard input.")
    if args.stream and (args.json or len(prompts) > 1):
        raise DllmError("--stream shows one prompt and no JSON: leave out --json, or give one prompt.")
    model = _open(args)
    _warn_of_unknown_words(model, prompts)
    if args.stream:
        render.show_stream(model, prompts[0], _config(args), raw=args.raw)
        return 0
    results = model.generate(prompts, _config(args), raw=args.raw)
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
    model = _open(args)
    if model.tokenizer is None or not model.tokenizer.has_chat_template:
        raise DllmError(f"{args.artifact}: has no chat template: use 'dllm-trt generate'.")
    config = _config(args)
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


def _replay(args: argparse.Namespace) -> int:
    if args.cases is None and args.record is None:
        raise DllmError("no cases: give CASES.json, or --record NEW.json to make some.")
    if args.record is not None and (args.output is not None or args.exact):
        raise DllmError("--record compares nothing: leave out --output and --exact.")
    if args.count < 1 or args.seed < 0:
        raise DllmError(f"--count is {args.count} and --seed {args.seed}, expected from 1 and from 0.")
    model = _open(args)
    facts = model.manifest
    cases = decode_cases.read_cases(args.cases) if args.cases else decode_cases.random_cases(facts, args.count, args.seed)
    ours = [case for case in cases if case.get("family", facts.model.family) == facts.model.family]
    if len(ours) < len(cases):
        print(f"left out: {len(cases) - len(ours)} cases of other families than {facts.model.family}")
    if not ours:
        raise DllmError(f"no case is of the family {facts.model.family}: nothing was compared.")
    if args.record is not None:
        _write_json(args.record, replay.record(model.backend, ours))
        print(f"recorded {len(ours)} cases in {args.record}")
        return 0
    return _compare(args, model, ours)


def _compare(args: argparse.Namespace, model: Model, cases: list[decode_cases.Case]) -> int:
    dtype = model.manifest.model.dtype
    results, wrong, near, excused = [], 0, 0, 0
    for case in cases:
        done = replay.replay(model.backend, case)
        results.append(done.result)
        found = replay.compare(case, done, 0.0 if args.exact else tolerances.CONFIDENCE[dtype])
        if found is None:
            continue
        if not replay.must_match(case, dtype):
            excused += 1
            continue
        print(found)
        ambiguous = found.ambiguous and not args.exact
        near, wrong = near + ambiguous, wrong + (not ambiguous)
    if args.output is not None:
        _write_json(args.output, {"cases": results})
    expecting = sum("output" in case or "trace" in case for case in cases)
    if not expecting and args.output is None:
        raise DllmError("no case says what to expect (output, trace): nothing was compared; give --output to keep the results.")
    print(f"{len(cases)} cases on {model.backend.name} in {dtype}: {expecting} with expectations, "
          f"{wrong} mismatches, {near} ambiguous, {excused} not expected to hold in {dtype}")  # fmt: skip
    return 1 if wrong else 0


def _write_json(path: Path, value: object) -> None:
    try:
        path.write_text(json.dumps(value) + "\n", encoding="utf-8")
    except OSError as error:
        raise DllmError(f"{path}: cannot be written ({error.strerror}): give another path.") from error


def _serve(args: argparse.Namespace) -> int:
    serving = backends.import_tool("trt_runtime.server.serve", "serve", "pip install 'dllm-trt[serve]'")
    check_counts(args, "slots", "max_body", "max_length", "lanes", "ray")
    if args.queue < 0 or not 0 <= args.port <= 65535 or not 0 < args.timeout <= 86_400:
        raise DllmError(
            f"--queue is {args.queue}, --port {args.port}, --timeout {args.timeout:g}: expected from 0, 0 to 65535, above 0 and at most 86400."
        )
    key = args.api_key if args.api_key is not None else os.environ.get("DLLM_API_KEY") or None
    if key is not None and (not key or not key.isascii() or key != key.strip()):
        raise DllmError("the API key is empty, or has spaces around it or letters beyond ASCII: give another one.")
    options = serving.Options(
        args.name or args.artifact.resolve().name,
        args.slots,
        args.lanes,
        args.max_length,
        args.queue,
        key,
        args.max_body,
        args.timeout,
    )
    on_cpu = args.backend == "torch" or (args.backend == "ort" and args.device in (None, "cpu"))
    if args.threads is None and on_cpu and (parts := args.lanes * (args.ray or 1)) > 1:
        args.threads = max(1, (os.cpu_count() or 1) // parts)
    if args.ray is None:
        serving.run(_open(args), options, args.host, args.port)
        return 0
    replicas = backends.import_tool("trt_runtime.server.replicas", "serve --ray", "pip install 'dllm-trt[serve,ray]'")
    setup = replicas.Setup(str(args.artifact.resolve()), args.backend, _options(args))
    replicas.run(setup, options, args.host, args.port, args.ray)
    return 0


def _triton_repo(args: argparse.Namespace) -> int:
    from trt_runtime.server import triton_repo

    check_counts(args, "slots", "max_length")
    options = {name: str(value) if isinstance(value, Path) else value for name, value in _options(args).items()}
    made = triton_repo.write(args.artifact, args.out, name=args.name, backend=args.backend, options=options, slots=args.slots,
                             max_length=args.max_length)  # fmt: skip
    print(f"{made} written: tritonserver --model-repository {args.out}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from trt_runtime import bench

    report = bench.run(_open(args), bench.options_of(args))
    print(bench.table(report))
    if args.output is not None:
        _write_json(args.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
