"""The commands that compare and measure: replay, bench, eval, tune."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from trt_runtime.cli.options import add_backend, add_decoding, config_of, open_model, write_json
from trt_runtime.cli.parser import add_output, command, progress_of, report, say
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError, check_counts, unknown
from trt_runtime.measure import cases as decode_cases
from trt_runtime.measure import evaluation_notes, examples, replay, tolerances
from trt_runtime.model import Model
from trt_runtime.optional import import_optional
from trt_runtime.system import commands


def add(commands) -> None:  # type: ignore[no-untyped-def]
    """Add the commands to the parser's subcommands."""
    again = command(
        commands,
        "replay",
        _replay,
        "run recorded decode cases and compare, or record some",
        example="artifacts/llada-demo checkpoints/llada-demo/cases.json",
    )
    again.add_argument(
        "cases", nargs="?", type=Path, metavar="CASES.json", help="cases to run; not needed with --record"
    )
    again.add_argument(
        "--record",
        type=Path,
        metavar="NEW.json",
        help="write cases made by this backend, from CASES.json or random prompts",
    )
    again.add_argument("--count", type=int, default=24, help="random cases to record (default 24)")
    again.add_argument("--seed", type=int, default=0, help="of the random prompts (default 0)")
    again.add_argument("--exact", action="store_true", help="count AMBIGUOUS differences as mismatches")
    add_backend(again)
    add_output(again, "what was compared", "write what came out of each case")

    bench = command(
        commands,
        "bench",
        _bench,
        "measure caches and parallel unmasking side by side",
        example="artifacts/llada-demo --prompts checkpoints/llada-demo/prompts.txt",
    )
    bench.add_argument(
        "--prompts", type=Path, help="a file with one prompt a line (default: random token ids)"
    )
    bench.add_argument("--prompt-length", type=int, default=64, help="tokens of a random prompt (default 64)")
    bench.add_argument("--count", type=int, default=4, help="prompts of a run (default 4)")
    bench.add_argument("--repeats", type=int, default=3, help="interleaved runs of every variant (default 3)")
    bench.add_argument("--gen-length", type=int, help="tokens to generate (default: the model's)")
    bench.add_argument("--block-length", type=int, help="tokens of a block (default: the model's)")
    bench.add_argument("--threshold", type=float, default=0.9, help="of the parallel variants (default 0.9)")
    bench.add_argument(
        "--tokens-per-step", type=int, help="measure a fixed schedule of this many tokens a forward instead"
    )
    bench.add_argument(
        "--variants", default="", metavar="NAMES", help="variants to run, e.g. none,dual (default all)"
    )
    bench.add_argument(
        "--reference",
        default="",
        metavar="NAMES",
        help="variants to run on PyTorch too, e.g. none,dual, or 'all'",
    )
    bench.add_argument(
        "--reference-dtypes",
        default="",
        metavar="NAMES",
        help="of PyTorch, e.g. fp32,bf16 (default the artifact's)",
    )
    bench.add_argument(
        "--beside",
        type=Path,
        action="append",
        default=[],
        metavar="ARTIFACT",
        help="another artifact of the same model, quantised, say, that runs the same variants (may be "
        "repeated)",
    )
    add_backend(bench)
    add_output(bench, "all figures", "write all figures")

    _add_eval(commands)

    tuning = command(
        commands,
        "tune",
        _tune,
        "find the fastest way of decoding that keeps the answers of your prompts",
        example="artifacts/llada-demo --data checkpoints/llada-demo/prompts.txt",
    )
    tuning.add_argument(
        "--data", type=Path, required=True, help="a prompt a line, or lines of JSON with prompt and answers"
    )
    tuning.add_argument(
        "--max-drop", type=float, default=1.0, help="points of right answers that may be lost (default 1)"
    )
    tuning.add_argument(
        "--match",
        default="exact",
        help="how answers are compared: exact (default), or json: values, whatever the order of keys",
    )
    tuning.add_argument("--count", type=int, help="prompts to use (default all)")
    tuning.add_argument("--gen-length", type=int, help="tokens to generate (default: the model's)")
    tuning.add_argument(
        "--block-length", type=int, help="tokens of a block of the baseline (default: the model's)"
    )
    tuning.add_argument(
        "--write",
        action="store_true",
        help="note the choice in the artifact: it holds where the user gives no options",
    )
    add_backend(tuning)
    add_output(tuning, "the choice and all trials", "write all trials")


def _add_eval(commands) -> None:  # type: ignore[no-untyped-def]
    evaluate = command(
        commands,
        "eval",
        _eval,
        "measure accuracy on tasks of lm-evaluation-harness",
        example="artifacts/llada-demo --tasks demo_plan --include-path benchmarks/tasks --chat --limit 40",
    )
    evaluate.add_argument("--tasks", required=True, metavar="NAMES", help="tasks, with commas")
    evaluate.add_argument(
        "--include-path",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="tasks as YAML files (may be repeated); lm-eval's own are then left out",
    )
    evaluate.add_argument(
        "--defaults", action="store_true", help="lm-eval's own tasks too, beside those of the directories"
    )
    evaluate.add_argument(
        "--num-fewshot", type=int, help="examples before each question (default the task's)"
    )
    evaluate.add_argument("--limit", type=int, help="questions of each task (default all)")
    evaluate.add_argument("--batch", type=int, default=8, help="answers decoded together (default 8)")
    evaluate.add_argument(
        "--chat", action="store_true", help="put questions into the artifact's chat template"
    )
    evaluate.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a prompt with its answer (default the model's), and of windows of long texts "
        "(default at most 4096)",
    )
    evaluate.add_argument(
        "--add-bos",
        default="auto",
        help="BOS token before texts: auto (as the tokenizer says; default), yes, no",
    )
    evaluate.add_argument(
        "--escape-until", action="store_true", help="leave answers whole, whatever stop strings a task has"
    )
    evaluate.add_argument("--gen-kwargs", metavar="A=1,B=2", help="generation options in place of the task's")
    evaluate.add_argument(
        "--mc-samples", type=int, default=128, help="forwards of a likelihood's estimate (default 128)"
    )
    evaluate.add_argument(
        "--check-greedy",
        action="store_true",
        help="also find out whether targets are what the model writes itself (slow)",
    )
    evaluate.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="let tasks run the code that the model writes (HumanEval, MBPP)",
    )
    add_decoding(evaluate)
    add_output(evaluate, "all results and settings", "write all results and settings")


def _replay(args: argparse.Namespace) -> int:
    if args.cases is None and args.record is None:
        raise DllmError("no cases: give CASES.json, or --record NEW.json to make some.")
    if args.record is not None and (args.output is not None or args.exact):
        raise DllmError("--record compares nothing: leave out --output and --exact.")
    if args.count < 1 or args.seed < 0:
        raise DllmError(f"--count is {args.count} and --seed {args.seed}, expected from 1 and from 0.")
    model = open_model(args)
    facts = model.manifest
    read = decode_cases.read_file(args.cases) if args.cases else None
    cases = decode_cases.random_cases(facts, args.count, args.seed) if read is None else read.cases
    ours = [case for case in cases if case.get("family", facts.model.family) == facts.model.family]
    if len(ours) < len(cases):
        say(args, f"left out: {len(cases) - len(ours)} cases of other families than {facts.model.family}")
    if not ours:
        raise DllmError(f"no case is of the family {facts.model.family}: nothing was compared.")
    if args.record is not None:
        shown = progress_of(args).each(ours, f"recording cases on {model.backend.name}")
        write_json(args.record, replay.record(model.backend, shown))
        report(
            args,
            {"recorded": len(ours), "file": str(args.record)},
            f"recorded {len(ours)} cases in {args.record}",
        )
        return 0
    return _compare(args, model, ours, read.format if read else decode_cases.FORMAT)


def _compare(args: argparse.Namespace, model: Model, cases: list[decode_cases.Case], written: int) -> int:
    dtype = model.manifest.model.dtype
    results, wrong, near, excused, differences = [], 0, 0, 0, list[dict[str, object]]()
    for case in progress_of(args).each(cases, "replaying cases"):
        done = replay.replay(model.backend, case)
        results.append(replay.with_confidence(done))
        found = replay.compare(case, done, 0.0 if args.exact else tolerances.CONFIDENCE[dtype])
        if found is None:
            continue
        if not replay.must_match(case, dtype):
            excused += 1
            continue
        say(args, str(found))
        differences.append(asdict(found))
        ambiguous = found.ambiguous and not args.exact
        near, wrong = near + ambiguous, wrong + (not ambiguous)
    if args.output is not None:
        write_json(
            args.output,
            {"format": written, "cases": [decode_cases.spelled_for(result, written) for result in results]},
        )
    expecting = sum("output" in case or "trace" in case for case in cases)
    if not expecting and args.output is None:
        raise DllmError(
            "no case says what to expect (output, trace): nothing was compared; give --output to keep the "
            "results."
        )
    value = {
        "cases": len(cases),
        "backend": model.backend.name,
        "dtype": dtype,
        "expecting": expecting,
        "mismatches": wrong,
        "ambiguous": near,
        "excused": excused,
        "differences": differences,
    }
    report(
        args,
        value,
        f"{len(cases)} cases on {model.backend.name} in {dtype}: {expecting} with expectations, "
        f"{wrong} mismatches, {near} ambiguous, {excused} not expected to hold in {dtype}",
    )
    return 1 if wrong else 0


def _bench(args: argparse.Namespace) -> int:
    from trt_runtime.measure import bench

    options = bench.options_of(args)
    measured = bench.run(open_model(args), options, progress_of(args))
    if args.output is not None:
        write_json(args.output, measured)
    report(args, measured, bench.table(measured))
    return 0


def _eval(args: argparse.Namespace) -> int:
    evaluation_notes.prepare(quiet=args.quiet)
    evaluation = import_optional("trt_runtime.measure.evaluation", "eval", commands.install("eval"))
    check_counts(args, "limit", "batch", "mc_samples", "max_length")
    tasks = [name for name in args.tasks.split(",") if name]
    if not tasks or (args.num_fewshot is not None and args.num_fewshot < 0):
        raise DllmError(
            f"--tasks is {args.tasks!r}, --num-fewshot {args.num_fewshot}: expected one task or more, and "
            f"from 0."
        )
    if missing := [path for path in args.include_path if not path.is_dir()]:
        raise DllmError(f"--include-path is {missing[0]}: no such directory.")
    model = open_model(args)
    config = config_of(args, model.manifest, may_draw=True)  # a task may ask for it
    config.resolved(model.manifest)
    harness = evaluation.Harness(
        model,
        config,
        batch=args.batch,
        samples=args.mc_samples,
        check_greedy=args.check_greedy,
        max_length=args.max_length,
        add_bos=args.add_bos,
        escape_until=args.escape_until,
    )
    harness.progress = progress_of(args)
    settings = evaluation.Settings(
        tuple(args.include_path),
        args.defaults or not args.include_path,
        args.num_fewshot,
        args.limit,
        args.chat,
        args.gen_kwargs,
        args.confirm_run_unsafe_code,
    )
    if args.confirm_run_unsafe_code:  # the metric that runs code asks for this as well
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    found = evaluation.run(harness, tasks, settings)
    report(args, found, evaluation.table(found))
    if args.output is not None:
        write_json(args.output, found)
    return 0


def _tune(args: argparse.Namespace) -> int:
    from trt_runtime.measure import tune

    check_counts(args, "count")
    if args.match not in examples.MATCHES:
        raise unknown("--match", args.match, examples.MATCHES)
    if not 0 <= args.max_drop <= 100:
        raise DllmError(f"--max-drop is {args.max_drop:g}, expected 0 to 100 points.")
    held = examples.read(args.data)[: args.count]
    model = open_model(args)
    base = GenerationConfig(gen_length=args.gen_length, block_length=args.block_length)
    with progress_of(args).task("trying ways of decoding"):
        found = tune.run(
            model, held, base, max_drop=args.max_drop, match=args.match, tell=lambda line: say(args, line)
        )
    words = " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in found["options"].items()
    )
    if args.output is not None:
        write_json(args.output, found)
    if args.write:
        tune.write(args.artifact, found["options"], model.manifest)
    right = f"{found['right']} of {found['examples']} right"
    if found["chosen"] == found["baseline"]:
        report(
            args,
            found,
            f"nothing within {args.max_drop:g} points is faster than the baseline: {right}: {words}",
        )
    else:
        report(
            args,
            found,
            f"{found['speedup']:.2f} times the baseline's tokens/s, {right} (baseline "
            f"{found['baseline_right']}): {words}",
        )
    if args.write:
        say(args, f"noted in {args.artifact / 'manifest.json'}")
    return 0
