"""Rows in the middle of a block (running.py): the same decisions as row by row, in every company; and how
much work the host does in a forward."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from places import ROOT

from trt_runtime.artifact import manifest as manifests
from trt_runtime.decoding.backend import Backend, Cache, Stats
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.generator import Generator
from trt_runtime.decoding.rules import rules_of
from trt_runtime.decoding.scheduler import Scheduler
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.errors import BackendError, DllmError

OPTIONS = (
    {"threshold": 0.9},
    {"threshold": 0.5, "stop_at_eos": True},
    {"policy": "factor", "factor": 2.0},
    {"policy": "fixed", "steps": 20},
    {"policy": "fixed"},
    {"policy": "entropy"},
    {"threshold": 0.7, "cache": "prefix"},
    {"threshold": 0.95, "block_length": 16},
    {"policy": "factor", "factor": 0.5, "cache": "none"},
    {"threshold": 0.9, "hold_back_eos": True},
)


class Answering(Backend):
    """Statistics that depend on what a row sees of itself, and on nothing else; often equal."""

    name: ClassVar[str] = "answering"
    is_on_cpu = True

    def __init__(self, manifest, *, token=None):
        self.manifest, self.token, self.calls = manifest, token, 0

    def new_cache(self, batch, capacity):
        return Cache(batch, capacity, None)

    def close(self):
        pass

    def _forward(self, role, cache, slots, window, want_logits):
        self.calls += 1
        row = np.arange(len(window.input_ids))[:, None]
        position = window.position_ids[row, window.logit_rows]
        masks = (window.input_ids == self.manifest.decoding.mask_token_id).sum(1)[:, None]
        mixed = (position * 2654435761 + masks * 40503 + window.write_index[:, None] * 97) % 1009
        token = 3 + mixed % 150 if self.token is None else np.full_like(mixed, self.token)
        token[mixed % 23 == 0] = self.manifest.decoding.eos_token_ids[0]
        confidence = ((mixed // 50) / 21).astype(np.float32)  # 21 values: many are equal
        return Stats(token, confidence, confidence / 3, 1 - confidence)


@pytest.fixture(scope="module", params=["llada-demo", "sdar-demo"])
def manifest(request, demo_artifact, block_causal_demo):
    artifact = demo_artifact if request.param == "llada-demo" else block_causal_demo
    return manifests.load(artifact)


def _rows(manifest, options=OPTIONS, row_by_row=False):
    rows = []
    for number, chosen in enumerate(options):
        given = {"gen_length": 40, "block_length": 8, "stop_at_eos": False} | dict(chosen)
        if manifest.decoding.is_block_causal:
            given.pop("cache", None)
            given.pop("hold_back_eos", None)
        config = GenerationConfig(**given).resolved(manifest)
        prompt = np.random.default_rng(number).integers(3, 150, 5 + 3 * number)
        row = Sequence(prompt, rules_of(config, manifest), number)
        if row_by_row:
            row.commit_rule = lambda forward: None
        rows.append(row)
    return rows


def _seen(rows):
    return [
        [
            (s[0].tolist(), s[1].confidence.tolist(), s[2].step, s[2].num_masked, s[2].positions.tolist(),
             [(p.tolist(), c.tolist()) for p, c in s[2].before])
            for step in row.trace for s in [step.seen]
        ]
        for row in rows
    ]  # fmt: skip


@pytest.mark.parametrize("options", [OPTIONS, OPTIONS[:3] * 3, OPTIONS[:1] * 5, OPTIONS[3:5] * 2])
def test_rows_decide_on_arrays_as_row_by_row(manifest, options):
    expected, got = _rows(manifest, options, row_by_row=True), _rows(manifest, options)
    for row in expected:
        Generator(Answering(manifest), [row]).run()
    Generator(Answering(manifest), got).run()
    assert [row.trace for row in got] == [row.trace for row in expected]
    assert [row.canvas.tolist() for row in got] == [row.canvas.tolist() for row in expected]
    assert _seen(got) == _seen(expected)
    assert any(len({tuple(s.positions) for s in row.trace}) > 5 for row in got)


@pytest.mark.parametrize("slots", [1, 3, 4])
def test_slots_that_fill_and_empty_change_nothing(manifest, slots):
    expected, got = _rows(manifest, OPTIONS * 2, row_by_row=True), _rows(manifest, OPTIONS * 2)
    for row in expected:
        Generator(Answering(manifest), [row]).run()
    scheduler = Scheduler(Answering(manifest), slots, 160)
    for row in got:
        scheduler.submit(row)
    while not scheduler.is_idle:
        scheduler.tick()
    assert [row.trace for row in got] == [row.trace for row in expected]


def test_a_row_may_be_told_what_to_write_in_the_middle_of_a_block(manifest):
    """And follows its policy again afterwards: both ways of advancing see the same row."""
    expected, got = (_rows(manifest, OPTIONS[:4], row_by_row=alone) for alone in (True, False))
    for rows in (expected, got):
        generator, number = Generator(Answering(manifest), rows), 0
        while not generator.is_finished:
            number += 1
            row = rows[1]
            masked = [] if row.is_finished else np.flatnonzero(row.is_masked[slice(*row.block)])
            told = number % 3 == 0 and len(masked)
            generator.step({1: ([int(row.block[0] + masked[-1])], [7])} if told else None)
    assert [row.trace for row in got] == [row.trace for row in expected]
    assert [row.canvas.tolist() for row in got] == [row.canvas.tolist() for row in expected]


def test_a_window_that_is_kept_does_not_change(manifest):
    """Recorders keep the inputs of calls."""
    kept, copies, backend = [], [], Answering(manifest)
    answer = backend._forward

    def forward(role, cache, slots, window, want_logits):
        kept.append(window)
        copies.append([array.copy() for array in vars(window).values() if isinstance(array, np.ndarray)])
        return answer(role, cache, slots, window, want_logits)

    backend._forward = forward
    Generator(backend, _rows(manifest, OPTIONS[:3])).run()
    for window, arrays in zip(kept, copies, strict=True):
        now = [array for array in vars(window).values() if isinstance(array, np.ndarray)]
        assert all(np.array_equal(a, b) for a, b in zip(now, arrays, strict=True))


def test_a_fork_in_the_middle_of_a_block_goes_on_alone(manifest):
    (row,) = _rows(manifest, OPTIONS[:1])
    generator = Generator(Answering(manifest), [row])
    while row.state.step < 3 or row.trace[-1].kind != "refine_block":
        generator.step()
    twin = row.fork()
    generator.run()
    Generator(Answering(manifest), [twin]).run()
    assert twin.canvas.tolist() == row.canvas.tolist()


def test_what_a_model_must_not_answer_is_refused_in_the_middle_of_a_block(manifest):
    def failing(fault):
        backend = Answering(manifest)
        answer = backend._forward

        def forward(*args):
            stats = answer(*args)
            return fault(stats) if backend.calls > 4 else stats

        backend._forward = forward
        return Generator(backend, _rows(manifest, OPTIONS[:1])).run

    mask = manifest.decoding.mask_token_id
    with pytest.raises(DllmError, match="the model proposed the mask token"):
        failing(lambda stats: replace(stats, token=np.full_like(stats.token, mask)))()
    with pytest.raises(DllmError, match=r"input_ids: values .* expected 0 to"):
        failing(lambda stats: replace(stats, token=np.full_like(stats.token, 10**6)))()
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(BackendError, match="confidence that is NaN or infinite"):
            failing(lambda stats, v=value: replace(stats, confidence=np.full_like(stats.confidence, v)))()


def _events(manifest, options, batch):
    """Calls of Python and C functions, without those of the backend's answers, for each forward."""
    counted, backend = [0], Answering(manifest)
    answer = backend._forward

    def forward(*args):
        sys.setprofile(None)
        try:
            return answer(*args)
        finally:
            sys.setprofile(count)

    def count(frame, event, arg):
        counted[0] += event in ("call", "c_call")

    backend._forward = forward
    config = GenerationConfig(gen_length=64, block_length=32, stop_at_eos=False, **options).resolved(manifest)
    rules = rules_of(config, manifest)
    generator = Generator(backend, [Sequence(np.full(40, 9), rules, seed) for seed in range(batch)])
    sys.setprofile(count)
    try:
        generator.run()
    finally:
        sys.setprofile(None)
    return counted[0] / backend.calls


@pytest.mark.parametrize(
    "options", [{"threshold": 0.99}, {"policy": "factor", "factor": 0.1}, {"policy": "fixed"}]
)
def test_the_work_of_the_host_stays_small(demo_artifact, options):
    """Counts, not times: what a call costs, and each row more."""
    manifest = manifests.load(demo_artifact)
    one, many = (_events(manifest, options, batch) for batch in (1, 16))
    assert one < 150 and (many - one) / 15 < 36  # row by row: 279 to 292, and 178 to 191


def test_the_benchmark_of_the_host_runs(demo_artifact, tmp_path, monkeypatch, capsys):
    import runpy

    monkeypatch.setattr(sys, "argv", ["host_loop.py", "--artifact", str(demo_artifact), "--rounds", "1"])
    runpy.run_path(str(ROOT / "benchmarks" / "cpu" / "host_loop.py"), run_name="__main__")
    assert capsys.readouterr().out.count("a row more") == 3
