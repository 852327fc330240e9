"""The commands that evaluate answers: eval, tune."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from trt_runtime.cli.options import add_backend, add_decoding, config_of, open_model, write_json
from trt_runtime.cli.parser import add_output, command, progress_of, report, say
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError, check_counts, unknown
from trt_runtime.measure import evaluation_notes, examples
from trt_runtime.optional import import_optional
from trt_runtime.system import commands as advice


def add(commands) -> None:  # type: ignore[no-untyped-def]
    """Add the commands to the parser's subcommands."""
    _add_eval(commands)
    _add_tune(commands)


def _add_eval(commands) -> None:  # type: ignore[no-untyped-def]
    parser = command(
        commands,
        "eval",
        _eval,
        "measure accuracy on tasks of lm-evaluation-harness",
        example="artifacts/llada-demo --tasks demo_plan --include-path benchmarks/tasks --chat --limit 40",
    )
    option = parser.add_argument
    option("--tasks", required=True, metavar="NAMES", help="tasks, separated by commas")
    include = "a directory of tasks as YAML files (may be repeated); lm-eval's own tasks are then not loaded"
    option("--include-path", type=Path, action="append", default=[], metavar="DIR", help=include)
    defaults = "load lm-eval's own tasks in addition to those of --include-path"
    option("--defaults", action="store_true", help=defaults)
    option("--num-fewshot", type=int, help="examples before each question (default: the task's)")
    option("--limit", type=int, help="questions per task (default: all)")
    option("--batch", type=int, default=8, help="answers decoded together (default 8)")
    option("--chat", action="store_true", help="put questions into the artifact's chat template")
    length = "most tokens of a prompt with its answer (default: the model's), and of windows of long texts "
    length += "(default: at most 4096)"
    option("--max-length", type=int, metavar="N", help=length)
    bos = "put a BOS token before texts: auto (as the tokenizer does; default), yes, no"
    option("--add-bos", default="auto", help=bos)
    until = "ignore the tasks' stop strings and keep answers whole"
    option("--escape-until", action="store_true", help=until)
    kwargs = "generation options that replace the task's"
    option("--gen-kwargs", metavar="A=1,B=2", help=kwargs)
    samples = "forwards per estimate of a likelihood (default 128)"
    option("--mc-samples", type=int, default=128, help=samples)
    greedy = "also check whether greedy decoding generates the target (slow)"
    option("--check-greedy", action="store_true", help=greedy)
    code = "let tasks run the code that the model writes (HumanEval, MBPP)"
    option("--confirm-run-unsafe-code", action="store_true", help=code)
    add_decoding(parser)
    add_output(parser, "all results and settings", "write all results and settings")


def _add_tune(commands) -> None:  # type: ignore[no-untyped-def]
    parser = command(
        commands,
        "tune",
        _tune,
        "find the fastest decoding options that keep the answers to your prompts",
        example="artifacts/llada-demo --data checkpoints/llada-demo/prompts.txt",
    )
    option = parser.add_argument
    data = "one prompt per line, or JSON lines with prompts and answers"
    option("--data", type=Path, required=True, help=data)
    drop = "percentage points of right answers that may be lost (default 1)"
    option("--max-drop", type=float, default=1.0, help=drop)
    match = "how answers are compared: exact (default), or json (the same values, in any order of keys)"
    option("--match", default="exact", help=match)
    option("--count", type=int, help="prompts to use (default: all)")
    option("--gen-length", type=int, help="tokens to generate (default: the model's)")
    option("--block-length", type=int, help="tokens per block of the baseline (default: the model's)")
    write = "record the choice in the artifact; it applies wherever the user gives no options"
    option("--write", action="store_true", help=write)
    add_backend(parser)
    add_output(parser, "the choice and all trials", "write all trials")


def _eval(args: argparse.Namespace) -> int:
    evaluation_notes.prepare(quiet=args.quiet)
    evaluation = import_optional("trt_runtime.measure.evaluation", "eval", advice.install("eval"))
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
    results = evaluation.run(harness, tasks, settings)
    report(args, results, evaluation.table(results))
    if args.output is not None:
        write_json(args.output, results)
    return 0


def _tune(args: argparse.Namespace) -> int:
    from trt_runtime.measure import tune

    check_counts(args, "count")
    if args.match not in examples.MATCHES:
        raise unknown("--match", args.match, examples.MATCHES)
    if not 0 <= args.max_drop <= 100:
        raise DllmError(f"--max-drop is {args.max_drop:g}, expected 0 to 100 points.")
    prompts = examples.read(args.data)[: args.count]
    model = open_model(args)
    base = GenerationConfig(gen_length=args.gen_length, block_length=args.block_length)
    with progress_of(args).task("trying decoding options"):
        result = tune.run(
            model, prompts, base, max_drop=args.max_drop, match=args.match, tell=lambda line: say(args, line)
        )
    options = " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in result["options"].items()
    )
    if args.output is not None:
        write_json(args.output, result)
    if args.write:
        tune.write(args.artifact, result["options"], model.manifest)
    right = f"{result['right']} of {result['examples']} right"
    if result["chosen"] == result["baseline"]:
        text = f"nothing within {args.max_drop:g} points is faster than the baseline: {right}: {options}"
    else:
        text = f"{result['speedup']:.2f} times the baseline's tokens/s, {right} (baseline "
        text += f"{result['baseline_right']}): {options}"
    report(args, result, text)
    if args.write:
        say(args, f"recorded in {args.artifact / 'manifest.json'}")
    return 0
