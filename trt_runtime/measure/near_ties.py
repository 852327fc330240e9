"""Whether a decision that differs from a recorded one is within rounding: moving confidences by their margin
turns it into the recorded one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from trt_runtime.decoding.sequence import Sequence
from trt_runtime.decoding.trace import Step

_ROUNDING = 3e-6  # of a probability from float32 logits of 10 to 30, whose last bit is worth 1 to 2e-6


def is_near(row: Sequence, number: int, expected: list[Any], margin: float) -> bool:
    """Whether moving the confidences in question within their margins turns the decision of a step into the
    expected one.

    An error of the logits moves a probability p by a fraction of p (1 - p): `margin` is defined at p = 0.5
    and shrinks towards both ends.
    """
    seen = row.trace[number].seen
    step = row.trace[number]
    if seen is None or step.as_list()[:3] != expected[:3] or len(step.as_list()) != len(expected):
        return False
    if len(expected) == 7 and not _are_near_edits(row, step, expected, margin):
        return False
    candidates, stats, state = seen
    if not set(expected[3]) <= set(candidates.tolist()) or row.rules.mask_token_id in expected[4]:
        return False
    wanted = np.isin(candidates, expected[3])
    chosen = np.isin(candidates, row.trace[number].positions)
    margins = 4 * margin * stats.confidence * (1 - stats.confidence) + (_ROUNDING if margin else 0)
    change = margins * (wanted & ~chosen) - margins * (chosen & ~wanted)
    # an error of the logits moves an entropy by that error times the spread of the log-probabilities
    moved = replace(
        stats,
        confidence=stats.confidence + change,
        entropy=stats.entropy - 10 * change,
        best=None if stats.best is None else stats.best + change,
    )
    again = row.rules.policy.select(moved, np.ones(len(candidates), np.bool_), state)
    tokens = dict(zip(expected[3], expected[4], strict=True))
    same_token = [tokens.get(int(p), t) == t for p, t in zip(candidates, stats.token, strict=True)]
    close = stats.runner_up > stats.confidence * np.exp(
        -4 * margin
    )  # the two logits are within twice the error that moves p so far
    return bool((again == wanted).all() and (same_token | close)[wanted].all())


def _are_near_edits(row: Sequence, step: Step, expected: list[Any], margin: float) -> bool:
    """Whether each edit that differs from the expected ones is within the margin: of the threshold, or of
    another token."""
    if step.looked is None or row.rules.editing is None:
        return False
    (places, stats), theirs = step.looked, dict(zip(expected[5], expected[6], strict=True))
    mine = dict(zip(*(step.edits or ([], [])), strict=True))
    if not set(theirs) <= set(places.tolist()):
        return False
    for i, position in enumerate(places.tolist()):
        if mine.get(position) == theirs.get(position):
            continue
        sure = float(stats.confidence[i])
        is_near = abs(sure - row.rules.editing.threshold) <= 4 * margin * sure * (1 - sure) + _ROUNDING
        is_close = stats.runner_up[i] > sure * np.exp(-4 * margin)
        is_same = theirs.get(position, int(stats.token[i])) == stats.token[i]
        if not (is_close or (is_near and is_same)):
            return False
    return True
