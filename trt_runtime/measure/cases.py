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

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trt_runtime.artifact.manifest import BLOCK_CAUSAL, CATEGORICAL, FULL, DecodingFacts, Manifest
from trt_runtime.decoding.blocks import blocks_of
from trt_runtime.decoding.cache_plan import PREFIX_PASS
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.editing import Editing
from trt_runtime.decoding.plans import PLANS
from trt_runtime.decoding.policies.base import Policy
from trt_runtime.decoding.policies.confidence import Factor, Threshold
from trt_runtime.decoding.policies.options import just_above
from trt_runtime.decoding.policies.registry import POLICIES
from trt_runtime.decoding.rules import Rules, check_prompt
from trt_runtime.decoding.sampling import Sampler
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.decoding.trace import Step
from trt_runtime.errors import DllmError, shown
from trt_runtime.measure import case_fields
from trt_runtime.measure.case_fields import Case, policy_name

_MODES = {FULL: ("none", "prefix", "dual"), BLOCK_CAUSAL: ("none", "block", "block_dual")}  # of random cases


@dataclass(frozen=True)
class CaseRow:
    """A row of a case: `padding` tokens on its left are not part of it, and shift the positions in its
    trace."""

    sequence: Sequence
    padding: list[int]

    def as_list(self, step: Step) -> tuple[Any, ...]:
        """A step in the form of recorded cases, with positions that count the padding."""
        pad = len(self.padding)
        start, length = (
            (0, step.length + pad) if step.kind == PREFIX_PASS else (step.start + pad, step.length)
        )
        edited, new = step.edits or ([], [])
        edits = ([position + pad for position in edited], new) if step.edits is not None else ()
        return step.kind, start, length, [position + pad for position in step.positions], step.tokens, *edits


def random_cases(manifest: Manifest, count: int, seed: int = 0) -> list[Case]:
    """Inputs of `count` cases over random prompts, with all combinations of caches, policies and lengths in
    turn."""
    rng = np.random.default_rng(seed)
    model, special, modes = (
        manifest.model,
        manifest.decoding.special_token_ids,
        _MODES[manifest.decoding.attention],
    )
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
        room = model.max_length - gen - (block if manifest.decoding.is_block_causal else 0)
        prompt = rng.choice(words, int(rng.integers(1, max(2, min(48, room)))))
        small = {} if modes[i % 3] != "block_dual" else {"small_block": block // 2}
        cases.append(
            {
                "id": f"random-{seed}-{i}",
                "mask_token_id": manifest.decoding.mask_token_id,
                "family": model.family,
                "mode": modes[i % 3],
                **small,
                "prompt": [prompt.tolist()],
                "gen_length": gen,
                "block_length": block,
                "steps": max(1, gen // 2),
                **options[(i // 3) % len(options)],
            }
        )
    return cases


def rows_of(manifest: Manifest, case: Case) -> list[CaseRow]:
    """The rows of a case, each with its rules. Raises DllmError, which names the case."""
    try:
        case_fields.check(case)
        rules, padding = _rules(manifest, case), case.get("attention_mask") or [[True]] * len(case["prompt"])
        rows = []
        for prompt, mask in zip(case["prompt"], padding, strict=True):
            pad = mask.index(True)
            check_prompt(
                prompt[pad:],
                replace(
                    GenerationConfig(),
                    gen_length=rules.gen_length,
                    block_length=rules.block_length,
                    infill=True,
                ),
                manifest,
            )
            rows.append(CaseRow(Sequence(np.array(prompt[pad:], np.int64), rules), prompt[:pad]))
        return rows
    except DllmError as error:
        raise DllmError(f"case {case.get('id')}: {error}") from error


def _rules(manifest: Manifest, case: Case) -> Rules:
    facts = manifest.decoding
    block = None if case["mode"] == "none" and not facts.blocks_without_cache else case.get("block_length")
    if block is None and (case["mode"] != "none" or facts.blocks_without_cache):
        raise DllmError(f"has no 'block_length', which mode '{case['mode']}' of this model needs.")
    mask = _mask(manifest, case)
    top_p, top_k = case.get("top_p"), case.get("top_k")
    sampler = Sampler(
        facts.sampling, 0.0, 1.0 if top_p is None else top_p, top_k, mask != facts.mask_token_id
    )
    if sampler.draws and facts.sampling != CATEGORICAL:
        raise DllmError("has top_p or top_k, which this model's sampling does not support.")
    plan = PLANS.find(case["mode"])
    if facts.attention not in plan.attentions:
        raise DllmError(
            f"mode is '{case['mode']}', which is not for this model's attention ({facts.attention}): the "
            f"case is from another model."
        )
    ends = _ends(case, manifest.model.vocab_size)
    # cases record facts about the loop: thresholds outside (0, 1] are allowed here, unlike in
    # GenerationConfig
    return Rules(
        case["gen_length"],
        block,
        plan(),
        _policy(case, block, facts),
        mask,
        facts.eos_token_ids if ends is None else ends,
        facts.logit_shift,
        stop_at_eos=ends is not None,
        sampler=sampler,
        first_commit=facts.first_commit,
        blocks=blocks_of(facts, block, case.get("small_block", facts.small_block) or block),
        stop_after_block=not facts.next_from_store and not case.get("stop_early"),
        editing=_editing(case),
    )


def _mask(manifest: Manifest, case: Case) -> int:
    """The mask of a case: the artifact's, or where no configuration named it, the case's."""
    facts = manifest.decoding
    mask: int = case.get("mask_token_id", facts.mask_token_id)
    if not facts.is_mask_known and "mask_token_id" not in case:
        raise DllmError(
            "has no 'mask_token_id', and the checkpoint names none: name the case's, or export with "
            "--mask-token."
        )
    if mask != facts.mask_token_id and facts.is_mask_known:
        raise DllmError(
            f"mask_token_id is {mask}, but the artifact's is {facts.mask_token_id}: the case is from another "
            f"model."
        )
    if mask >= manifest.model.vocab_size:
        raise DllmError(
            f"mask_token_id is {mask}, expected below {manifest.model.vocab_size}, the vocabulary."
        )
    return mask


def _ends(case: Case, vocab_size: int) -> tuple[int, ...] | None:
    """The end tokens of a case; None if nothing ends it. Those that a recording names are checked even if its
    loop does not look for them."""
    for name in ("stop", "stop_token", "eos_token_id", "pad_token_id"):
        value = case.get(name)
        ids = value if isinstance(value, list) else [value]
        if any(type(token) is int and token >= vocab_size for token in ids):
            raise DllmError(f"{name} is {shown(value)}, expected ids below {vocab_size}, the vocabulary.")
    stop = case.get("stop")
    return None if stop is None else tuple(stop) if isinstance(stop, list) else (stop,)


def _editing(case: Case) -> Editing | None:
    if case.get("editing_threshold") is None:
        return None
    return Editing(float(case["editing_threshold"]), case["max_post_steps"])


def _policy(case: Case, block_length: int | None, facts: DecodingFacts) -> Policy:
    name, threshold = policy_name(case), case.get("threshold")
    if threshold is not None and facts.is_threshold_strict:
        threshold = just_above(float(threshold))
    if name == "factor":
        return Factor(float(case["factor"]))
    if name == "threshold" and threshold is not None:
        return Threshold(float(threshold), case.get("steps") if block_length is None else None)
    if name == "eb_confidence":
        return POLICIES.find(name).made({"gamma": float(case["gamma"])})
    blocks = 1 if block_length is None else max(1, -(-case["gen_length"] // block_length))
    policy = POLICIES.find(name)
    options = {} if threshold is None else {"threshold": float(threshold)}
    if case.get("at_least") is not None:
        return policy.made({**options, "at_least": case["at_least"]}, None)
    steps = case.get("steps_per_block") or policy.steps_of_block(case["steps"], blocks)
    return policy.made(options, steps)
