"""Naive implementations of the decoding rules, with loops and lists: the reference of the vectorised code."""

from __future__ import annotations

from collections.abc import Sequence


def quota(masked: int, steps: int) -> list[int]:
    """Give one position to each step in turn, front to back, until none is left."""
    counts = [0] * steps
    for i in range(masked):
        counts[i % steps] += 1
    return counts


def ranked(confidence: Sequence[float], masked: Sequence[bool]) -> list[int]:
    """Masked positions, most confident first; ties go to the lower position."""
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


def decaying_quota(masked: int, steps: int, first: int) -> list[int]:
    """Dream's schedule: time runs evenly from 1 to 0.001, and each step takes the share of it that passes."""
    counts, left = [], masked
    for i in range(first, steps):
        now, then = (1 - (1 - 1e-3) * k / steps for k in (i, i + 1))
        counts.append(left if i == steps - 1 else int(left * (1 - then / now)))
        left -= counts[-1]
    return counts


def bounded_threshold(
    confidence: Sequence[float], masked: Sequence[bool], value: float, budget: int
) -> set[int]:
    """Of the `budget` most confident, the first always and the others with confidence >= value."""
    order = ranked(confidence, masked)[:budget]
    return {i for rank, i in enumerate(order) if rank == 0 or confidence[i] >= value}


def kept_tokens(probability: Sequence[float], top_p: float, top_k: int | None) -> set[int]:
    """Tokens that top_p and then top_k keep: from the best on until their sum exceeds top_p, then only the k
    best."""
    order = sorted(range(len(probability)), key=lambda token: (-probability[token], token))
    kept, total = [], 0.0
    for token in order:
        if total > top_p:
            break
        kept.append(token)
        total += probability[token]
    return set(kept if top_k is None else kept[:top_k])
