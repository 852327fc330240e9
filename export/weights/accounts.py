"""Check that a checkpoint is complete: every weight has its tensors, and every tensor belongs to a weight or
is on the family's list of unused ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from trt_runtime.errors import DllmError

from ..checkpoint.huggingface import Checkpoint, some
from ..families.base import Family, Piece
from . import tensor_names


def check(pieces: Mapping[str, Sequence[Piece]], family: Family, checkpoint: Checkpoint) -> None:
    """Raise DllmError, with names, for tensors that are missing, unused, or used in part. pieces: those of
    every weight."""
    wanted = list(dict.fromkeys(piece.tensor for each in pieces.values() for piece in each))
    there = set(checkpoint.tensors)
    surplus = [
        name
        for name in sorted(there - set(wanted))
        if not any(re.fullmatch(pattern, name) for pattern in family.allowed_surplus)
    ]
    missing = [name for name in wanted if name not in there]
    if why := tensor_names.why_different(wanted, missing, surplus):
        raise DllmError(f"{checkpoint.path}: {why}")
    if missing:
        raise DllmError(
            f"{checkpoint.path}: {len(missing)} tensors are missing: {some(missing)}: download the "
            f"checkpoint again."
        )
    if surplus:
        advice = "they would be dropped silently; check that config.json belongs to these weights"
        if all(name.endswith(".bias") for name in surplus):
            advice = (
                f"{family.title} is implemented without these biases (a config.json that does not "
                f"mention them leaves them to the class)"
            )
        raise DllmError(
            f"{checkpoint.path}: {len(surplus)} tensors are not part of a {family.title} of this config: "
            f"{some(surplus)}: {advice}."
        )
    _check_rows([piece for each in pieces.values() for piece in each], checkpoint)


def _check_rows(pieces: Sequence[Piece], checkpoint: Checkpoint) -> None:
    """Raise DllmError for a tensor of which some rows belong to no weight, or to two."""
    taken: dict[str, list[tuple[int, int]]] = {}
    for piece in pieces:
        if piece.rows is not None:
            taken.setdefault(piece.tensor, []).append(piece.rows)
    for name, ranges in taken.items():
        end = 0
        for start, stop in sorted(ranges):
            if start != end:
                break
            end = stop
        if end != checkpoint.tensors[name].shape[0]:
            raise DllmError(
                f"{checkpoint.path}: tensor {name} has {checkpoint.tensors[name].shape[0]} rows, the weights "
                f"of this config take them up to {end}: config and weights belong to different models."
            )
