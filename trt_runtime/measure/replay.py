"""Replay recorded decode cases on a backend, compare, and record new ones. Token ids in and out; no
tokenizer.

The format of a case: cases.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from trt_runtime.decoding.backend import Backend
from trt_runtime.decoding.cache_plan import PREFILL, STORE
from trt_runtime.decoding.generator import Generator
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.errors import DllmError
from trt_runtime.measure.case_fields import AT_END_TOKEN, AT_LAST_BLOCK, INPUTS, Case
from trt_runtime.measure.cases import CaseRow, rows_of
from trt_runtime.measure.near_ties import is_near
from trt_runtime.measure.recordings import FORMAT, has_block_causal_attention


@dataclass(frozen=True)
class Replayed:
    """A case that was run: the finished rows, and {"id", "output", "nfe", "trace"} in the form of a file."""

    rows: list[Sequence]
    result: Case


@dataclass(frozen=True)
class Mismatch:
    """The first difference of a case, in words. AMBIGUOUS: a change of confidence within the dtype's margin
    explains it."""

    id: str
    where: str
    ambiguous: bool = False

    def __str__(self) -> str:
        return f"{'AMBIGUOUS' if self.ambiguous else 'MISMATCH'} {self.id}: {self.where}"


def replay(backend: Backend, case: Case) -> Replayed:
    """Run one case, with all its rows as one batch."""
    return replay_together(backend, [case])[0]


def replay_together(backend: Backend, cases: list[Case]) -> list[Replayed]:
    """Run several cases as one batch: each must give the same result as alone."""
    groups = [rows_of(backend.manifest, case) for case in cases]
    if (
        any(row.sequence.rules.sampler.needs_logits for rows in groups for row in rows)
        and not backend.gives_logits
    ):
        raise DllmError(
            f"a case needs logits, which {backend.name} does not return: export the artifact with --head "
            f"logits."
        )
    Generator(backend, [row.sequence for rows in groups for row in rows]).run()
    return [replayed(case, rows) for case, rows in zip(cases, groups, strict=True)]


def replayed(case: Case, rows: list[CaseRow]) -> Replayed:
    """The result of a case whose rows are finished, however they were run."""
    return Replayed([row.sequence for row in rows], _result(case, rows))


def with_confidence(replayed: Replayed) -> Case:
    """The result with one more entry in each step of its trace: the confidence of each committed position,
    null if it is unknown."""
    traces = [[step.confidence for step in row.trace] for row in replayed.rows]
    merged = [
        [*step, [value for trace in traces if number < len(trace) for value in trace[number]]]
        for number, step in enumerate(replayed.result["trace"])
    ]
    return {**replayed.result, "trace": merged}


def compare(case: Case, replayed: Replayed, margin: float = 0.0) -> Mismatch | None:
    """The first difference between a case's expected result and the actual one; None if they agree or the
    case expects nothing.

    Expected forwards that wrote nothing are skipped, unless they store keys and values. `margin`: the change
    of confidence within which a decision is AMBIGUOUS. Fast-dLLM's v1 code may leave mask tokens, which this
    runtime never does. If they are in the prompt, only the recorded steps are compared, because the forwards
    that fill the other gaps come after them; if they are in the output, the trace is compared up to the first
    forward that wrote nothing.
    """
    name, result, trace = str(case.get("id")), replayed.result, _steps(case)
    mask = case.get("mask_token_id")
    # a block-causal recording that ended at a stop token has masks behind it, and so has our result
    left_masks = not has_block_causal_attention(case) and any(mask in row for row in case.get("output", []))
    left_gaps = left_masks or any(mask in row for row in case.get("full_output", []))
    expected = [
        step
        for step in (list(takewhile(lambda step: step[3], trace)) if left_masks else trace)
        if step[3] or len(step) == 7 or step[0] in (PREFILL, STORE)
    ]
    if left_masks and not expected:
        return Mismatch(
            name,
            "output: contains mask tokens, which are never left here, and the case has no trace to compare",
        )
    got = result["trace"][: len(expected)] if left_gaps else result["trace"]
    if "trace" in case:
        for number, (mine, theirs) in enumerate(zip(got, expected, strict=False)):
            if mine != theirs:
                near = len(replayed.rows) == 1 and is_near(replayed.rows[0], number, theirs, margin)
                return Mismatch(name, f"step {number}: {_difference(theirs, mine)}", near)
        if len(got) != len(expected):
            where = f"step {min(len(got), len(expected))}: expected {len(expected)} forwards, got {len(got)}"
            return Mismatch(name, where)
    if "output" in case and not left_masks and result["output"] != case["output"]:
        return Mismatch(name, f"output: {_first_token(case['output'], result['output'])}")
    if "full_output" in case and not left_gaps and result.get("full_output") != case["full_output"]:
        return Mismatch(
            name, f"full_output: {_first_token(case['full_output'], result.get('full_output', []))}"
        )
    nfe = case.get("nfe_nonempty", case.get("nfe"))
    differs = nfe is not None and not left_gaps and result["nfe"] != nfe
    return Mismatch(name, f"nfe: expected {nfe}, got {result['nfe']}") if differs else None


def replay_and_compare(backend: Backend, case: Case, margin: float = 0.0) -> tuple[Replayed, Mismatch | None]:
    """Run a case and compare it. Steps that a device commits by itself have no confidences on the host: a
    difference there is judged by the confidences of a run with one step per synchronisation, if that run
    makes the same decisions."""
    done = replay(backend, case)
    difference = compare(case, done, margin)
    steps_per_sync = backend.steps_per_sync
    if difference is None or difference.ambiguous or not margin or steps_per_sync == 1:
        return done, difference
    backend.steps_per_sync = 1
    try:
        seen = replay(backend, case)
    finally:
        backend.steps_per_sync = steps_per_sync
    is_same = seen.result["trace"] == done.result["trace"]
    return done, compare(case, seen, margin) if is_same else difference


@dataclass(frozen=True)
class Agreement:
    """How far a case was followed: compared decisions, how many of them were AMBIGUOUS, the first mismatch,
    if any, and how many of the AMBIGUOUS ones were excused by another expert."""

    decisions: int
    ambiguous: int
    mismatch: Mismatch | None
    excused: int = 0


Decision = tuple[list[int], list[int]]  # positions that are committed together, and their tokens


# whether another decision on this canvas [L], whose positions see as far as [L] (None: everywhere), proves
# nothing, because a router's choice of experts lies within rounding
Excuse = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any] | None], bool]


def follow(backend: Backend, case: Case, margin: float, excuse: Excuse | None = None) -> Agreement:
    """Compare every decision of a recorded case of one row, each after the recorded history: whatever is
    decided here, the recorded tokens are written. So one AMBIGUOUS decision does not hide the rest."""
    return _follow(backend, case, _steps(case), margin, "step", excuse)


def follow_decisions(
    backend: Backend,
    case: Case,
    decisions: Iterable[Decision],
    margin: float,
    excuse: Excuse | None = None,
) -> Agreement:
    """As `follow`, for decisions that another loop made: its forwards had other windows, and forwards without
    candidates, which only store keys and values, have no counterpart in it."""
    return _follow(backend, case, [list(decision) for decision in decisions], margin, "decision", excuse)


def _follow(
    backend: Backend,
    case: Case,
    expected: list[list[Any]],
    margin: float,
    word: str,
    excuse: Excuse | None,
) -> Agreement:
    """expected: steps, or the last two entries of steps: positions and tokens. word: what to call one."""
    (row,) = rows_of(backend.manifest, case)
    generator, name, ambiguous = Generator(backend, [row.sequence]), str(case.get("id")), 0
    excused = 0
    for number, item in enumerate(expected):
        any_window = len(item) == 2
        positions, tokens, *edits = item if any_window else item[3:]
        written = (positions + edits[0], tokens + edits[1]) if edits else (positions, tokens)
        while any_window and not row.sequence.is_finished and not row.sequence.next_forward().candidates.size:
            generator.step()
        if row.sequence.is_finished:
            where = f"{word} {number}: expected {len(expected)} forwards"
            return Agreement(number, ambiguous, Mismatch(name, where))
        before = row.sequence.canvas.copy()
        generator.step({0: written})
        got = list(row.as_list(row.sequence.trace[-1]))
        wanted = [*got[:3], *item] if any_window else item
        if got == wanted:
            continue
        if not is_near(row.sequence, len(row.sequence.trace) - 1, wanted, margin):
            if excuse is not None and excuse(before, row.sequence.reach):
                excused, ambiguous = excused + 1, ambiguous + 1
                continue
            where = f"{word} {number}: {_difference(wanted, got)}"
            return Agreement(number + 1, ambiguous, Mismatch(name, where), excused)
        ambiguous += 1
    return Agreement(len(expected), ambiguous, None, excused)


def _steps(case: Case) -> list[list[Any]]:
    """The steps that a case expects, without confidences: five entries, and with editing two more."""
    return [step[: 7 if len(step) > 6 else 5] for step in case.get("trace", [])]


def must_match(case: Case, dtype: str) -> bool:
    """Whether a case claims to hold in a dtype: recorded cases say so under `matches`; fp32 always must."""
    return bool(dtype == "fp32" or case.get("matches", {}).get(dtype, True))


def record(backend: Backend, cases: Iterable[Case]) -> dict[str, Any]:
    """A file of cases: the inputs of `cases` with this backend's results."""
    facts, recorded = backend.manifest, []
    for case in cases:
        inputs = {key: case[key] for key in INPUTS if key in case}
        inputs.setdefault("mask_token_id", facts.decoding.mask_token_id)
        recorded.append(inputs | replay(backend, case).result)
    return {
        "format": FORMAT,
        "reference": f"dllm-trt, backend {backend.name}, {facts.model.dtype}",
        "cases": recorded,
    }


def _result(case: Case, rows: list[CaseRow]) -> Case:
    whole = [[*row.padding, *row.sequence.canvas.tolist()] for row in rows]
    result: Case = {
        "id": case.get("id"),
        "output": [_output(case, row.sequence) for row in rows],
        "nfe": max(row.sequence.nfe for row in rows),
        "trace": _trace(rows),
    }
    filled = any(
        canvas[: len(prompt)] != prompt for canvas, prompt in zip(whole, case["prompt"], strict=True)
    )
    if filled or "attention_mask" in case:
        result["full_output"] = whole
    return result


def _output(case: Case, row: Sequence) -> list[int]:
    """The generated part, as far as the case's output goes."""
    output: list[int] = row.output.tolist()
    if case.get("output_ends") == AT_LAST_BLOCK:
        return [token for token in output if token != row.rules.mask_token_id]
    return output[: row.num_useful + 1] if case.get("output_ends") == AT_END_TOKEN else output


def _trace(rows: list[CaseRow]) -> list[list[Any]]:
    """The rows' steps; several rows are merged forward by forward."""
    traces = [[row.as_list(step) for step in row.sequence.trace] for row in rows]
    if len(rows) == 1:
        return [list(step) for step in traces[0]]
    merged = []
    for number in range(max(len(trace) for trace in traces)):
        steps = [(i, trace[number]) for i, trace in enumerate(traces) if number < len(trace)]
        kind, start, length = steps[0][1][:3]
        pairs = range(3, len(steps[0][1]), 2)  # commits and, with editing, edits
        written: list[list[Any]] = []
        for at in pairs:
            written.append([[i, position] for i, step in steps for position in step[at]])
            written.append([token for _, step in steps for token in step[at + 1]])
        merged.append([kind, start, length, *written])
    return merged


def _difference(expected: list[Any], got: list[Any]) -> str:
    for what, mine, theirs in zip(("kind", "window start", "window length"), got, expected, strict=False):
        if mine != theirs:
            return f"{what}: expected {theirs}, got {mine}"
    for at, word in ((3, "positions"), (5, "edits of")):
        if got[at : at + 2] == expected[at : at + 2]:
            continue
        if len(got) != len(expected):
            return f"edits: expected {expected[5:]}, got {got[5:]}"
        if got[at] != expected[at]:
            first = next((p for p in got[at] + expected[at] if (p in got[at]) != (p in expected[at])), None)
            return f"position {first}: expected {word} {expected[at]}, got {got[at]}"
        both = zip(expected[at], expected[at + 1], got[at + 1], strict=True)
        position, theirs, mine = next(item for item in both if item[1] != item[2])
        return f"position {position}: expected token {theirs}, got {mine}"
    return "the same"


def _first_token(expected: list[list[int]], got: list[list[int]]) -> str:
    for row, (theirs, mine) in enumerate(zip(expected, got, strict=False)):
        for i, (wanted, token) in enumerate(zip(theirs, mine, strict=False)):
            if wanted != token:
                return f"row {row}, generated token {i}: expected {wanted}, got {token}"
    return f"expected {[len(row) for row in expected]} tokens, got {[len(row) for row in got]}"
