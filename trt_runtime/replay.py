"""Replay recorded decode cases on a backend, compare, and record new ones. Token ids in and out; no tokenizer.

A case: id, family, mode (none|prefix|dual), prompt (a list of rows), gen_length, block_length, steps, threshold (null with
a fixed schedule) or alg (Dream's name of the policy), top_p, top_k, attention_mask (false for padding at the left of a row), and
what is expected: output, nfe (or nfe_nonempty, which leaves out forwards that wrote nothing), trace (a list of [kind, start,
length, positions, tokens]; with several rows the positions are [row, position] pairs).

A model that decodes without a cache in one block (Dream) takes `block_length` with the cached modes only, and there `steps` does
not bound a threshold; without a cache it does (policies.Threshold).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from trt_runtime.backends.base import Backend
from trt_runtime.config import CACHES, GenerationConfig
from trt_runtime.errors import DllmError, unknown
from trt_runtime.generator import Generator
from trt_runtime.manifest import CATEGORICAL, Manifest
from trt_runtime.model import check_prompt
from trt_runtime.policies import (
    Entropy,
    Factor,
    Fixed,
    MaskgitPlus,
    Origin,
    Policy,
    Threshold,
    TopkMargin,
)  # fmt: skip
from trt_runtime.sampling import Sampler
from trt_runtime.sequence import FULL, Rules, Sequence, Step

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
class _Row:
    """A row of a case: `padding` tokens at its left are not part of it, and shift what its trace says."""

    sequence: Sequence
    padding: list[int]

    def as_list(self, step: Step) -> tuple[str, int, int, list[int], list[int]]:
        pad = len(self.padding)
        start, length = (0, step.length + pad) if step.kind == FULL else (step.start + pad, step.length)
        return step.kind, start, length, [position + pad for position in step.positions], step.tokens


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
    groups = [_rows(backend.manifest, case) for case in cases]
    if any(row.sequence.rules.sampler.needs_logits for rows in groups for row in rows) and not backend.gives_logits:
        raise DllmError(f"a case filters logits, which {backend.name} does not give: export the artifact with --head logits.")
    Generator(backend, [row.sequence for rows in groups for row in rows]).run()
    return [Replayed([row.sequence for row in rows], _result(case, rows)) for case, rows in zip(cases, groups, strict=True)]


def compare(case: Case, replayed: Replayed, margin: float = 0.0) -> Mismatch | None:
    """The first difference between what a case expects and what came out; None where it agrees or expects nothing.

    Forwards that wrote nothing are not expected. `margin`: of confidence, within which a decision is AMBIGUOUS.
    The v1 code may leave mask tokens behind, which is never done here. Where they stand in the prompt, only the steps that it
    made are compared, and the forwards that fill the rest of the gaps come after them; where they stand in the output, its
    trace is followed up to the first forward that wrote nothing.
    """
    name, result, trace = str(case.get("id")), replayed.result, case.get("trace", [])
    mask = case.get("mask_token_id")
    left_masks = any(mask in row for row in case.get("output", []))
    left_gaps = left_masks or any(mask in row for row in case.get("full_output", []))
    expected = [step for step in (list(takewhile(lambda step: step[3], trace)) if left_masks else trace) if step[3]]
    got = result["trace"][: len(expected)] if left_gaps else result["trace"]
    if "trace" in case:
        for number, (mine, theirs) in enumerate(zip(got, expected, strict=False)):
            if mine != theirs:
                near = len(replayed.rows) == 1 and _is_near(replayed.rows[0], number, theirs, margin)
                return Mismatch(name, f"step {number}: {_difference(theirs, mine)}", near)
        if len(got) != len(expected):
            where = f"step {min(len(got), len(expected))}: expected {len(expected)} forwards, got {len(got)}"
            return Mismatch(name, where)
    if "output" in case and not left_masks and result["output"] != case["output"]:
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
    change = margin * (wanted & ~chosen) - margin * (chosen & ~wanted)
    # an error e of the logits moves a probability by up to e/4, and an entropy by e times the spread of the log-probabilities
    moved = replace(stats, confidence=stats.confidence + change, entropy=stats.entropy - 10 * change,
                    best=None if stats.best is None else stats.best + change)  # fmt: skip
    again = row.rules.policy.select(moved, np.ones(len(candidates), np.bool_), state)
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
    options: list[Case] = [{"threshold": 0.9}, {"threshold": None}, {"alg": "topk_margin"}, {"threshold": None, "factor": 1.0}]
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


_INPUTS = ("id", "family", "mode", "prompt", "gen_length", "block_length", "steps", "threshold", "factor", "alg", "top_p",
           "top_k", "attention_mask")  # fmt: skip


def _rows(manifest: Manifest, case: Case) -> list[_Row]:
    _check_case(case)
    if case.get("mask_token_id", manifest.decoding.mask_token_id) != manifest.decoding.mask_token_id:
        raise DllmError(
            f"case {case.get('id')}: mask_token_id is {case['mask_token_id']}, the artifact's is "
            f"{manifest.decoding.mask_token_id}: the case is of another model."
        )
    facts, gen = manifest.decoding, case["gen_length"]
    block = None if case["mode"] == "none" and not facts.blocks_without_cache else case.get("block_length")
    if block is None and (case["mode"] != "none" or facts.blocks_without_cache):
        raise DllmError(f"case {case.get('id')}: has no 'block_length', which mode '{case['mode']}' of this model needs.")
    # cases are facts about the loop: thresholds outside (0, 1] are allowed here, unlike in GenerationConfig
    config = replace(GenerationConfig(), gen_length=gen, block_length=block, infill=True)
    top_p, top_k = case.get("top_p"), case.get("top_k")
    sampler = Sampler(facts.sampling, 0.0, 1.0 if top_p is None else top_p, top_k)
    if sampler.needs_logits and facts.sampling != CATEGORICAL:
        raise DllmError(f"case {case.get('id')}: has top_p or top_k, which this model's sampling does not know.")
    rules = Rules(gen, block, case["mode"], _policy(case, block), facts.mask_token_id, facts.eos_token_ids, facts.logit_shift,
                  sampler=sampler, first_commit=facts.first_commit)  # fmt: skip
    rows = []
    for prompt, mask in zip(case["prompt"], case.get("attention_mask") or [None] * len(case["prompt"]), strict=True):
        pad = 0 if mask is None else mask.index(True)
        check_prompt(prompt[pad:], config, manifest)
        rows.append(_Row(Sequence(np.array(prompt[pad:], np.int64), rules), prompt[:pad]))
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

    def padding(value: Any) -> bool:
        """A mask as long as each prompt, whose false entries stand at the left of true ones."""
        prompts = case["prompt"]
        return isinstance(value, list) and len(value) == len(prompts) and all(
            isinstance(row, list) and len(row) == len(prompt) and all(type(item) is bool for item in row)
            and any(row) and row == sorted(row) for row, prompt in zip(value, prompts, strict=True)
        )  # fmt: skip

    scheduled, bounded = _alg(case) in _SCHEDULES, _alg(case) == "threshold"
    checks: dict[str, tuple[bool, Callable[[Any], bool], str]] = {
        "mode": (True, lambda v: isinstance(v, str), "a cache mode"),
        "prompt": (True, lambda v: rows(v) and len(v) > 0, "a list of rows of token ids"),
        "gen_length": (True, lambda v: type(v) is int and v >= 0, "a whole number"),
        "block_length": (False, lambda v: type(v) is int and v >= 1, "a whole number from 1"),
        "steps": (
            scheduled,
            lambda v: type(v) is int and v >= 1 if scheduled or v is not None else True,
            "a whole number from 1",
        ),
        "threshold": (
            bounded,
            lambda v: number(v) and not (bounded and v is None),
            "a number" if bounded else "a number or null",
        ),
        "factor": (False, number, "a number or null"),
        "alg": (False, lambda v: isinstance(v, str), "the name of a policy"),
        "top_p": (False, lambda v: number(v) and (v is None or 0 < v <= 1), "a number above 0 and at most 1"),
        "top_k": (False, lambda v: v is None or (type(v) is int and v >= 1), "a whole number from 1"),
        "attention_mask": (False, padding, "a row of booleans for each prompt, false for the padding at its left"),
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
    if _alg(case) not in (*_SCHEDULES, "threshold", "factor"):
        raise unknown("alg", _alg(case), ["confidence_threshold", *_SCHEDULES])


_SCHEDULES: dict[str, Callable[[int], Policy]] = {
    "fixed": Fixed, "origin": Origin, "entropy": Entropy, "maskgit_plus": MaskgitPlus, "topk_margin": TopkMargin,
}  # fmt: skip


def _alg(case: Case) -> str:
    """The policy's name: as the case has it, or by the number that it gives."""
    if case.get("factor") is not None:
        return "factor"
    name = str(case.get("alg", "threshold" if case.get("threshold") is not None else "fixed"))
    return "threshold" if name == "confidence_threshold" else name


def _policy(case: Case, block_length: int | None) -> Policy:
    name = _alg(case)
    if name == "factor":
        return Factor(float(case["factor"]))
    if name == "threshold":
        return Threshold(float(case["threshold"]), case.get("steps") if block_length is None else None)
    blocks = 1 if block_length is None else max(1, -(-case["gen_length"] // block_length))
    return _SCHEDULES[name](max(1, case["steps"] // blocks))


def _result(case: Case, rows: list[_Row]) -> Case:
    whole = [[*row.padding, *row.sequence.canvas.tolist()] for row in rows]
    result: Case = {
        "id": case.get("id"),
        "output": [row.sequence.output.tolist() for row in rows],
        "nfe": max(row.sequence.nfe for row in rows),
        "trace": _trace(rows),
    }
    filled = any(canvas[: len(prompt)] != prompt for canvas, prompt in zip(whole, case["prompt"], strict=True))
    if filled or "attention_mask" in case:
        result["full_output"] = whole
    return result


def _trace(rows: list[_Row]) -> list[list[Any]]:
    """The rows' steps; several rows are merged forward by forward."""
    traces = [[row.as_list(step) for step in row.sequence.trace] for row in rows]
    if len(rows) == 1:
        return [list(step) for step in traces[0]]
    merged = []
    for number in range(max(len(trace) for trace in traces)):
        steps = [(i, trace[number]) for i, trace in enumerate(traces) if number < len(trace)]
        kind, start, length, _, _ = steps[0][1]
        positions = [[i, position] for i, step in steps for position in step[3]]
        merged.append([kind, start, length, positions, [token for _, step in steps for token in step[4]]])
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
