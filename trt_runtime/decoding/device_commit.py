"""Refine steps without synchronising in between: the commit on arrays, in NumPy, and the result of several
steps.

A device can run several steps of a block without the host if every policy of a call can be expressed as data
(policies.CommitRule). The commit here is what a CPU runs, and the reference of the GPU kernel
plugins/commit.py, whose docstring is the contract.

Shape letters: B rows, S rows of the window, R columns of the statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trt_runtime.decoding.policies.base import Bools, CommitRule, Floats, Ints
from trt_runtime.decoding.policies.schedules import planned, quota
from trt_runtime.errors import BackendError, DllmError

Int32s = npt.NDArray[np.int32]
FIXED, THRESHOLD, FACTOR = 0, 1, 2
NOT_FINITE, PROPOSED_MASK = -1, -2  # stored instead of the number of masks left: why a row stopped
KINDS = {"fixed": FIXED, "threshold": THRESHOLD, "factor": FACTOR}


@dataclass(frozen=True)
class Committed:
    """The result of several refine steps: the windows' tokens [B, S], and the step [B, R], from 0, in which
    each position of the block was committed (-1: in none)."""

    ids: Ints
    step: Int32s


@dataclass(frozen=True)
class CommitArrays:
    """The arrays of a call, in the layout of the kernel (plugins/commit.py)."""

    plan: Int32s
    value: npt.NDArray[np.float64]
    state: Int32s
    committed: Int32s


def commit_arrays(rules: Sequence[CommitRule], columns: int) -> CommitArrays:
    """The arrays for one rule per row, before the first step."""
    plan = [[KINDS[rule.kind], rule.limit, rule.masks, rule.steps] for rule in rules]
    state = [[rule.number, 1] for rule in rules]
    value = np.array([rule.value for rule in rules], np.float64)
    committed = np.full((len(rules), columns), -1, np.int32)
    return CommitArrays(np.array(plan, np.int32), value, np.array(state, np.int32), committed)


def needed(rules: Sequence[CommitRule], ids: Ints, mask_token_id: int, most: int) -> int:
    """The number of steps to run before synchronising: at most `most`, and no more than the row with the most
    masks can need."""
    left = []
    for rule, row in zip(rules, ids, strict=True):
        masks = int((row[: rule.limit] == mask_token_id).sum())
        left.append(
            min(masks, max(1, rule.steps - rule.number))
            if rule.kind == "fixed" and rule.masks == masks + _done(rule)
            else masks
        )
    return max(1, min(most, max(left)))


def _done(rule: CommitRule) -> int:
    """Positions that a fixed schedule has committed after its first steps."""
    return sum(quota(rule.masks, rule.steps)[: rule.number])


def finished(arrays: CommitArrays, rules: Sequence[CommitRule], ids: Ints) -> Committed:
    """The result after the steps. Raises DllmError if a row stopped because of a fault."""
    if (arrays.state[:, 1] == NOT_FINITE).any():
        raise BackendError(
            "the model returned a confidence that is NaN or infinite: the weights are damaged or overflow "
            "in this dtype: check them with 'dllm-trt verify', or export with DTYPE=bf16 or fp32."
        )
    if (arrays.state[:, 1] == PROPOSED_MASK).any():
        raise proposed_mask()
    first = np.array([rule.number for rule in rules], np.int32)[:, None]
    return Committed(ids, np.where(arrays.committed < 0, -1, arrays.committed - first).astype(np.int32))


def proposed_mask(mask_token_id: int | None = None) -> DllmError:
    """The error of a model that proposes the mask token."""
    said = "" if mask_token_id is None else f" ({mask_token_id})"
    return DllmError(
        f"the model proposed the mask token{said}: the graph does not match the manifest: export the "
        "artifact again."
    )


def choose(sure: Floats, kinds: Ints | Int32s, values: Floats, counts: Ints) -> Bools:
    """The positions [B, R] that rows commit by the rules of the policies, the first ones at equal confidence.
    sure: the confidence, -inf where there is nothing to commit. kinds, values, counts [B]: of the rules; the
    threshold or factor, float64; how many positions a fixed schedule commits."""
    is_open, by_threshold = sure > -np.inf, kinds == THRESHOLD
    if by_threshold.all():
        return _certain(sure, values) & is_open
    lines, order = np.arange(len(sure))[:, None], np.argsort(-sure, axis=1, kind="stable")
    if (kinds == FACTOR).any():
        counts = np.where(kinds == FACTOR, _accepted(sure[lines, order], values), counts)
    chosen = np.zeros(sure.shape, np.bool_)
    chosen[lines, order] = np.arange(sure.shape[1]) < counts[:, None]
    if by_threshold.any():
        chosen[by_threshold] = _certain(sure[by_threshold], values[by_threshold])
    return np.asarray(chosen & is_open)


def _certain(sure: Floats, value: Floats) -> Bools:
    """The best of each row [B, R], and every other of at least `value` [B]."""
    chosen = sure >= value.astype(np.float32)[:, None]
    chosen[np.arange(len(sure)), sure.argmax(1)] = True
    return np.asarray(chosen)


def _accepted(ordered: Floats, value: Floats) -> Ints:
    """The n of policies.confidence.Factor for each row [B], from its confidences in order [B, R]."""
    size = ordered.shape[1]
    is_accepted = np.arange(2, size + 2) * (1 - ordered).astype(np.float64) < value[:, None]
    last = size - is_accepted[:, ::-1].argmax(1)
    return np.where(is_accepted.any(1), last, 1)


def commit(ids: Ints, token: Ints, confidence: Floats, arrays: CommitArrays, mask_token_id: int) -> None:
    """One commit for every row by the rules of the policies; changes `ids` and `arrays` in place."""
    kinds, limits = arrays.plan[:, 0], arrays.plan[:, 1:2]
    size = min(ids.shape[1], token.shape[1])  # no limit is beyond either
    token, confidence = token[:, :size], confidence[:, :size]
    is_open = (ids[:, :size] == mask_token_id) & (np.arange(size) < limits) & (arrays.state[:, 1:] >= 0)
    is_wrong = (is_open & ~np.isfinite(confidence)).any(1)
    sure = np.where(is_open & ~is_wrong[:, None], confidence, -np.inf)
    numbers = arrays.state[:, 0].tolist()
    counts = [
        planned(quota(masks, steps), number) if kind == FIXED else 0
        for (kind, _, masks, steps), number in zip(arrays.plan.tolist(), numbers, strict=True)
    ]
    chosen = choose(sure, kinds, arrays.value, np.array(counts))
    proposes_mask = (chosen & (token == mask_token_id)).any(1)
    for b, (number, left) in enumerate(arrays.state.tolist()):
        if not is_open[b].any():
            arrays.state[b, 1] = min(left, 0)
        elif is_wrong[b]:
            arrays.state[b, 1] = NOT_FINITE
        elif proposes_mask[b]:
            arrays.state[b, 1] = PROPOSED_MASK
        else:
            at = np.flatnonzero(chosen[b])
            ids[b, at], arrays.committed[b, at] = token[b, at], number
            arrays.state[b] = (number + 1, int(is_open[b].sum()) - len(at))
