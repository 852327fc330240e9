"""Files of recorded cases in every format: how they are read as today's cases, and answered in their own
form.

Format 1: recordings of Fast-dLLM's v1 code, and what earlier versions recorded. Format 2: recordings of the
official code of later models (SDAR, Fast-dLLM v2, A2D, iLLaDA). Format 3: what this version records.

A recording of block-causal decoding differs from a case of ours in a few ways, all of which are undone here:
- The official loops store the last block too, which nobody reads: that forward, and the token behind it, are
  left out.
- `gen_length` is rounded by the loop: up to whole blocks (SDAR), or down (Fast-dLLM v2).
- A2D's loop passes over all finished tokens before every block (`prefix`), which is our prefill, and then our
  store of the block before.
- `steps` are those of a block (SDAR), and a case names its end tokens (`stop`, `stop_token`,
  `eos_token_id`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from trt_runtime.decoding.cache_plan import (
    PREFILL,
    PREFIX_PASS,
    REFINE_BLOCK,
    REFINE_FILL,
    REFINE_NEAR,
    REFINE_SMALL,
    REFINE_SUFFIX,
    STORE,
)
from trt_runtime.errors import DllmError
from trt_runtime.measure.case_fields import BD3LM, FAST_DLLM_V2, MDLM, Case

FORMAT = 3
# kinds of steps as older formats name them; in format 1, 'prefix' was a refine step
_KINDS = {
    1: {"full": PREFIX_PASS, "near": REFINE_NEAR, "prefix": REFINE_SUFFIX, "dual": REFINE_BLOCK},
    2: {
        "full": PREFIX_PASS,
        "step": REFINE_BLOCK,
        "fill": REFINE_FILL,
        "sub": REFINE_SMALL,
    },
}
_FAMILIES = {"fastdllm_v2": "fast_dllm_qwen"}  # names in recordings: those of our families


@dataclass(frozen=True)
class CaseFile:
    """The cases of a file in today's form, and the format that they were written in."""

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
    return CaseFile([as_case(case, written) for case in cases], written)


def read_cases(path: Path) -> list[Case]:
    """The cases of a file. Raises DllmError."""
    return read_file(path).cases


def has_block_causal_attention(case: Case) -> bool:
    """Whether a case was recorded with block-causal attention."""
    return case.get("mode") in ("block", "block_dual") or case.get("api") == BD3LM


def has_full_attention(case: Case) -> bool:
    """Whether a case says that it was recorded with full attention."""
    return case.get("mode") in ("prefix", "dual") or case.get("api") == MDLM


def answer(case: Case, result: Case, written: int) -> Case:
    """The result of a case in the form of the file's format."""
    words = {new: old for old, new in _KINDS.get(written, {}).items()}
    answered = _with_trace(result, lambda step: [words.get(step[0], step[0]), *step[1:]])
    if written == 2 and case.get("api") == BD3LM:
        answered = _with_trace(answered, _as_passes)
    return answered


def as_case(case: Case, written: int) -> Case:
    """A case of a file in today's form. What is not valid is left as it is, for the checks."""
    words = _KINDS.get(written, {})
    case = _with_trace(case, lambda step: [words.get(step[0], step[0]), *step[1:]])
    if isinstance(family := case.get("family"), str):
        case = {**case, "family": _FAMILIES.get(family, family)}
    if written != 2 or not has_block_causal_attention(case):
        return case
    return _block_causal(_from_passes(case) if case.get("api") == BD3LM else case)


def _block_causal(case: Case) -> Case:
    """A recording of block-causal decoding as our loop decodes it (see above)."""
    prompt, output = case.get("prompt"), case.get("output")
    changed = {key: value for key, value in case.items() if key != "nfe_nonempty"}
    block, gen = case.get("block_length"), case.get("gen_length")
    if not _are_rows(prompt) or type(block) is not int or block < 1 or type(gen) is not int:
        return changed
    length = len(prompt[0])
    if case.get("api") in FAST_DLLM_V2:
        gen = (length // block + gen // block) * block - length
        if _are_rows(output):
            changed["output"] = [row[:gen] for row in output]
    elif case.get("api") != BD3LM:
        changed["steps_per_block"] = case.get("steps")
        gen = len(output[0]) if _are_rows(output) else gen
    return _without_last_store({**changed, "gen_length": gen}, length + gen)


def _are_rows(value: Any) -> TypeGuard[list[list[Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(row, list) for row in value)


def _without_last_store(case: Case, end: int) -> Case:
    """The case without a store that nobody reads: the last forward, if it wrote nothing before `end`."""
    trace, nfe = case.get("trace"), case.get("nfe")
    last = trace[-1] if isinstance(trace, list) and trace else None
    if not isinstance(last, list) or last[:1] != [STORE] or len(last) < 4 or not isinstance(last[3], list):
        return case
    if any(type(position) is int and position < end for position in last[3]):
        return case
    assert isinstance(trace, list)
    return {**case, "trace": trace[:-1]} | ({"nfe": nfe - 1} if type(nfe) is int else {})


def _from_passes(case: Case) -> Case:
    """A2D's passes over all finished tokens as our prefill and stores."""
    done = 0

    def converted(step: list[Any]) -> list[Any]:
        nonlocal done
        if step[0] != "prefix" or len(step) < 3 or type(step[2]) is not int:
            return step
        start, done = done, step[2]
        return [STORE if start else PREFILL, start, done - start, *step[3:]]

    return _with_trace(case, converted)


def _as_passes(step: list[Any]) -> list[Any]:
    """The reverse for one step."""
    if step[0] not in (PREFILL, STORE):
        return step
    return ["prefix", 0, step[1] + step[2], *step[3:]]


def _with_trace(case: Case, converted: Callable[[list[Any]], list[Any]]) -> Case:
    """The case with its steps converted; entries that are not steps are left for the checks."""
    if not isinstance(case.get("trace"), list):
        return case
    steps = [
        converted(step) if isinstance(step, list) and step and isinstance(step[0], str) else step
        for step in case["trace"]
    ]
    return {**case, "trace": steps}
