"""Drawing proposals: Dream's filters against recorded units and a naive restatement, and frequencies against
probabilities."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from trt_runtime.artifact.manifest import CATEGORICAL, GUMBEL
from trt_runtime.decoding.policies.base import RowStats
from trt_runtime.decoding.sampling import Sampler, filtered, gumbel_propose

NOTHING = RowStats(*(np.zeros(0),) * 4)


def test_recorded_units_of_dream(golden_units):
    """sample_tokens of the v1 code at temperature 0: token and confidence, margin or negative entropy."""
    assert len(golden_units["dream_sample"]) == 108
    for unit in golden_units["dream_sample"]:
        logits = np.array(unit["logits"])
        top_p = unit["top_p"] if unit["top_p"] is not None else 1.0
        sampler, outside = Sampler(CATEGORICAL, 0.0, top_p, unit["top_k"]), logits.shape[-1]
        stats = sampler.propose(logits, NOTHING, outside, np.random.default_rng(0))
        got = {"max": stats.confidence, "margin": stats.margin, "entropy": -stats.entropy}[unit["mode"]]
        assert stats.token.tolist() == unit["x0"]
        assert np.abs(got - np.array(unit["confidence"])).max() < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_filters_equal_their_naive_restatement(seed):
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        logits = rng.normal(size=(1, int(rng.integers(2, 20)))) * rng.choice([0.5, 3.0])
        top_p, top_k = float(rng.choice([0.1, 0.5, 0.9, 1.0])), rng.choice([None, 1, 3])
        temperature, mask = float(rng.choice([0.0, 0.7, 2.0])), int(rng.integers(0, logits.shape[1]))
        allowed = np.where(np.arange(logits.shape[1]) == mask, -np.inf, logits[0]) / (temperature or 1.0)
        weights = np.exp(allowed - allowed.max())
        kept = oracle.kept_tokens((weights / weights.sum()).tolist(), top_p, top_k)
        expected = np.where(np.isin(np.arange(logits.shape[1]), list(kept)), weights, 0)
        got = filtered(logits, temperature, top_p, top_k, mask)[0]
        assert np.allclose(got, expected / expected.sum(), atol=1e-12)


def test_drawn_tokens_follow_their_probabilities_and_the_mask_is_never_drawn():
    logits = np.repeat(np.array([[1.0, 2.0, 9.0, 0.5, 1.5]]), 20_000, 0)
    stats = Sampler(CATEGORICAL, 0.8, 0.95).propose(logits, NOTHING, 2, np.random.default_rng(1))
    expected = filtered(logits[:1], 0.8, 0.95, None, 2)[0]
    assert np.allclose(np.bincount(stats.token, minlength=5) / 20_000, expected, atol=0.015)
    assert expected[2] == 0 and np.allclose(stats.confidence, expected[stats.token])
    assert np.allclose(stats.margin, np.sort(expected)[-1] - np.sort(expected)[-2])


@pytest.mark.parametrize("seed", range(3))
def test_gumbel_noise_among_what_the_filters_keep(seed):
    """A naive restatement: softmax(logits / T) says what top_p, then top_k keep; the best of logits + T *
    noise among those is taken, and its confidence is that of the whole vocabulary without temperature."""
    rng = np.random.default_rng(seed)
    dropped = 0
    for _ in range(1000):
        size = int(rng.integers(2, 20))
        logits = rng.normal(size=(1, size)) * rng.choice([0.5, 3.0])
        top_p, top_k = float(rng.choice([0.1, 0.5, 0.9, 1.0])), rng.choice([None, 1, 3])
        temperature, mask = float(rng.choice([0.3, 1.0, 2.0])), int(rng.integers(0, size + 1))
        draw = int(rng.integers(0, 2**31))
        noise = -np.log(-np.log(np.random.default_rng(draw).random((1, size))))[0]
        allowed = [i for i in range(size) if i != mask]
        weights = [np.exp(logits[0, i] / temperature) if i != mask else 0.0 for i in range(size)]
        kept = oracle.kept_tokens([w / sum(weights) for w in weights], top_p, top_k)
        expected = max((i for i in allowed if i in kept), key=lambda i: logits[0, i] + temperature * noise[i])
        dropped += expected != max(allowed, key=lambda i: logits[0, i] + temperature * noise[i])
        stats = RowStats(*(np.zeros(1),) * 4)
        made = Sampler(GUMBEL, temperature, top_p, top_k).propose(
            logits, stats, mask, np.random.default_rng(draw)
        )
        assert made.token[0] == expected
        assert np.isclose(made.confidence[0], np.exp(logits[0, expected]) / np.exp(logits[0]).sum())
    assert dropped > 100  # the filters decided


def test_filters_change_nothing_of_a_llada_without_temperature():
    assert not Sampler(GUMBEL, 0.0, 0.5, 3).needs_logits and Sampler(CATEGORICAL, 0.0, 0.5, None).needs_logits
    logits = np.random.default_rng(0).normal(size=(50, 9))
    token, _ = gumbel_propose(logits, np.full((50, 9), 0.5), 0.0, 9, filtered(logits, 0.0, 0.2, 1, 9) > 0)
    assert (token == logits.argmax(-1)).all()
