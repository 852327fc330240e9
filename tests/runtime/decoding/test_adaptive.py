"""Adaptive policies against naive restatements of their rules, on thousands of random cases with ties and
values at a bound exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trt_runtime.decoding.policies import adaptive
from trt_runtime.decoding.policies.adaptive import (
    Dynamic,
    EntropyBounded,
    EntropyBoundedByConfidence,
    Hierarchy,
    LocalLeap,
    Margin,
    Prophet,
    SlowFast,
)
from trt_runtime.decoding.policies.base import BlockState, RowStats
from trt_runtime.decoding.policies.registry import POLICIES
from trt_runtime.decoding.policies.schedules import EntropyLinear


def _case(rng):
    """Statistics of candidates, which of them are masked, and the block's state with some history."""
    size = int(rng.integers(1, 24))
    confidence = rng.random(size) if rng.random() < 0.5 else rng.choice([0.3, 0.5, 0.6, 0.9, 1.0], size)
    runner_up = confidence * rng.choice([0.0, 1e-4, 1e-3, 0.01, 0.5], size)
    entropy = rng.random(size) if rng.random() < 0.5 else rng.choice([0.0, 0.05, 0.1], size)
    masked = rng.random(size) < rng.choice([0.0, 0.4, 1.0])
    positions = np.sort(rng.choice(60, size, replace=False))
    before = tuple(
        (np.arange(60), rng.choice([0.2, 0.7], 60, p=[0.9, 0.1])) for _ in range(int(rng.integers(0, 9)))
    )
    state = BlockState(size + int(rng.integers(0, 5)), len(before), positions=positions, before=before)
    return RowStats(np.arange(size), confidence, runner_up, entropy), masked, state


def _best(values, masked):
    """The masked position with the largest value, the first of equals; nothing if none is masked."""
    found = [i for i in range(len(values)) if masked[i]]
    return {max(found, key=lambda i: (values[i], -i))} if found else set()


def _eb(s, masked, state, gamma):
    rest = sorted((i for i in range(len(masked)) if masked[i]), key=lambda i: (s.entropy[i], i))
    best = 0
    for n in range(1, len(rest) + 1):
        together = [float(s.entropy[i]) for i in rest[:n]]
        if sum(together[:-1]) <= gamma:
            best = n
    return set(rest[:best])


def _eb_confidence(s, masked, state, gamma):
    rest = sorted((i for i in range(len(masked)) if masked[i]), key=lambda i: (-s.confidence[i], i))
    best = min(1, len(rest))
    for n in range(1, len(rest) + 1):
        together = [float(s.entropy[i]) for i in rest[:n]]
        if sum(together) - max(together) <= gamma:
            best = n
    return set(rest[:best])


def _above(values, masked, bound):
    return {i for i in range(len(masked)) if masked[i] and values[i] >= bound}


def _dynamic(s, masked, state, threshold, alpha):
    left = min(1.0, sum(masked) / max(1, state.num_masked))
    return _best(s.confidence, masked) | _above(s.confidence, masked, threshold * (1 - alpha * (1 - left)))


def _localleap(s, masked, state, threshold, low):
    anchors = _above(s.confidence, masked, threshold)
    near = {
        i
        for i in _above(s.confidence, masked, low)
        if any(abs(state.positions[i] - state.positions[a]) <= 4 for a in anchors)
    }
    return _best(s.confidence, masked) | anchors | near


def _hierarchy(s, masked, state, threshold, low):
    chosen = _best(s.confidence, masked) | _above(s.confidence, masked, threshold)
    run = []
    for i in [*(i for i in range(len(masked)) if masked[i]), None]:
        if run and (i is None or state.positions[i] != state.positions[run[-1]] + 1):
            top = max(run, key=lambda j: (s.confidence[j], -j))
            chosen |= {top} if s.confidence[top] >= low else set()
            run = []
        run.append(i)
    return chosen


def _prophet(s, masked, state):
    found = {i for i in range(len(masked)) if masked[i]}
    if not found:
        return found
    tiny = float(np.finfo(np.float32).tiny)
    gap = sum(
        math.log(max(s.confidence[i], tiny)) - math.log(max(s.runner_up[i], tiny)) for i in found
    ) / len(found)
    progress = 1 - len(found) / max(1, state.num_masked)
    needed = 7.5 if progress < 0.33 else 5.0 if progress < 0.67 else 2.5
    return found if gap >= needed else _best(s.confidence, masked)


def _slowfast(s, masked, state, threshold, low):
    def sees(positions, confidence):
        return max((int(p) for p, c in zip(positions, confidence, strict=True) if c >= low), default=-1)

    ends = [sees(p, c) for p, c in state.before]
    ends.append(
        sees(
            [p for p, m in zip(state.positions, masked, strict=True) if m],
            [c for c, m in zip(s.confidence, masked, strict=True) if m],
        )
    )
    chosen = _best(s.confidence, masked)
    if len(ends) > 6 or (len(ends) >= 2 and (ends[-1] - ends[-2]) ** 2 / 4 <= 1):
        chosen |= {i for i in _above(s.confidence, masked, threshold) if state.positions[i] <= ends[-1]}
    return chosen


RULES = {
    "eb": (EntropyBounded, _eb, [0.0, 0.1, 0.5, 2.0]),
    "eb_confidence": (EntropyBoundedByConfidence, _eb_confidence, [0.0, 0.1, 0.5, 2.0]),
    "margin": (Margin, lambda s, m, t, v: _best(s.margin, m) | _above(s.margin, m, v), [0.3, 0.5, 0.9]),
    "dynamic": (lambda v: Dynamic(0.9, v), lambda s, m, t, v: _dynamic(s, m, t, 0.9, v), [0.0, 0.3, 1.0]),
    "localleap": (
        lambda v: LocalLeap(0.9, v),
        lambda s, m, t, v: _localleap(s, m, t, 0.9, v),
        [0.3, 0.6, 0.9],
    ),
    "hierarchy": (
        lambda v: Hierarchy(0.9, v),
        lambda s, m, t, v: _hierarchy(s, m, t, 0.9, v),
        [0.3, 0.6, 1.0],
    ),
    "prophet": (lambda v: Prophet(), lambda s, m, t, v: _prophet(s, m, t), [0.0]),
    "slowfast": (lambda v: SlowFast(0.6, v), lambda s, m, t, v: _slowfast(s, m, t, 0.6, v), [0.3, 0.6]),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_equal_their_naive_restatement(name):
    make, naive, values = RULES[name]
    rng, sizes = np.random.default_rng(len(name)), set()
    for _ in range(3000):
        stats, masked, state = _case(rng)
        value = float(rng.choice(values))
        got = make(value).select(stats, masked, state)
        expected = naive(stats, masked.tolist(), state, value)
        assert set(np.flatnonzero(got)) == expected, (stats, masked, state, value)
        assert got.dtype == np.bool_ and not (got & ~masked).any() and got.any() == masked.any()
        sizes.add(min(3, len(expected)))
    assert sizes == {0, 1, 2, 3}


def test_the_registry_holds_what_is_tested():
    assert set(RULES) == {policy.name for policy in POLICIES.all() if policy.__module__ == adaptive.__name__}


def test_a_drawn_token_does_not_make_the_model_sure():
    """With a temperature the proposal may be another token than the best: margin and Prophet look at the
    best."""
    stats = RowStats(
        np.arange(2), np.array([1e-6, 1e-6]), np.array([1e-5, 1e-5]), np.zeros(2), best=np.array([0.99, 0.5])
    )
    state = BlockState(2, 0)
    assert Margin(0.9).select(stats, np.ones(2, bool), state).tolist() == [True, False]
    assert Prophet().select(stats, np.ones(2, bool), state).all()


def test_the_entropy_schedule_leaves_a_share_that_falls_linearly():
    """RND1's rule: all masks but the floor(N * step / S) of highest entropy stay, in float32; steps that
    would commit nothing are left out."""
    rng = np.random.default_rng(3)
    for _ in range(300):
        count, steps = int(rng.integers(1, 40)), int(rng.integers(1, 50))
        entropy, masked, done = rng.random(count), np.ones(count, np.bool_), 0
        expected, left = [], count
        for step in [*range(steps - 1, 0, -1), 0]:
            stay = int(np.floor(np.float32(count) * np.float32(step) / np.float32(steps)))
            if stay < left:
                expected.append(left - stay)
                left = stay
        policy, got = EntropyLinear(steps), []
        while masked.any():
            at = np.flatnonzero(masked)
            stats = RowStats(at, 1 - entropy[at], np.zeros(len(at)), entropy[at])
            chosen = policy.select(stats, np.ones(len(at), np.bool_), BlockState(count, done))
            assert entropy[at[chosen]].max() <= entropy[at[~chosen]].min(initial=2)
            masked[at[chosen]] = False
            got.append(int(chosen.sum()))
            done += 1
        assert got == expected
