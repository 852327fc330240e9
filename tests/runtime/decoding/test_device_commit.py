"""Several refine steps in one call: the same tokens, order and number of forwards as step by step."""

from __future__ import annotations

import numpy as np
import pytest

from trt_runtime.decoding import device_commit as steps
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.policies.base import BlockState, CommitRule, RowStats
from trt_runtime.decoding.policies.confidence import Factor, Threshold
from trt_runtime.decoding.policies.schedules import Fixed
from trt_runtime.errors import DllmError
from trt_runtime.measure import replay
from trt_runtime.model import load

MASK = 99


@pytest.mark.parametrize("count", [2, 5, 40])
def test_goldens_exactly_when_the_host_synchronises_every(golden_artifact, golden_cases, count):
    backend = load(golden_artifact, "ort", threads=1).backend
    backend.steps_per_sync = count
    calls, real = [], backend.refine_steps
    backend.refine_steps = lambda *args: calls.append(1) or real(*args)
    chosen = golden_cases[:: 2 if count == 5 else 5]
    assert [replay.compare(case, replay.replay(backend, case)) for case in chosen] == [None] * len(chosen)
    assert len(calls) > 5


def test_rows_of_a_batch_end_on_their_own(demo_artifact):
    """With ends of sequence, in one batch: what the host decides at each step and what follows from several
    are the same."""
    prompts = [
        "clean hall with mop",
        "take red cups from kitchen to garage, then hand blue pens to Mia, and clean hall with mop",
    ]
    made = []
    for count in (1, 6):
        model = load(demo_artifact, "ort", threads=1)
        model.backend.steps_per_sync = count
        results = model.generate(prompts, GenerationConfig(threshold=0.9))
        made.append([(row.tokens, row.nfe, [step.as_list() for step in row.trace]) for row in results])
    assert made[0] == made[1]


def _random_case(rng, columns=24):
    limit = int(rng.integers(1, columns + 1))
    ids = rng.integers(0, 90, columns)
    ids[rng.random(columns) < 0.6] = MASK
    confidence = (
        rng.choice([0.2, 0.5, 0.9, 0.95, 1.0], columns) if rng.random() < 0.3 else rng.random(columns)
    )
    return limit, ids.astype(np.int64), rng.integers(0, 90, columns), confidence.astype(np.float32)


def test_the_commit_is_the_policies_on_arrays():
    """Thousands of random blocks, ties among them: the positions that the policy itself selects, and the
    state after it."""
    rng = np.random.default_rng(0)
    for _ in range(4000):
        limit, ids, token, confidence = _random_case(rng)
        where = np.flatnonzero(ids[:limit] == MASK)
        schedule = int(rng.integers(1, 9))
        policy = [
            Fixed(schedule),
            Fixed(),
            Threshold(float(rng.choice([0.5, 0.9, 0.99]))),
            Factor(float(rng.uniform(0.1, 3))),
        ][rng.integers(4)]
        masks = len(where) + int(rng.integers(0, 4))
        state = BlockState(
            masks, int(rng.integers(0, 5)), int(rng.integers(0, 2)) if isinstance(policy, Fixed) else 0
        )
        state = BlockState(masks, max(state.step, state.forced), state.forced)
        rule = policy.rule(state, limit)
        held, after = steps.commit_arrays([rule], len(ids)), ids[None].copy()
        steps.commit(after, token[None], confidence[None], held, MASK)
        if not len(where):
            assert (after[0] == ids).all() and held.state.tolist() == [[rule.number, 0]]
            continue
        stats = RowStats(token[where], confidence[where], confidence[where], confidence[where])
        chosen = where[policy.select(stats, np.ones(len(where), np.bool_), state)]
        expected = ids.copy()
        expected[chosen] = token[chosen]
        assert (after[0] == expected).all()
        assert np.flatnonzero(held.committed[0] >= 0).tolist() == chosen.tolist()
        assert held.state.tolist() == [[rule.number + 1, len(where) - len(chosen)]]


def test_faults_stop_a_row_and_are_told():
    rule = CommitRule("threshold", 3, 0.5)
    for confidence, token, said in (
        ([0.1, np.nan, 0.9], [1, 2, 3], "NaN or infinite"),
        ([0.1, 0.2, 0.9], [1, 2, MASK], "the mask token"),
    ):
        ids, held = np.full((1, 3), MASK), steps.commit_arrays([rule], 3)
        for _ in range(2):
            steps.commit(ids, np.array([token]), np.array([confidence], np.float32), held, MASK)
        assert (ids == MASK).all() and held.state[0, 0] == 0
        with pytest.raises(DllmError, match=said):
            steps.finished(held, [rule], ids)


def test_policies_that_draw_or_count_otherwise_are_left_to_the_host(golden_artifact, golden_cases):
    assert Threshold(0.9, 4).rule(BlockState(8, 0), 8) is None
    backend = load(golden_artifact, "ort", threads=1).backend
    backend.steps_per_sync = 4
    backend.refine_steps = lambda *_: (_ for _ in ()).throw(AssertionError("not for a device"))
    model = load(golden_artifact, "ort", threads=1)
    model.backend = backend
    model.generate([[5, 6, 7]], GenerationConfig(gen_length=8, block_length=8, policy="entropy"))
    model.generate([[5, 6, 7]], GenerationConfig(gen_length=8, block_length=8, temperature=0.5))
    with pytest.raises(AssertionError, match="not for a device"):
        model.generate([[5, 6, 7]], GenerationConfig(gen_length=8, block_length=8))


def test_a_stream_tells_of_every_position_once(demo_artifact):
    model = load(demo_artifact, "ort", threads=1)
    for model.backend.steps_per_sync in (1, 4):
        updates = list(
            model.stream(["clean hall with mop"], GenerationConfig(threshold=0.9, stop_at_eos=False))
        )
        told = [position for update in updates for position in update.changed]
        assert sorted(told) == list(range(96)) and updates[-1].finished


def test_no_more_steps_are_made_than_can_be_needed(golden_artifact):
    """A fixed schedule knows its number; a threshold at most the masks that are left. What is made for
    nothing is not counted."""
    for config, most in (
        (GenerationConfig(gen_length=16, block_length=8, policy="fixed", steps=6), 2),
        (GenerationConfig(gen_length=16, block_length=8, threshold=0.999), 7),
    ):
        model = load(golden_artifact, "ort", threads=1)
        (expected,) = model.generate([[5, 6, 7]], config)
        made, real = [], model.backend._forward
        model.backend._forward = lambda role, *args, made=made, real=real, **options: (
            made.extend([1] * (role == "refine")) or real(role, *args, **options)
        )
        model.backend.steps_per_sync = 100
        (got,) = model.generate([[5, 6, 7]], config)
        assert (got.tokens, got.nfe) == (expected.tokens, expected.nfe)
        steps = len(made)
        assert got.refine_steps <= steps <= most * 2 and (
            config.policy != "fixed" or steps == got.refine_steps
        )
