"""Replay recorded decode cases on a backend, compare, and record new ones. Token ids in and out; no tokenizer.

A case: id, family, mode (none|prefix|dual), prompt (a list of rows), gen_length, block_length, steps, threshold (null with
a fixed schedule), and what is expected: output, nfe (or nfe_nonempty, which leaves out forwards that wrote nothing), trace
(a list of [kind, start, length, positions, tokens]; with several rows the positions are [row, position] pairs).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trt_runtime.backends.base import Backend
from trt_runtime.config import CACHES, GenerationConfig
from trt_runtime.errors import DllmError, unknown
from trt_runtime.generator import Generator
from trt_runtime.manifest import Manifest
from trt_runtime.model import check_prompt
from trt_runtime.policies import Factor, Fixed, Policy, Threshold
from trt_runtime.sequence import Rules, Sequence

Case = dict[str, Any]


def read_cases(path: Path) -> list[Case]:
    """The cases of a file: {"cases": [...]} or a plain list. Raises DllmError."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DllmError(f"{path}: not readable as JSON ({error}): give a file of recorded cases.") from error
    cases = read.get("cases") if isinstance(read, dict) else read
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise DllmError(f'{path}: holds no cases: expected {{"cases": [...]}} (make some with replay --record).')
    return cases


@dataclass(frozen=True)
class Replayed:
    """A case that was run: the rows as they ended, and {"id", "output", "nfe", "trace"} as it is written to a file."""

    rows: list[Sequence]
    result: Case


@dataclass(frozen=True)
class Mismatch:
    """The first difference of a case, in words. AMBIGUOUS: a change of confidence within the dtype's margin explains it."""

    id: str
    where: str
    ambiguous: bool = False

    def __str__(self) -> str:
        return f"{'AMBIGUOUS' if self.ambiguous else 'MISMATCH'} {self.id}: {self.where}"


def replay(backend: Backend, case: Case) -> Replayed:
    """Run one case; all its rows as one batch."""
    return replay_together(backend, [case])[0]


def replay_together(backend: Backend, cases: list[Case]) -> list[Replayed]:
    """Run several cases as one batch: each must come out as it does alone."""
    rows = [_rows(backend.manifest, case) for case in cases]
    Generator(backend, [row for group in rows for row in group]).run()
    return [Replayed(group, _result(case, group)) for case, group in zip(cases, rows, strict=True)]


def compare(case: Case, replayed: Replayed, margin: float = 0.0) -> Mismatch | None:
    """The first difference between what a case expects and what came out; None where it agrees or expects nothing.

    Forwards that wrote nothing are not expected. `margin`: of confidence, within which a decision is AMBIGUOUS.
    The v1 code may leave mask tokens in the prompt (they stand in `full_output`): then only the steps that it made are
    compared, and the forwards that fill the rest of the gaps come after them.
    """
    name, result = str(case.get("id")), replayed.result
    expected = [step for step in case.get("trace", []) if step[3]]
    left_gaps = any(case.get("mask_token_id") in row for row in case.get("full_output", []))
    got = result["trace"][: len(expected)] if left_gaps else result["trace"]
    if "trace" in case:
        for number, (mine, theirs) in enumerate(zip(got, expected, strict=False)):
            if mine != theirs:
                near = len(replayed.rows) == 1 and _is_near(replayed.rows[0], number, theirs, margin)
                return Mismatch(name, f"step {number}: {_difference(theirs, mine)}", near)
        if len(got) != len(expected):
            where = f"step {min(len(got), len(expected))}: expected {len(expected)} forwards, got {len(got)}"
            return Mismatch(name, where)
    if "output" in case and result["output"] != case["output"]:
        return Mismatch(name, f"output: {_first_token(case['output'], result['output'])}")
    if "full_output" in case and not left_gaps and result.get("full_output") != case["full_output"]:
        return Mismatch(name, f"full_output: {_first_token(case['full_output'], result.get('full_output', []))}")
    nfe = case.get("nfe_nonempty", case.get("nfe"))
    if nfe is not None and not left_gaps and result["nfe"] != nfe:
        return Mismatch(name, f"nfe: expected {nfe}, got {result['nfe']}")
    return None


def _is_near(row: Sequence, number: int, expected: list[Any], margin: float) -> bool:
    """Whether moving the confidences in question by `margin` turns the decision of a step into the expected one."""
    seen = row.trace[number].seen
    if seen is None or row.trace[number].as_list()[:3] != expected[:3]:
        return False
    candidates, stats, state = seen
    if not set(expected[3]) <= set(candidates.tolist()) or row.rules.mask_token_id in expected[4]:
        return False
    wanted = np.isin(candidates, expected[3])
    chosen = np.isin(candidates, row.trace[number].positions)
    moved = stats.confidence + margin * (wanted & ~chosen) - margin * (chosen & ~wanted)
    again = row.rules.policy.select(replace(stats, confidence=moved), np.ones(len(candidates), np.bool_), state)
    tokens = dict(zip(expected[3], expected[4], strict=True))
    same_token = [tokens.get(int(p), t) == t for p, t in zip(candidates, stats.token, strict=True)]
    close = stats.confidence - stats.runner_up < margin
    return bool((again == wanted).all() and (same_token | close)[wanted].all())


def must_match(case: Case, dtype: str) -> bool:
    """Whether a case claims to hold in a dtype: recorded cases say so under `matches`; fp32 always must."""
    return bool(dtype == "fp32" or case.get("matches", {}).get(dtype, True))


def record(backend: Backend, cases: Iterable[Case]) -> dict[str, Any]:
    """A file of cases: the inputs of `cases` with what this backend makes of them."""
    facts, recorded = backend.manifest, []
    for case in cases:
        inputs = {key: case[key] for key in _INPUTS if key in case}
        inputs["mask_token_id"] = facts.decoding.mask_token_id
        recorded.append(inputs | replay(backend, case).result)
    return {
        "format": 1,
        "reference": f"dllm-trt, backend {backend.name}, {facts.model.dtype}",
        "cases": recorded,
    }


def random_cases(manifest: Manifest, count: int, seed: int = 0) -> list[Case]:
    """Inputs of `count` cases over random prompts, going through caches, policies, and lengths in turn."""
    rng = np.random.default_rng(seed)
    model, decoding = manifest.model, manifest.decoding
    special = {decoding.mask_token_id, decoding.pad_token_id, *decoding.eos_token_ids}
    words = np.array([token for token in range(model.vocab_size) if token not in special])
    options: list[Case] = [{"threshold": 0.9}, {"threshold": None}, {"threshold": 0.6}, {"threshold": None, "factor": 1.0}]
    cases = []
    for i in range(count):
        block = int(rng.choice([4, 8, 16]))
        gen = min(block * int(rng.integers(2, 5)), model.max_length // 2)
        prompt = rng.choice(words, int(rng.integers(1, max(2, min(48, model.max_length - gen)))))
        cases.append({
            "id": f"random-{seed}-{i}", "family": model.family, "mode": CACHES[i % 3], "prompt": [prompt.tolist()],
            "gen_length": gen, "block_length": block, "steps": gen // 2, **options[(i // 3) % len(options)],
        })  # fmt: skip
    return cases


_INPUTS = ("id", "family", "mode", "prompt", "gen_length", "block_length", "steps", "threshold", "factor")


def _rows(manifest: Manifest, case: Case) -> list[Sequence]:
    _check_case(case)
    if case.get("mask_token_id", manifest.decoding.mask_token_id) != manifest.decoding.mask_token_id:
        raise DllmError(
            f"case {case.get('id')}: mask_token_id is {case['mask_token_id']}, the artifact's is "
            f"{manifest.decoding.mask_token_id}: the case is of another model."
        )
    facts, gen, block = manifest.decoding, case["gen_length"], case["block_length"]
    # cases are facts about the loop: thresholds outside (0, 1] are allowed here, unlike in GenerationConfig
    config = replace(GenerationConfig(), gen_length=gen, block_length=block, infill=True)
    rules = Rules(gen, block, case["mode"], _policy(case), facts.mask_token_id, facts.eos_token_ids, facts.logit_shift)
    rows = []
    for prompt in case["prompt"]:
        check_prompt(prompt, config, manifest)
        rows.append(Sequence(np.array(prompt, np.int64), rules))
    return rows


def _check_case(case: Case) -> None:
    """Raise DllmError for a case whose fields are missing or of the wrong type."""

    def rows(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(row, list) and all(type(t) is int for t in row) for row in value)

    def number(value: Any) -> bool:
        return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))

    def step(value: Any) -> bool:
        kinds = (str, int, int, list, list)
        ok = isinstance(value, list) and len(value) == 5 and all(isinstance(v, k) for v, k in zip(value, kinds, strict=True))
        return ok and len(value[3]) == len(value[4]) and rows([value[4]])

    fixed = case.get("threshold") is None and case.get("factor") is None
    checks: dict[str, tuple[bool, Callable[[Any], bool], str]] = {
        "mode": (True, lambda v: isinstance(v, str), "a cache mode"),
        "prompt": (True, lambda v: rows(v) and len(v) > 0, "a list of rows of token ids"),
        "gen_length": (True, lambda v: type(v) is int and v >= 0, "a whole number"),
        "block_length": (True, lambda v: type(v) is int and v >= 1, "a whole number from 1"),
        "steps": (fixed, lambda v: type(v) is int and v >= 1 if fixed else number(v), "a whole number from 1"),
        "threshold": (False, number, "a number or null"),
        "factor": (False, number, "a number or null"),
        "output": (False, rows, "a list of rows of token ids"),
        "full_output": (False, rows, "a list of rows of token ids"),
        "trace": (
            False,
            lambda v: isinstance(v, list) and all(map(step, v)),
            "a list of [kind, start, length, positions, tokens]",
        ),
    }
    for key, (required, is_right, expected) in checks.items():
        if (required and key not in case) or (key in case and not is_right(case[key])):
            shown = f"{key} is {str(case[key])[:60]}" if key in case else f"has no '{key}'"
            raise DllmError(f"case {case.get('id')}: {shown}, expected {expected} (make cases with replay --record).")
    if case["mode"] not in CACHES:
        raise unknown("mode", case["mode"], CACHES)


def _policy(case: Case) -> Policy:
    if case.get("factor") is not None:
        return Factor(float(case["factor"]))
    if case.get("threshold") is not None:
        return Threshold(float(case["threshold"]))
    blocks = max(1, -(-case["gen_length"] // case["block_length"]))
    return Fixed(max(1, case["steps"] // blocks))


def _result(case: Case, rows: list[Sequence]) -> Case:
    result: Case = {
        "id": case.get("id"),
        "output": [row.output.tolist() for row in rows],
        "nfe": max(row.nfe for row in rows),
        "trace": _trace(rows),
    }
    if any((row.canvas[: row.prompt_length] != prompt).any() for row, prompt in zip(rows, case["prompt"], strict=True)):
        result["full_output"] = [row.canvas.tolist() for row in rows]
    return result


def _trace(rows: list[Sequence]) -> list[list[Any]]:
    """The rows' steps; several rows are merged forward by forward."""
    if len(rows) == 1:
        return [step.as_list() for step in rows[0].trace]
    merged = []
    for number in range(max(row.nfe for row in rows)):
        steps = [(i, row.trace[number]) for i, row in enumerate(rows) if number < row.nfe]
        first = steps[0][1]
        positions = [[i, position] for i, step in steps for position in step.positions]
        merged.append([first.kind, first.start, first.length, positions, [t for _, step in steps for t in step.tokens]])
    return merged


def _difference(expected: list[Any], got: list[Any]) -> str:
    for what, mine, theirs in zip(("kind", "window start", "window length"), got, expected, strict=False):
        if mine != theirs:
            return f"{what}: expected {theirs}, got {mine}"
    if got[3] != expected[3]:
        first = next((p for p in got[3] + expected[3] if (p in got[3]) != (p in expected[3])), None)
        return f"position {first}: expected positions {expected[3]}, got {got[3]}"
    position, theirs, mine = next(item for item in zip(expected[3], expected[4], got[4], strict=True) if item[1] != item[2])
    return f"position {position}: expected token {theirs}, got {mine}"


def _first_token(expected: list[list[int]], got: list[list[int]]) -> str:
    for row, (theirs, mine) in enumerate(zip(expected, got, strict=False)):
        for i, (wanted, token) in enumerate(zip(theirs, mine, strict=False)):
            if wanted != token:
                return f"row {row}, generated token {i}: expected {wanted}, got {token}"
    return f"expected {[len(row) for row in expected]} tokens, got {[len(row) for row in got]}"
