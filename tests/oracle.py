"""Naive restatements of the decoding rules, with loops and lists: what the vectorised code is compared with."""

from __future__ import annotations

from collections.abc import Sequence


def quota(masked: int, steps: int) -> list[int]:
    """Give one position to each step in turn, front to back, until none is left."""
    counts = [0] * steps
    for i in range(masked):
        counts[i % steps] += 1
    return counts


def ranked(confidence: Sequence[float], masked: Sequence[bool]) -> list[int]:
    """Masked positions, most confident first; of equals the lower position first."""
    return sorted((i for i, m in enumerate(masked) if m), key=lambda i: (-confidence[i], i))


def fixed(confidence: Sequence[float], masked: Sequence[bool], count: int) -> set[int]:
    return set(ranked(confidence, masked)[:count])


def threshold(confidence: Sequence[float], masked: Sequence[bool], value: float) -> set[int]:
    order = ranked(confidence, masked)
    return {i for rank, i in enumerate(order) if rank == 0 or confidence[i] >= value}


def factor(confidence: Sequence[float], masked: Sequence[bool], value: float) -> set[int]:
    order = ranked(confidence, masked)
    accepted = min(1, len(order))
    for n in range(1, len(order) + 1):
        if (n + 1) * (1 - confidence[order[n - 1]]) < value:
            accepted = n
    return set(order[:accepted])
