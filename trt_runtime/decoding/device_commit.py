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

from trt_runtime.decoding.policies.base import CommitRule, Floats, Ints
from trt_runtime.decoding.policies.schedules import quota
from trt_runtime.errors import BackendError, DllmError

Int32s = npt.NDArray[np.int32]
FIXED, THRESHOLD, FACTOR = 0, 1, 2
NOT_FINITE, PROPOSED_MASK = -1, -2  # stored instead of the number of masks left: why a row stopped
_NAMES = {"fixed": FIXED, "threshold": THRESHOLD, "factor": FACTOR}


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
    plan = [[_NAMES[rule.kind], rule.limit, rule.masks, rule.steps] for rule in rules]
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


def proposed_mask() -> DllmError:
    """The error of a model that proposes the mask token."""
    return DllmError(
        "the model proposed the mask token: the graph does not match the manifest: export the artifact again."
    )


def commit(ids: Ints, token: Ints, confidence: Floats, arrays: CommitArrays, mask_token_id: int) -> None:
    """One commit for every row by the rules of the policies; changes `ids` and `arrays` in place."""
    for b in range(len(ids)):
        kind, limit, masks, total = arrays.plan[b].tolist()
        number, left = arrays.state[b].tolist()
        where = np.flatnonzero(ids[b, :limit] == mask_token_id)
        if left < 0 or not len(where):
            arrays.state[b, 1] = min(left, 0)
            continue
        sure = confidence[b, where]
        if not np.isfinite(sure).all():
            arrays.state[b, 1] = NOT_FINITE
            continue
        order = np.argsort(-sure, kind="stable")
        count = 1
        if kind == FIXED and number < total:
            count = max(1, quota(masks, total)[number])
        elif kind == FACTOR:
            n = np.arange(1, len(where) + 1)
            accepted = np.flatnonzero((n + 1) * (1 - sure[order]).astype(np.float64) < arrays.value[b])
            count = int(accepted[-1]) + 1 if len(accepted) else 1
        chosen = np.zeros(len(where), np.bool_)
        chosen[order[:count]] = True
        if kind == THRESHOLD:
            chosen |= sure >= np.float32(arrays.value[b])
        at = where[chosen]
        if (token[b, at] == mask_token_id).any():
            arrays.state[b, 1] = PROPOSED_MASK
            continue
        ids[b, at], arrays.committed[b, at] = token[b, at], number
        arrays.state[b] = (number + 1, len(where) - len(at))
