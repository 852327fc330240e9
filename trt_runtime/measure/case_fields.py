"""The fields of a recorded case: which are required, and which values are valid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trt_runtime.decoding.config import MAX_STEPS
from trt_runtime.decoding.plans import PLANS
from trt_runtime.decoding.policies.registry import POLICIES
from trt_runtime.errors import DllmError, unknown

Case = dict[str, Any]
# `api` of recordings: A2D's samplers, with full and with block-causal attention, and Fast-dLLM v2's functions
MDLM, BD3LM = "mdlm", "bd3lm"
FAST_DLLM_V2 = ("generate", "batch_sample")


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and all(type(t) is int for t in row) for row in value
    )


def _is_number(value: Any) -> bool:
    return value is None or (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
    )


def _are_steps(value: Any, needed: bool) -> bool:
    return (value is None and not needed) or (type(value) is int and 1 <= value <= MAX_STEPS)


def _is_step(value: Any, several: bool) -> bool:
    """Whether this is a step of a trace; with `several` rows its positions may be [row, position] pairs."""
    kinds = (str, int, int, list, list, list, list, list)
    ok = (
        isinstance(value, list)
        and 5 <= len(value) <= 8
        and all(isinstance(v, k) for v, k in zip(value, kinds, strict=False))
    )
    places = ok and (_are_rows([value[3]]) or (several and _are_rows(value[3])))
    return places and len(value[3]) == len(value[4]) and _are_rows([value[4]])


def _is_padding(value: Any, prompts: list[list[int]]) -> bool:
    """Whether this is a mask as long as each prompt, whose false entries are to the left of the true ones."""
    return (
        isinstance(value, list)
        and len(value) == len(prompts)
        and all(
            isinstance(row, list)
            and len(row) == len(prompt)
            and all(type(item) is bool for item in row)
            and any(row)
            and row == sorted(row)
            for row, prompt in zip(value, prompts, strict=True)
        )
    )


@dataclass(frozen=True)
class _Field:
    """A field of a case: whether a value is valid, what is expected, whether it is required."""

    name: str
    is_valid: Callable[[Any], bool]
    expected: str
    is_required: bool = False


_FIELDS = (
    _Field("mode", lambda v: isinstance(v, str), "a cache mode", True),
    _Field("prompt", lambda v: _are_rows(v) and len(v) > 0, "a list of rows of token ids", True),
    _Field("gen_length", lambda v: type(v) is int and v >= 0, "a whole number", True),
    _Field("block_length", lambda v: type(v) is int and v >= 1, "a whole number from 1"),
    _Field("matches", lambda v: isinstance(v, dict), "an object"),
    _Field("alg", lambda v: isinstance(v, str), "the name of a policy"),
    _Field("top_p", lambda v: _is_number(v) and (v is None or 0 < v <= 1), "a number above 0 and at most 1"),
    _Field("small_block", lambda v: v is None or (type(v) is int and v >= 1), "a whole number from 1"),
    _Field("steps_per_block", lambda v: v is None or (type(v) is int and v >= 1), "a whole number from 1"),
    *(
        _Field(key, lambda v: v is None or type(v) is int or _are_rows([v]), "a token id or a list of them")
        for key in ("stop", "stop_token", "eos_token_id")
    ),
    _Field(
        "editing_threshold", lambda v: v is None or (_is_number(v) and v >= 0), "a number from 0, or null"
    ),
    _Field("max_post_steps", lambda v: type(v) is int and v >= 0, "a whole number from 0"),
    _Field("at_least", lambda v: type(v) is int and v >= 1, "a whole number from 1"),
    _Field("gamma", lambda v: _is_number(v) and v is not None, "a number"),
    _Field("top_k", lambda v: v is None or (type(v) is int and v >= 1), "a whole number from 1"),
)
_RESULTS = (
    _Field("output", _are_rows, "a list of rows of token ids"),
    _Field("full_output", _are_rows, "a list of rows of token ids"),
)


def _policy_fields(case: Case) -> tuple[_Field, ...]:
    """The fields that the case's policy reads. The one that defines it must be present and not null."""
    name = policy_name(case)
    is_schedule, is_threshold, is_factor = name in _schedules(), name == "threshold", name == "factor"
    return (
        _Field(
            "steps",
            lambda v: _are_steps(v, is_schedule),
            f"a whole number from 1 to {MAX_STEPS}",
            is_schedule,
        ),
        _Field(
            "threshold",
            lambda v: _is_number(v) and not (is_threshold and v is None),
            "a number" if is_threshold else "a number or null",
            is_threshold,
        ),
        _Field("factor", lambda v: _is_number(v) and not (is_factor and v is None), "a number", is_factor),
    )


def _batch_fields(case: Case) -> tuple[_Field, ...]:
    """The fields whose form depends on the number of prompts. The prompt must have been checked."""
    prompts = case["prompt"]
    return (
        _Field(
            "attention_mask",
            lambda v: _is_padding(v, prompts),
            "a row of booleans for each prompt, false for the padding on its left",
        ),
        _Field(
            "trace",
            lambda v: isinstance(v, list) and all(_is_step(item, len(prompts) > 1) for item in v),
            "a list of [kind, start, length, positions, tokens]",
        ),
    )


def _check_fields(case: Case, fields: tuple[_Field, ...]) -> None:
    """Raise DllmError for the first field that is missing or invalid."""
    for field in fields:
        if field.name not in case:
            if not field.is_required:
                continue
            problem = f"has no '{field.name}'"
        elif field.is_valid(case[field.name]):
            continue
        else:
            problem = f"{field.name} is {str(case[field.name])[:60]}"
        raise DllmError(f"case {case.get('id')}: {problem}, expected {field.expected} (see replay --record).")


def check(case: Case) -> None:
    """Raise DllmError for a case whose fields are missing or of the wrong type."""
    _check_fields(case, _FIELDS)
    _check_fields(case, (*_policy_fields(case), *_batch_fields(case), *_RESULTS))
    if case["mode"] not in PLANS.names():
        raise unknown("mode", case["mode"], PLANS.names())
    others = ("threshold", "factor", "eb_confidence")
    if policy_name(case) not in (*_schedules(), *others):
        raise unknown("alg", policy_name(case), ["confidence_threshold", *_schedules()])


def _schedules() -> list[str]:
    return [policy.name for policy in POLICIES.all() if policy.is_schedule]


def policy_name(case: Case) -> str:
    """The policy's name: as the case has it, by its number, or by the sampler that recorded it."""
    if case.get("factor") is not None:
        return "factor"
    if case.get("api") in (MDLM, BD3LM) and case.get("threshold") is None and "alg" not in case:
        return "linear"
    name = str(case.get("alg", "threshold" if case.get("threshold") is not None else "fixed"))
    return "threshold" if name == "confidence_threshold" else name
