"""Policies against naive restatements on thousands of random cases, and against the recorded units."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from trt_runtime.decoding.policies.base import BlockState, RowStats
from trt_runtime.decoding.policies.confidence import Factor, Threshold
from trt_runtime.decoding.policies.schedules import (
    Entropy,
    Fixed,
    MaskgitPlus,
    Origin,
    TopkMargin,
    decaying_quota,
    quota,
)
from trt_runtime.decoding.sampling import gumbel_propose
from trt_runtime.errors import DllmError


def _stats(confidence: np.ndarray) -> RowStats:
    return RowStats(np.arange(len(confidence)), confidence, confidence / 2, 1 - confidence)


def _draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, often with ties and with values at a threshold exactly; and masks, sometimes none."""
    size = int(rng.integers(1, 40))
    confidence = rng.random(size) if rng.random() < 0.5 else rng.choice([0.1, 0.5, 0.9, 0.95, 1.0], size)
    return confidence, rng.random(size) < rng.choice([0.0, 0.3, 0.9, 1.0])


@pytest.mark.parametrize("seed", range(4))
def test_policies_equal_their_naive_restatement(seed):
    rng = np.random.default_rng(seed)
    for _ in range(1500):
        confidence, masked = _draw(rng)
        step, steps = int(rng.integers(0, 8)), int(rng.integers(1, 9))
        state = BlockState(int(rng.integers(0, 40)), min(step, steps - 1))
        value = float(rng.choice([0.05, 0.5, 0.9, 1.0]))
        bound = float(rng.choice([0.1, 0.5, 1.0, 2.0]))
        expected = [
            (
                Fixed(steps),
                oracle.fixed(confidence, masked, max(1, oracle.quota(state.num_masked, steps)[state.step])),
            ),
            (Threshold(value), oracle.threshold(confidence, masked, value)),
            (Factor(bound), oracle.factor(confidence, masked, bound)),
        ]
        for policy, positions in expected:
            got = policy.select(_stats(confidence), masked, state)
            assert set(np.flatnonzero(got)) == positions, (policy, confidence, masked, state)


def test_quota_equals_the_recorded_schedules(golden_units):
    checked = 0
    for masked, steps, schedule in golden_units["llada_num_transfer"]:
        assert quota(masked, steps) == schedule
        assert quota(masked, steps) == oracle.quota(masked, steps)
        checked += 1
    assert checked > 50


def test_selection_equals_the_recorded_units(golden_units):
    """get_transfer_index of the v1 code, with its Gumbel noise where the temperature is above 0."""
    for unit in golden_units["llada_select"]:
        logits = np.array(unit["logits"])
        masked = np.array(unit["mask_index"])
        noise = unit["uniform_noise"]
        uniform = np.array(noise) if noise is not None else np.zeros_like(logits)
        no_mask_token = logits.shape[
            -1
        ]  # that code may propose the mask token; here it is outside the vocabulary
        token, confidence = gumbel_propose(logits, uniform, unit["temperature"], no_mask_token)
        stats = RowStats(token, confidence, confidence, confidence)
        if unit["threshold"] is None:
            policy, state = Fixed(1), BlockState(unit["num_transfer"], 0)
        else:
            policy, state = Threshold(unit["threshold"]), BlockState(int(masked.sum()), 0)
        chosen = policy.select(stats, masked, state)
        # where the quota exceeds the masks that code marks unmasked positions too, which then keep their
        # token
        assert chosen.tolist() == (np.array(unit["transfer_index"]) & masked).tolist()
        assert np.where(chosen, token, unit["x"]).tolist() == unit["x_after"]


def test_factor_follows_the_rule_of_the_paper_not_the_code():
    """(n + 1)(1 - c_n) < 1: for c = 0.9, 0.8, 0.7 that holds for n = 1 (0.2), 2 (0.6), not 3 (1.2). The v1
    code takes 3."""
    confidence = np.array([0.7, 0.9, 0.8])
    got = Factor(1.0).select(_stats(confidence), np.ones(3, bool), BlockState(3, 0))
    assert got.tolist() == [False, True, True]


def test_gumbel_draws_follow_the_tempered_softmax():
    rng, logits = np.random.default_rng(0), np.array([[2.0, 1.0, 0.0, -1.0]])
    token, _ = gumbel_propose(np.repeat(logits, 20000, 0), rng.random((20000, 4)), 0.7, 3)
    weights = np.exp(logits[0, :3] / 0.7)
    assert np.abs(np.bincount(token, minlength=4)[:3] / 20000 - weights / weights.sum()).max() < 0.015
    assert 3 not in token  # the mask token is never drawn


def test_schedule_without_steps_is_refused():
    with pytest.raises(DllmError, match="0 steps"):
        quota(4, 0)


@pytest.mark.parametrize("seed", range(4))
def test_dreams_schedules_equal_their_naive_restatement(seed):
    """Whole blocks, forward by forward: the n-th forward commits the n-th count of the schedule that is not
    0, the best first."""
    rng = np.random.default_rng(seed)
    for _ in range(300):
        size, steps, forced = int(rng.integers(1, 40)), int(rng.integers(1, 50)), int(rng.integers(0, 2))
        masked, number = np.ones(size, bool), 0
        counts = [n for n in oracle.decaying_quota(size, steps, forced) if n] or [size]
        while masked.any():
            confidence = rng.choice([0.1, 0.5, 0.9], size) if rng.random() < 0.5 else rng.random(size)
            stats = RowStats(np.arange(size), confidence, rng.random(size) * confidence, rng.random(size))
            state = BlockState(size, number + forced, forced)
            for policy, score in (
                (MaskgitPlus(steps), confidence),
                (Entropy(steps), -stats.entropy),
                (TopkMargin(steps), confidence - stats.runner_up),
            ):
                got = policy.select(stats, masked, state)
                assert set(np.flatnonzero(got)) == oracle.fixed(score, masked, counts[number]), (
                    policy,
                    state,
                )
            masked &= ~got
            number += 1
        assert number == len(counts)


def test_dreams_schedules_equal_the_recorded_ones(golden_units):
    for masked, steps, _, schedule in golden_units["dream_schedule_vanilla"]:
        assert decaying_quota(masked, steps) == schedule == oracle.decaying_quota(masked, steps, 0)
    for block, steps, _, schedule in golden_units["dream_schedule_block"]:
        if steps == 1:  # that code leaves masks behind; here the second forward commits them all
            assert schedule == ["break, 7 left masked"]
            stats, state = _stats(np.random.default_rng(0).random(block - 1)), BlockState(block - 1, 1, 1)
            assert Entropy(1).select(stats, np.ones(block - 1, bool), state).all()
        else:
            assert (
                decaying_quota(block - 1, steps, 1) == schedule == oracle.decaying_quota(block - 1, steps, 1)
            )


@pytest.mark.parametrize("seed", range(4))
def test_a_bounded_threshold_carries_over_what_it_rejects(seed):
    """Whole runs: N // steps a forward and what was left over, and from the last step on all that is left."""
    rng = np.random.default_rng(seed)
    for _ in range(300):
        steps = int(rng.integers(1, 9))
        size = steps * int(rng.integers(1, 6))
        value, masked, number, left_over = float(rng.choice([0.3, 0.9])), np.ones(size, bool), 0, 0
        while masked.any():
            confidence = rng.random(size)
            budget = int(masked.sum()) if number >= steps - 1 else size // steps + left_over
            got = Threshold(value, steps).select(_stats(confidence), masked, BlockState(size, number))
            assert set(np.flatnonzero(got)) == oracle.bounded_threshold(confidence, masked, value, budget)
            left_over = budget - int(got.sum())
            masked &= ~got
            number += 1


def test_origin_commits_each_position_at_a_step_of_its_own():
    """The first step's share is 1 - t1/t0, later ones that of the masks left; every forward commits
    something."""
    size, steps = 40_000, 5
    state = BlockState(size, 0, 0, uniform=np.random.default_rng(0).random(size))
    masked, shares = np.ones(size, bool), []
    for number in range(steps):
        got = Origin(steps).select(_stats(np.zeros(size)), masked, BlockState(size, number, 0, state.uniform))
        shares.append(got.sum() / masked.sum())
        assert not (got & ~masked).any()
        masked &= ~got
    time = [1 - 0.999 * i / steps for i in range(steps + 1)]
    assert (
        np.allclose(shares[:-1], [1 - time[i + 1] / time[i] for i in range(steps - 1)], atol=0.02)
        and shares[-1] == 1
    )
    rng = np.random.default_rng(1)
    for _ in range(500):
        few, forced = int(rng.integers(1, 5)), int(rng.integers(0, 2))
        got = Origin(int(rng.integers(1, 60))).select(
            _stats(np.zeros(few)), np.ones(few, bool), BlockState(few, forced, forced, rng.random(few))
        )
        assert got.any()


def test_alg_temp_draws_positions_from_the_softmax_of_the_score():
    """One position of three: frequencies are those of softmax(confidence / alg_temp); two of three: never the
    same twice."""
    confidence, rng = np.array([0.9, 0.5, 0.1]), np.random.default_rng(0)
    weights = np.exp(confidence / 0.5)
    drawn = np.zeros(3)
    for _ in range(6000):
        got = MaskgitPlus(3, alg_temp=0.5).select(
            _stats(confidence), np.ones(3, bool), BlockState(3, 0, 0, None, rng)
        )
        assert got.sum() == 1
        drawn += got
    assert np.allclose(drawn / 6000, weights / weights.sum(), atol=0.02)
    for _ in range(50):
        got = Entropy(1, alg_temp=0.5).select(
            _stats(confidence), np.array([True, False, True]), BlockState(2, 0, 0, None, rng)
        )
        assert got.tolist() == [True, False, True]


def test_a_forced_first_position_leaves_the_other_steps_to_the_rest():
    """Four steps for eight positions, of which the prefix pass commits the first alone: 1, 3, 2, 2."""
    counts = [
        int(
            Fixed(4)
            .select(_stats(np.random.default_rng(0).random(7)), np.ones(7, bool), BlockState(7, s, 1))
            .sum()
        )
        for s in (1, 2, 3)
    ]
    assert counts == [3, 2, 2]


def test_a_bound_of_more_steps_than_masks_commits_one_at_a_time():
    """An even share of less than one position: never more than the most confident."""
    stats = RowStats(*(np.full(6, value) for value in (3, 0.95, 0.01, 0.1)))
    for step in range(5):
        chosen = Threshold(0.9, 20).select(stats, np.ones(6, np.bool_), BlockState(6 + step, step))
        assert chosen.sum() == 1
