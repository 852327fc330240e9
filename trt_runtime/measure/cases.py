"""Recorded decode cases: the format, its checks, and the rows that a case asks for.

A case: id, family, mode (none|prefix|dual), prompt (a list of rows), gen_length, block_length, steps,
threshold (null with a fixed schedule) or alg (Dream's name of the policy), top_p, top_k, attention_mask
(false for padding at the left of a row), and the expected results: output, nfe (or nfe_nonempty, which leaves
out forwards that wrote nothing), trace (a list of [kind, start, length, positions, tokens]; with several rows
the positions are [row, position] pairs). A step may have a sixth entry, the confidence of each position, as
results have it (generate --json, replay --output): it is not compared.

A model that decodes without a cache in one block (Dream) takes `block_length` with the cached modes only, and
there `steps` does not bound a threshold; without a cache it does (policies.Threshold).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trt_runtime.artifact.manifest import CATEGORICAL, Manifest
from trt_runtime.decoding.cache_plan import PLANS, PREFIX_PASS, REFINE_BLOCK, REFINE_NEAR, REFINE_SUFFIX
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.policies.base import Policy
from trt_runtime.decoding.policies.confidence import Factor, Threshold
from trt_runtime.decoding.policies.registry import POLICIES
from trt_runtime.decoding.rules import Rules, check_prompt
from trt_runtime.decoding.sampling import Sampler
from trt_runtime.decoding.sequence import Sequence, Step
from trt_runtime.errors import DllmError
from trt_runtime.measure import case_fields
from trt_runtime.measure.case_fields import Case, policy_name

FORMAT = 3  # of the files written here (2 is the format of recordings of block-causal models)
# kinds of steps in files of format 1, where 'prefix' was a refine step
# the names of kinds in older formats
_KINDS = {
    1: {"full": PREFIX_PASS, "near": REFINE_NEAR, "prefix": REFINE_SUFFIX, "dual": REFINE_BLOCK},
    2: {"full": PREFIX_PASS},
}
_MODES = ("none", "prefix", "dual")  # of random cases
INPUTS = (
    "id",
    "family",
    "mode",
    "prompt",
    "gen_length",
    "block_length",
    "steps",
    "threshold",
    "factor",
    "alg",
    "top_p",
    "top_k",
    "attention_mask",
)


@dataclass(frozen=True)
class CaseFile:
    """The cases of a file with today's kinds of steps, and the format that they were written in."""

    cases: list[Case]
    format: int


def read_file(path: Path) -> CaseFile:
    """A file of cases: {"format": ..., "cases": [...]} or a plain list, which has format 1. Raises
    DllmError."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DllmError(f"{path}: not readable as JSON ({error}): give a file of recorded cases.") from error
    cases = read.get("cases") if isinstance(read, dict) else read
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise DllmError(
            f'{path}: contains no cases: expected {{"cases": [...]}} (record some with replay --record).'
        )
    written = read.get("format", 1) if isinstance(read, dict) else 1
    if type(written) is not int or not 1 <= written <= FORMAT:
        raise DllmError(
            f"{path}: format is {str(written)[:40]}, expected 1 to {FORMAT}: update dllm-trt, or record the "
            f"cases again."
        )
    return CaseFile([_with_kinds(case, _KINDS.get(written, {})) for case in cases], written)


def read_cases(path: Path) -> list[Case]:
    """The cases of a file. Raises DllmError."""
    return read_file(path).cases


def spelled_for(case: Case, written: int) -> Case:
    """A case or a result with the kinds of its steps as a format names them."""
    return _with_kinds(case, {new: old for old, new in _KINDS.get(written, {}).items()})


def has_block_causal_attention(case: Case) -> bool:
    """Whether a case was recorded with block-causal attention."""
    return case.get("mode") in ("block", "block_dual") or case.get("api") == "bd3lm"


def _with_kinds(case: Case, words: Mapping[str, str]) -> Case:
    """The same with other names of the kinds; entries that are not steps are left for the checks."""
    if not isinstance(case.get("trace"), list):
        return case
    steps = [
        [words.get(step[0], step[0]), *step[1:]]
        if isinstance(step, list) and step and isinstance(step[0], str)
        else step
        for step in case["trace"]
    ]
    return {**case, "trace": steps}


@dataclass(frozen=True)
class CaseRow:
    """A row of a case: `padding` tokens on its left are not part of it, and shift the positions in its
    trace."""

    sequence: Sequence
    padding: list[int]

    def as_list(self, step: Step) -> tuple[str, int, int, list[int], list[int]]:
        pad = len(self.padding)
        start, length = (
            (0, step.length + pad) if step.kind == PREFIX_PASS else (step.start + pad, step.length)
        )
        return step.kind, start, length, [position + pad for position in step.positions], step.tokens


def random_cases(manifest: Manifest, count: int, seed: int = 0) -> list[Case]:
    """Inputs of `count` cases over random prompts, with all combinations of caches, policies and lengths in
    turn."""
    rng = np.random.default_rng(seed)
    model, special = manifest.model, manifest.decoding.special_token_ids
    words = np.array([token for token in range(model.vocab_size) if token not in special])
    options: list[Case] = [
        {"threshold": 0.9},
        {"threshold": None},
        {"alg": "topk_margin"},
        {"threshold": None, "factor": 1.0},
    ]
    cases = []
    for i in range(count):
        block = int(rng.choice([4, 8, 16]))
        gen = max(1, min(block * int(rng.integers(2, 5)), model.max_length // 2))
        prompt = rng.choice(words, int(rng.integers(1, max(2, min(48, model.max_length - gen)))))
        cases.append(
            {
                "id": f"random-{seed}-{i}",
                "family": model.family,
                "mode": _MODES[i % 3],
                "prompt": [prompt.tolist()],
                "gen_length": gen,
                "block_length": block,
                "steps": max(1, gen // 2),
                **options[(i // 3) % len(options)],
            }
        )
    return cases


def rows_of(manifest: Manifest, case: Case) -> list[CaseRow]:
    case_fields.check(case)
    if case.get("mask_token_id", manifest.decoding.mask_token_id) != manifest.decoding.mask_token_id:
        raise DllmError(
            f"case {case.get('id')}: mask_token_id is {case['mask_token_id']}, but the artifact's is "
            f"{manifest.decoding.mask_token_id}: the case is from another model."
        )
    facts, gen = manifest.decoding, case["gen_length"]
    block = None if case["mode"] == "none" and not facts.blocks_without_cache else case.get("block_length")
    if block is None and (case["mode"] != "none" or facts.blocks_without_cache):
        raise DllmError(
            f"case {case.get('id')}: has no 'block_length', which mode '{case['mode']}' of this model needs."
        )
    # cases record facts about the loop: thresholds outside (0, 1] are allowed here, unlike in
    # GenerationConfig
    config = replace(GenerationConfig(), gen_length=gen, block_length=block, infill=True)
    top_p, top_k = case.get("top_p"), case.get("top_k")
    sampler = Sampler(facts.sampling, 0.0, 1.0 if top_p is None else top_p, top_k)
    if sampler.needs_logits and facts.sampling != CATEGORICAL:
        raise DllmError(
            f"case {case.get('id')}: has top_p or top_k, which this model's sampling does not support."
        )
    rules = Rules(
        gen,
        block,
        PLANS.find(case["mode"])(),
        _policy(case, block),
        facts.mask_token_id,
        facts.eos_token_ids,
        facts.logit_shift,
        sampler=sampler,
        first_commit=facts.first_commit,
    )
    rows = []
    for prompt, mask in zip(
        case["prompt"], case.get("attention_mask") or [None] * len(case["prompt"]), strict=True
    ):
        pad = 0 if mask is None else mask.index(True)
        check_prompt(prompt[pad:], config, manifest)
        rows.append(CaseRow(Sequence(np.array(prompt[pad:], np.int64), rules), prompt[:pad]))
    return rows


def _policy(case: Case, block_length: int | None) -> Policy:
    name = policy_name(case)
    if name == "factor":
        return Factor(float(case["factor"]))
    if name == "threshold":
        return Threshold(float(case["threshold"]), case.get("steps") if block_length is None else None)
    blocks = 1 if block_length is None else max(1, -(-case["gen_length"] // block_length))
    policy = POLICIES.find(name)
    return policy.made({}, policy.steps_of_block(case["steps"], blocks))
