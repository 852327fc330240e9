"""Token editing (LLaDA2.1): committed tokens of the running block change, finished blocks and prompts do not;
every way of running it gives the same, and what does not go with it is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from official import EXPERTS

from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.editing import Editing, EditState
from trt_runtime.decoding.generator import Generator
from trt_runtime.decoding.policies.base import RowStats
from trt_runtime.decoding.policies.options import just_above
from trt_runtime.decoding.rules import rules_of
from trt_runtime.decoding.scheduler import Scheduler
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.errors import DllmError
from trt_runtime.model import Model

LENGTHS = (1, 5, 8, 13, 16)
EDITS = {"edit_threshold": 0.1, "edit_steps": 4}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A LLaDA2.1 whose mask token is told."""
    (official,) = (item for item in EXPERTS if item.name == "llada21")
    return official.export(tmp_path_factory.mktemp("llada21") / "artifact", mask_token="1000")


@pytest.fixture(scope="module")
def backend(artifact):
    return OrtBackend(artifact, threads=1)


def _rows(backend, **options):
    manifest = backend.manifest
    config = GenerationConfig(
        **{"gen_length": 19, "block_length": 8, "threshold": 0.3, "stop_at_eos": False, **EDITS, **options}
    ).resolved(manifest)
    rng = np.random.default_rng(4)
    return [
        Sequence(rng.integers(0, 1000, length), rules_of(config, manifest), seed=length) for length in LENGTHS
    ]


def _alone(backend, **options):
    rows = _rows(backend, **options)
    for row in rows:
        Generator(backend, [row]).run()
    return rows


def test_only_what_an_earlier_forward_committed_is_edited(backend):
    rows = _alone(backend)
    assert sum(row.num_edits for row in rows) > 5
    for row in rows:
        canvas, finished = row.canvas.copy(), 0
        canvas[row.prompt_length :] = row.rules.mask_token_id
        for step in row.trace:
            edited, tokens = step.edits
            assert not set(edited) & set(step.positions)
            assert all(row.prompt_length <= position >= finished for position in edited)
            assert all(
                canvas[p] not in (t, row.rules.mask_token_id) for p, t in zip(edited, tokens, strict=True)
            )
            canvas[step.positions], canvas[edited] = step.tokens, tokens
            finished = max(finished, step.start)  # a store, or a step of the next block
        assert (canvas[: row.end] == row.canvas[: row.end]).all()
        assert row.rules.mask_token_id not in row.output


def test_a_block_is_looked_at_until_nothing_is_edited_or_often_enough(backend):
    for most in (0, 1, 3):
        for row in _alone(backend, edit_steps=most):
            looks = [step for step in row.trace if not step.positions and step.kind == "refine_block"]
            assert len(looks) <= most * len(row.ranges)
    state, editing = EditState(), Editing(0.5, 2)
    state = state.after(had_masks=True, has_edited=True)
    assert not state.is_done(editing)
    assert state.after(had_masks=False, has_edited=False).is_done(editing)
    again = state.after(had_masks=False, has_edited=True)
    assert not again.is_done(editing) and again.after(had_masks=False, has_edited=True).is_done(editing)
    assert EditState().is_done(Editing(0.5, 0))


def test_a_confidence_must_exceed_the_threshold():
    stats = RowStats(np.array([1, 2, 3]), np.array([0.5, 0.6, 0.7], np.float32), np.zeros(3), np.zeros(3))
    there = np.array([9, 9, 3])
    assert Editing(0.5, 1).select(stats, there).tolist() == [False, True, False]
    assert Editing(float(np.float32(0.6)), 1).select(stats, there).tolist() == [False, False, False]
    assert np.float32(0.9) < just_above(0.9) == np.nextafter(np.float32(0.9), np.float32(1))


def test_batches_slots_and_caches_give_what_each_row_gives_alone(backend):
    alone, together = _alone(backend), _rows(backend)
    Generator(backend, together).run()
    assert [row.trace for row in together] == [row.trace for row in alone]
    requests, scheduler = _rows(backend), Scheduler(backend, 2, 64)
    for request in requests:
        scheduler.submit(request)
    while not scheduler.is_idle:
        scheduler.tick()
    assert [row.trace for row in requests] == [row.trace for row in alone]

    def decisions(rows):
        return [[(s.positions, s.tokens, s.edits) for s in row.trace if s.kind != "store"] for row in rows]

    whole = [
        [item for item in row if item[0] or item[2] != ([], [])]
        for row in decisions(_alone(backend, cache="none"))
    ]
    cached = [[item for item in row if item[0] or item[2] != ([], [])] for row in decisions(alone)]
    assert whole == cached


def test_several_steps_a_synchronisation_are_one_at_a_time_with_edits(backend):
    alone = _alone(backend)
    backend.steps_per_sync = 4
    try:
        assert [row.trace for row in _alone(backend)] == [row.trace for row in alone]
    finally:
        backend.steps_per_sync = 1


def test_results_and_updates_say_what_was_edited(artifact, backend):
    with Model(artifact, OrtBackend(artifact, threads=1)) as model:
        config = GenerationConfig(gen_length=19, block_length=8, threshold=0.3, stop_at_eos=False, **EDITS)
        prompt = [44, 239, 933, 760, 963]
        (result,) = model.generate([prompt], config)
        updates = list(model.stream([prompt], config))
        assert result.num_edits == sum(len(update.edited) for update in updates) > 0
        assert all(set(update.edited) <= set(update.changed) for update in updates)
        shown = [None] * 19
        for update in updates:
            for position in update.changed:
                shown[position] = update.tokens[position]
        assert shown == result.tokens
        assert model.generate([prompt], replace(config, edit_threshold=None))[0].num_edits == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"edit_threshold": 1.5}, "edit_threshold is 1.5, expected 0 to 1"),
        ({"edit_threshold": 0.9, "edit_steps": -1}, "edit_steps is -1, expected a whole number from 0"),
        ({"edit_threshold": 0.9, "speculate": 2}, "speculate takes them for final"),
        ({"edit_threshold": 0.9, "cache": "block_dual", "small_block": 4}, "decode a block in parts"),
        ({"edit_threshold": "high"}, "edit_threshold is 'high', expected float"),
    ],
)
def test_what_does_not_go_with_it_is_refused(backend, options, said):
    with pytest.raises(DllmError, match=said):
        GenerationConfig(**{"block_length": 8, **options}).resolved(backend.manifest)


def test_models_with_full_attention_do_not_edit(model):
    with pytest.raises(DllmError, match="edit_threshold is for models with block-causal attention"):
        GenerationConfig(edit_threshold=0.9).resolved(model.manifest)
