"""The commands that compare and measure: replay, bench."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from trt_runtime.artifact.manifest import DecodingFacts
from trt_runtime.cli.options import add_backend, open_model, write_json
from trt_runtime.cli.parser import add_output, command, progress_of, report, say
from trt_runtime.errors import DllmError
from trt_runtime.measure import cases as decode_cases
from trt_runtime.measure import recordings, replay, tolerances
from trt_runtime.measure.case_fields import Case
from trt_runtime.model import Model


def add(commands) -> None:  # type: ignore[no-untyped-def]
    """Add the commands to the parser's subcommands."""
    _add_replay(commands)
    _add_bench(commands)


def _add_replay(commands) -> None:  # type: ignore[no-untyped-def]
    parser = command(
        commands,
        "replay",
        _replay,
        "run recorded decoding cases and compare the results, or record new cases",
        example="artifacts/llada-demo checkpoints/llada-demo/cases.json",
    )
    option = parser.add_argument
    cases = "cases to run; optional with --record"
    option("cases", nargs="?", type=Path, metavar="CASES.json", help=cases)
    record = "record cases with this backend, for the prompts of CASES.json or for random ones"
    option("--record", type=Path, metavar="NEW.json", help=record)
    option("--count", type=int, default=24, help="random cases to record (default 24)")
    option("--seed", type=int, default=0, help="seed of the random prompts (default 0)")
    option("--exact", action="store_true", help="count AMBIGUOUS differences as mismatches")
    add_backend(parser)
    add_output(parser, "the comparison", "write the result of each case")


def _add_bench(commands) -> None:  # type: ignore[no-untyped-def]
    parser = command(
        commands,
        "bench",
        _bench,
        "measure caches and parallel unmasking side by side",
        example="artifacts/llada-demo --prompts checkpoints/llada-demo/prompts.txt",
    )
    option = parser.add_argument
    option("--prompts", type=Path, help="a file with one prompt per line (default: random token ids)")
    option("--prompt-length", type=int, default=64, help="tokens of a random prompt (default 64)")
    option("--count", type=int, default=4, help="prompts per run (default 4)")
    option("--repeats", type=int, default=3, help="interleaved runs of every variant (default 3)")
    option("--gen-length", type=int, help="tokens to generate (default: the model's)")
    option("--block-length", type=int, help="tokens per block (default: the model's)")
    threshold = "confidence threshold of the parallel variants (default 0.9)"
    option("--threshold", type=float, default=0.9, help=threshold)
    tokens = "measure a fixed schedule of this many tokens per forward instead"
    option("--tokens-per-step", type=int, help=tokens)
    variants = "variants to run, e.g. none,dual (default: all)"
    option("--variants", default="", metavar="NAMES", help=variants)
    reference = "variants to run on PyTorch too, e.g. none,dual, or 'all'"
    option("--reference", default="", metavar="NAMES", help=reference)
    dtypes = "dtypes of the PyTorch runs, e.g. fp32,bf16 (default: the artifact's)"
    option("--reference-dtypes", default="", metavar="NAMES", help=dtypes)
    beside = "another artifact of the same model, for example a quantised one, that runs the same variants "
    beside += "(may be repeated)"
    option("--beside", type=Path, action="append", default=[], metavar="ARTIFACT", help=beside)
    add_backend(parser)
    add_output(parser, "all figures", "write all figures")


def _replay(args: argparse.Namespace) -> int:
    if args.cases is None and args.record is None:
        raise DllmError("no cases: give CASES.json, or record some with --record NEW.json.")
    if args.record is not None and (args.output is not None or args.exact):
        raise DllmError("--record does not compare: remove --output and --exact.")
    if args.count < 1 or args.seed < 0:
        raise DllmError(f"--count is {args.count} and --seed {args.seed}, expected from 1 and from 0.")
    model = open_model(args)
    facts = model.manifest
    read = recordings.read_file(args.cases, facts.model.family) if args.cases else None
    cases = decode_cases.random_cases(facts, args.count, args.seed) if read is None else read.cases
    if read is not None:
        if read.skipped:
            say(args, f"skipped: {read.skipped} cases of other families than {facts.model.family}")
        for line in recordings.described(read):
            say(args, line)
    ours = _of_attention(args, cases, facts.decoding)
    if not ours:
        raise DllmError(
            f"no case is of the family {facts.model.family}, so nothing was compared: give other cases."
        )
    if args.record is not None:
        shown = progress_of(args).each(ours, f"recording cases on {model.backend.name}")
        write_json(args.record, replay.record(model.backend, shown))
        report(
            args,
            {"recorded": len(ours), "file": str(args.record)},
            f"recorded {len(ours)} cases in {args.record}",
        )
        return 0
    assert read is not None
    return _compare(args, model, ours, read)


def _of_attention(args: argparse.Namespace, cases: list[Case], decoding: DecodingFacts) -> list[Case]:
    """The cases that were recorded with the artifact's kind of attention."""
    is_other = recordings.has_block_causal_attention
    other, own = "block-causal", "full"
    if decoding.is_block_causal:
        is_other, other, own = recordings.has_full_attention, own, other
    kept = [case for case in cases if not is_other(case)]
    if len(kept) < len(cases):
        say(args, f"skipped: {len(cases) - len(kept)} cases of {other} attention; this artifact has {own}")
    return kept


def _compare(args: argparse.Namespace, model: Model, cases: list[Case], read: recordings.CaseFile) -> int:
    dtype = model.manifest.model.dtype
    results, wrong, near, excused, differences = [], 0, 0, 0, list[dict[str, object]]()
    for case in progress_of(args).each(cases, "replaying cases"):
        margin = 0.0 if args.exact else tolerances.CONFIDENCE[dtype]
        done, difference = replay.replay_and_compare(model.backend, case, margin)
        results.append(replay.with_confidence(done))
        if difference is None:
            continue
        if not replay.must_match(case, dtype):
            excused += 1
            continue
        say(args, str(difference))
        differences.append(asdict(difference))
        ambiguous = difference.ambiguous and not args.exact
        near, wrong = near + ambiguous, wrong + (not ambiguous)
    if args.output is not None:
        answered = [read.answer(case, result) for case, result in zip(cases, results, strict=True)]
        write_json(args.output, {"format": read.format, "cases": answered})
    expecting = sum("output" in case or "trace" in case for case in cases)
    if not expecting and args.output is None:
        raise DllmError(
            "no case has an expected result (output, trace): nothing was compared; use --output to keep the "
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
