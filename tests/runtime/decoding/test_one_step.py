"""One function advances rows, whoever asks: the loop, continuous batching, and speculation."""

from __future__ import annotations

import numpy as np
import pytest

from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.generator import Generator
from trt_runtime.decoding.rules import rules_of
from trt_runtime.decoding.scheduler import Scheduler
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.decoding.speculation import Speculating
from trt_runtime.errors import DllmError


def _row(backend, **options):
    config = {"gen_length": 16, "block_length": 8, "policy": "fixed", "stop_at_eos": False} | options
    return Sequence(
        np.arange(3, 12), rules_of(GenerationConfig(**config).resolved(backend.manifest), backend.manifest)
    )


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_what_is_written_in_place_of_a_choice_is_written_by_speculation_too(golden_backend, cache):
    """replay.follow writes what a case recorded. The steps that follow are those of the plain loop, from the
    same caches."""
    plain, speculated = (_row(golden_backend, cache=cache) for _ in range(2))
    loops = Generator(golden_backend, [plain]), Speculating(golden_backend, [speculated], 4)
    for number, position in enumerate((9, 14, 11)):
        for loop in loops:
            loop.step({0: ([position], [20 + number])})
        assert plain.canvas.tolist() == speculated.canvas.tolist() and plain.canvas[position] == 20 + number
    for loop in loops:
        loop.run()
    assert plain.canvas.tolist() == speculated.canvas.tolist()
    assert [step.as_list() for step in plain.trace] == [step.as_list() for step in speculated.trace]
    assert speculated.nfe <= plain.nfe


def test_speculation_and_steps_per_sync_are_refused_together(golden_backend, monkeypatch):
    monkeypatch.setattr(golden_backend, "steps_per_sync", 2)
    with pytest.raises(DllmError, match="speculate and steps_per_sync cannot be combined"):
        Speculating(golden_backend, [_row(golden_backend)], 2)


@pytest.mark.parametrize("asked", [1, 4])
def test_the_scheduler_and_the_loop_make_the_same_calls(golden_backend, monkeypatch, asked):
    """Also where the backend makes several steps before the host synchronises with it."""
    monkeypatch.setattr(golden_backend, "steps_per_sync", asked)
    calls = {"loop": [], "scheduler": []}
    real, real_steps = golden_backend.forward, golden_backend.refine_steps
    for name, notes in calls.items():
        monkeypatch.setattr(
            golden_backend, "forward", lambda role, *a, n=notes, **o: n.append(role) or real(role, *a, **o)
        )
        monkeypatch.setattr(
            golden_backend, "refine_steps", lambda *a, n=notes: n.append("several") or real_steps(*a)
        )
        row = _row(golden_backend, policy="threshold", threshold=0.5)
        if name == "loop":
            Generator(golden_backend, [row]).run()
            expected = row.canvas.tolist()
        else:
            scheduler = Scheduler(golden_backend, 1, 64)
            scheduler.submit(row)
            while not scheduler.is_idle:
                scheduler.tick()
            assert row.canvas.tolist() == expected
    assert calls["loop"] == calls["scheduler"] and ("several" in calls["loop"]) == (asked > 1)
