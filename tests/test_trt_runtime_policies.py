"""Policies against naive restatements on thousands of random cases, and against the recorded units."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from trt_runtime.errors import DllmError
from trt_runtime.policies import BlockState, Factor, Fixed, RowStats, Threshold, quota
from trt_runtime.sequence import gumbel_propose


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
            (Fixed(steps), oracle.fixed(confidence, masked, max(1, oracle.quota(state.num_masked, steps)[state.step]))),
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
        no_mask_token = logits.shape[-1]  # that code may propose the mask token; here it is outside the vocabulary
        token, confidence = gumbel_propose(logits, uniform, unit["temperature"], no_mask_token)
        stats = RowStats(token, confidence, confidence, confidence)
        if unit["threshold"] is None:
            policy, state = Fixed(1), BlockState(unit["num_transfer"], 0)
        else:
            policy, state = Threshold(unit["threshold"]), BlockState(int(masked.sum()), 0)
        chosen = policy.select(stats, masked, state)
        # where the quota exceeds the masks that code marks unmasked positions too, which then keep their token
        assert chosen.tolist() == (np.array(unit["transfer_index"]) & masked).tolist()
        assert np.where(chosen, token, unit["x"]).tolist() == unit["x_after"]


def test_factor_follows_the_rule_of_the_paper_not_the_code():
    """(n + 1)(1 - c_n) < 1: for c = 0.9, 0.8, 0.7 that holds for n = 1 (0.2), 2 (0.6), not 3 (1.2). The v1 code takes 3."""
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
