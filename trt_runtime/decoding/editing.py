"""Token editing (LLaDA2.1): a committed token of the running block is replaced where the model is sure of
another one. Pure NumPy.

Every forward of a block may edit what earlier forwards committed, never the prompt and never what it commits
itself. A block without masks is looked at again until a forward edits nothing, at most `most` times. So an
edit can only happen before the block is stored, and a finished block never changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trt_runtime.decoding.policies.base import Bools, Ints, RowStats


@dataclass(frozen=True)
class Editing:
    """threshold: a confidence must exceed it. most: forwards of a block after its last mask."""

    threshold: float
    most: int

    def select(self, stats: RowStats, there: Ints) -> Bools:
        """Which positions [R] to edit. stats: of the positions; there: their tokens [R]."""
        return np.asarray((stats.confidence > np.float32(self.threshold)) & (stats.token != there))


@dataclass(frozen=True)
class EditState:
    """The editing of a running block. looks: forwards since it has no mask; is_settled: the last of them
    edited nothing."""

    looks: int = 0
    is_settled: bool = False

    def after(self, *, had_masks: bool, has_edited: bool) -> EditState:
        """The state after a forward."""
        return EditState() if had_masks else EditState(self.looks + 1, not has_edited)

    def is_done(self, editing: Editing) -> bool:
        """Whether a block without masks needs no further forward."""
        return self.is_settled or self.looks >= editing.most
