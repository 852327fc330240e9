"""The fields of a recorded case: which are required, and which values are valid."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from trt_runtime.artifact.manifest import BLOCK_CAUSAL, FULL
from trt_runtime.decoding.config import MAX_STEPS
from trt_runtime.decoding.plans import PLANS
from trt_runtime.decoding.policies.registry import POLICIES
from trt_runtime.errors import DllmError, unknown

Case = dict[str, Any]
# how far an output goes (`output_ends`): over all of gen_length, to the first end token, or to the end of the
# last finished block
AT_GEN_LENGTH, AT_END_TOKEN, AT_LAST_BLOCK = "gen_length", "end_token", "last_block"


@dataclass(frozen=True)
class Field:
    """A field of a case: whether a value is valid, what is expected, whether it is required."""

    name: str
    is_valid: Callable[[Any], bool]
    expected: str
    is_required: bool = False


def whole(
    name: str, least: int, most: int | None = None, null: bool = False, required: bool = False
) -> Field:
    """A whole number from `least`, or null where `null` says so."""
    limits = f"from {least}{'' if most is None else f' to {most}'}{', or null' if null else ''}"
    return Field(
        name,
        lambda v: (v is None and null) or (type(v) is int and least <= v and (most is None or v <= most)),
        f"a whole number {limits}",
        required,
    )


def number(
    name: str,
    least: float | None = None,
    most: float | None = None,
    null: bool = False,
    required: bool = False,
) -> Field:
    """A number, or null where `null` says so."""
    limits = "" if least is None else f" from {least:g}{'' if most is None else f' to {most:g}'}"
    return Field(
        name,
        lambda v: (
            (v is None and null)
            or (
                isinstance(v, (int, float))
                and not isinstance(v, bool)
                and abs(v) < 1e9
                and (least is None or v >= least)
                and (most is None or v <= most)
            )
        ),
        f"a number{limits}{', or null' if null else ''}",
        required,
    )


def one_of(name: str, *values: Any, required: bool = False) -> Field:
    """One of a few values."""
    expected = " or ".join(f"'{value}'" if isinstance(value, str) else str(value).lower() for value in values)
    kinds = {type(value) for value in values}
    return Field(name, lambda v: type(v) in kinds and v in values, expected, required)


def flag(name: str, required: bool = False) -> Field:
    """true or false."""
    return one_of(name, True, False, required=required)


def tokens(name: str, null: bool = True, several: bool = True, required: bool = False) -> Field:
    """A token id, or a list of them where there may be several."""
    return Field(
        name,
        lambda v: (
            (v is None and null)
            or (type(v) is int and v >= 0)
            or (several and are_rows([v]) and all(token >= 0 for token in v))
        ),
        f"a token id{' or a list of them' if several else ''}{', or null' if null else ''}",
        required,
    )


def rows(name: str, exactly_one: bool = False, required: bool = False) -> Field:
    """A list of rows of token ids."""
    expected = "one row of token ids, in a list" if exactly_one else "a list of rows of token ids"
    return Field(
        name,
        lambda v: are_rows(v) and bool(v) and (len(v) == 1 or not exactly_one),
        expected,
        required,
    )


def are_rows(value: Any) -> bool:
    """Whether this is a list of rows of whole numbers."""
    return isinstance(value, list) and all(
        isinstance(row, list) and all(type(t) is int for t in row) for row in value
    )


def _is_step(value: Any, several: bool) -> bool:
    """Whether this is a step of a trace; with `several` rows its positions may be [row, position] pairs."""
    kinds = (str, int, int, list, list, list, list, list)
    ok = (
        isinstance(value, list)
        and 5 <= len(value) <= 8
        and all(isinstance(v, k) for v, k in zip(value, kinds, strict=False))
    )
    places = ok and (are_rows([value[3]]) or (several and are_rows(value[3])))
    edits = len(value) < 7 or (are_rows([value[6]]) and len(value[5]) == len(value[6])) if ok else False
    return places and edits and len(value[3]) == len(value[4]) and are_rows([value[4]])


def trace(num_rows: int, lengths: Iterable[int] = (5, 6, 7, 8), written: str = "") -> Field:
    """The steps of `num_rows` rows, each with one of these numbers of entries."""
    entries = tuple(lengths)
    return Field(
        "trace",
        lambda v: (
            isinstance(v, list) and all(_is_step(item, num_rows > 1) and len(item) in entries for item in v)
        ),
        f"a list of [{written or 'kind, start, length, positions, tokens'}]",
    )


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


# what says how a case of ours is decoded; `steps`, `threshold`, `factor` and `attention_mask` are checked
# with the policy and the prompt
_FIELDS = (
    Field("mode", lambda v: isinstance(v, str), "a cache mode", True),
    rows("prompt", required=True),
    whole("gen_length", 0, required=True),
    whole("block_length", 1),
    Field("alg", lambda v: isinstance(v, str), "the name of a policy"),
    Field(
        "top_p",
        lambda v: v is None or (number("").is_valid(v) and 0 < v <= 1),
        "a number above 0 and at most 1",
    ),
    whole("top_k", 1, null=True),
    whole("small_block", 1, null=True),
    whole("steps_per_block", 1, null=True),
    tokens("stop"),
    flag("stop_early"),
    number("editing_threshold", 0, null=True),
    whole("max_post_steps", 0),
    whole("at_least", 1),
    number("gamma"),
    tokens("mask_token_id", null=False, several=False),
    one_of("attention", FULL, BLOCK_CAUSAL),
    one_of("output_ends", AT_GEN_LENGTH, AT_END_TOKEN, AT_LAST_BLOCK),
)
RESULTS = (
    Field("output", are_rows, "a list of rows of token ids"),
    Field("full_output", are_rows, "a list of rows of token ids"),
    whole("nfe", 0),
    whole("nfe_nonempty", 0),
    Field("matches", lambda v: isinstance(v, dict), "an object"),
)
INPUTS = (
    "id",
    "family",
    *(field.name for field in _FIELDS),
    "steps",
    "threshold",
    "factor",
    "attention_mask",
)


def _policy_fields(case: Case) -> tuple[Field, ...]:
    """The fields that the case's policy reads. The one that defines it must be present and not null."""
    name = policy_name(case)
    is_schedule = name in _schedules() and case.get("steps_per_block") is None
    is_schedule &= case.get("at_least") is None
    is_threshold, is_factor = name == "threshold", name == "factor"
    return (
        whole("steps", 1, MAX_STEPS, null=not is_schedule, required=is_schedule),
        number("threshold", null=not is_threshold, required=is_threshold),
        number("factor", null=not is_factor, required=is_factor),
        *([number("gamma", required=True)] if name == "eb_confidence" else []),
        *([whole("max_post_steps", 0, required=True)] if case.get("editing_threshold") is not None else []),
    )


def _batch_fields(case: Case) -> tuple[Field, ...]:
    """The fields whose form depends on the number of prompts. The prompt must have been checked."""
    prompts = case["prompt"]
    return (
        Field(
            "attention_mask",
            lambda v: _is_padding(v, prompts),
            "a row of booleans for each prompt, false for the padding on its left",
        ),
        trace(len(prompts)),
    )


def check_fields(case: Case, fields: Iterable[Field]) -> None:
    """Raise DllmError for the first field that is missing or invalid; the message does not name the case."""
    for field in fields:
        if field.name not in case:
            if not field.is_required:
                continue
            problem = f"has no '{field.name}'"
        elif field.is_valid(case[field.name]):
            continue
        else:
            value = case[field.name]
            problem = f"{field.name} is {'null' if value is None else str(value)[:60]}"
        raise DllmError(f"{problem}, expected {field.expected}.")


def check(case: Case) -> None:
    """Raise DllmError for a case of ours whose fields are missing or of the wrong type."""
    check_fields(case, _FIELDS)
    check_fields(case, (*_policy_fields(case), *_batch_fields(case), *RESULTS))
    if case["mode"] not in PLANS.names():
        raise unknown("mode", case["mode"], PLANS.names())
    others = ("threshold", "factor", "eb_confidence")
    if policy_name(case) not in (*_schedules(), *others):
        raise unknown("alg", policy_name(case), ["confidence_threshold", *_schedules()])


def _schedules() -> list[str]:
    return [policy.name for policy in POLICIES.all() if policy.is_schedule]


def policy_name(case: Case) -> str:
    """The policy's name: as the case has it, or by its number."""
    if case.get("factor") is not None:
        return "factor"
    name = str(case.get("alg", "threshold" if case.get("threshold") is not None else "fixed"))
    return "threshold" if name == "confidence_threshold" else name
