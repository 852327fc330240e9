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
- `steps` are those of a block (SDAR, LLaDA2), and a case names its end tokens (`stop`, `stop_token`,
  `eos_token_id`).
- LLaDA2's and RND1's files say format 1, but are recordings of their own code. LLaDA2's recomputes everything
  up to the end of the block in each step (`full`) and decodes the last block to its end, behind gen_length,
  and behind an end token; here a step is a window over the block, and the prefill and the stores are forwards
  of their own. RND1's canvas is given as a whole: its answer is a gap of the prompt.
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
# names in recordings: those of our families
_FAMILIES = {
    "fastdllm_v2": "fast_dllm_qwen",
    "lladamoe": "llada_moe",
    "llada21": "llada2",
}


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
    if is_llada2(case):
        return _as_whole_passes(result)
    if is_rnd1(case):
        return _with_trace(result, lambda step: ["full", *step[1:]]) | {"output": case_output(case, result)}
    words = {new: old for old, new in _KINDS.get(written, {}).items()}
    answered = _with_trace(result, lambda step: [words.get(step[0], step[0]), *step[1:]])
    if written == 2 and case.get("api") == BD3LM:
        answered = _with_trace(answered, _as_passes)
    return answered


def as_case(case: Case, written: int) -> Case:
    """A case of a file in today's form. What is not valid is left as it is, for the checks."""
    words = _KINDS.get(written, {})
    if is_llada2(case):
        return _llada2(case)
    if is_rnd1(case):
        return _rnd1(case)
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


def is_llada2(case: Case) -> bool:
    """Whether a case was recorded by LLaDA2's code."""
    return case.get("mode") == "block" and "eos_early_stop" in case


def is_rnd1(case: Case) -> bool:
    """Whether a case was recorded by RND1's code."""
    return "seq_len" in case


def _llada2(case: Case) -> Case:
    """LLaDA2's recording as our loop decodes it."""
    edits, gen, block = "editing_threshold" in case, case.get("gen_length"), case.get("block_length")
    changed = {
        **case,
        "family": "llada2",
        "alg": "low_confidence_dynamic",
        "stop_early": bool(case.get("eos_early_stop")),
    }
    if edits:
        changed |= {"at_least": case.get("num_to_transfer"), "steps": 1}
        if not case.get("eos_early_stop"):
            changed["eos_token_id"] = None
    prompt, trace = case.get("prompt"), case.get("trace")
    if not _are_rows(prompt) or type(gen) is not int or type(block) is not int or block < 1:
        return changed
    if not edits and type(steps := case.get("steps")) is int:
        changed["steps_per_block"] = max(1, min(steps, gen // max(1, case.get("minimal_topk") or 1)))
    if isinstance(trace, list) and all(isinstance(step, list) and len(step) >= 5 for step in trace):
        steps_here = trace if edits else _until_final(trace, case, len(prompt[0]), gen)
        changed["trace"] = _with_stores(steps_here, len(prompt[0]), block)
        changed["nfe"] = len(changed["trace"])
    return changed


def _until_final(trace: list[Any], case: Case, prompt_length: int, gen: int) -> list[Any]:
    """The steps until everything in the answer is decided: an end token with no mask before it, if the case
    stops early, or all of gen_length."""
    ends, left = {case.get("eos_token_id")}, set(range(prompt_length, prompt_length + gen))
    first_end = prompt_length + gen
    for number, step in enumerate(trace):
        written = dict(zip(step[3], step[4], strict=False))
        left -= set(written)
        inside = [p for p, token in written.items() if token in ends and p < prompt_length + gen]
        first_end = min([first_end, *inside])
        is_ended = case.get("eos_early_stop") and first_end < prompt_length + gen
        if not left or (is_ended and not any(position < first_end for position in left)):
            return trace[: number + 1]
    return trace


def _with_stores(trace: list[Any], prompt_length: int, block: int) -> list[Any]:
    """Passes over everything up to the end of a block as steps over the block, with the prefill and the
    stores between them."""
    edits: list[Any] = [[], []] if trace and len(trace[0]) == 7 else []
    start = prompt_length // block * block
    steps = [[PREFILL, 0, start, [], [], *edits]] if start else []
    end = start + block
    for step in trace:
        if step[1] + step[2] != end:
            steps.append([STORE, end - block, block, [], [], *edits])
            end = step[1] + step[2]
        steps.append([REFINE_BLOCK, end - block, block, *step[3:]])
    return steps


def _as_whole_passes(result: Case) -> Case:
    """The reverse for a result: only what the official loop makes."""
    steps = [
        ["full", 0, step[1] + step[2], *step[3:]]
        for step in result["trace"]
        if step[0] not in (PREFILL, STORE)
    ]
    return {**result, "trace": steps, "nfe": len(steps)}


def _rnd1(case: Case) -> Case:
    """RND1's recording: the whole canvas is a prompt with one gap. Forwards that wrote nothing are left
    out."""
    changed = {key: value for key, value in case.items() if key not in ("nfe", "nfe_nonempty")}
    changed |= {"mode": "none", "gen_length": 0, "alg": "entropy_linear"}
    if case.get("eb_gamma") is not None:
        changed |= {"alg": "eb_confidence", "gamma": case["eb_gamma"]}
    prompt, output, mask = case.get("prompt"), case.get("output"), case.get("mask_token_id")
    length = case.get("seq_len")
    if not _are_rows(prompt) or type(length) is not int or type(mask) is not int:
        return changed
    last = case.get("eos_token_id" if case.get("add_eos_at_end") else "pad_token_id")
    suffix = case.get("suffix") or []
    given = suffix[0] if _are_rows(suffix) else suffix
    gap = length - len(prompt[0]) - len(given) - 1
    changed["prompt_length"] = len(prompt[0])
    changed["prompt"] = [[*prompt[0], *[mask] * max(0, gap), *given, last]]
    del changed["eos_token_id"]
    if _are_rows(output):
        changed["full_output"] = [[*prompt[0], *output[0]]]
        changed["output"] = [[]]
    if isinstance(trace := case.get("trace"), list):
        kept = [step for step in trace if isinstance(step, list) and len(step) > 3 and step[3]]
        changed["trace"] = [[PREFIX_PASS, *step[1:]] for step in kept]
        changed["nfe"] = len(kept)
    return changed


def case_output(case: Case, result: Case) -> list[list[int]]:
    """RND1's output: everything right of the prompt."""
    whole: list[list[int]] = result["full_output"]
    return [row[case["prompt_length"] :] for row in whole]
