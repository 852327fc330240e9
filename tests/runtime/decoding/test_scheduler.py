"""Continuous batching: what comes of a request is what comes of it alone, however requests arrive, share
forwards and leave."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.generator import Generator, Wanted
from trt_runtime.decoding.rules import rules_of
from trt_runtime.decoding.scheduler import Scheduler
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.decoding.step import window_of
from trt_runtime.errors import DllmError
from trt_runtime.measure import cases as decode_cases
from trt_runtime.measure import replay
from trt_runtime.model import load


def _sequence(manifest, rng, **fixed):
    """A random request over a random prompt."""
    options = {
        "gen_length": int(rng.choice([4, 8, 16, 24])),
        "block_length": int(rng.choice([4, 8])),
        "cache": str(rng.choice(["dual", "dual", "prefix", "none"])),
        "threshold": float(rng.choice([0.02, 0.1, 0.9])),
        "stop_at_eos": bool(rng.random() < 0.5),
    }
    config = GenerationConfig(**options | fixed).resolved(manifest)
    prompt = rng.integers(0, 900, int(rng.integers(1, 20)))
    return lambda: Sequence(prompt, rules_of(config, manifest))


def _alone(backend, sequence):
    Generator(backend, [sequence]).run()
    return sequence.canvas.tolist(), [step.as_list() for step in sequence.trace]


@pytest.mark.parametrize("slots", [1, 5])
def test_hundreds_of_requests_come_out_as_alone(golden_backend, slots):
    """Random arrivals, caches, lengths, blocks and ends. Rows of every kind share forwards, some with idle
    rows between them."""
    rng, count = np.random.default_rng(slots), 400 if slots > 1 else 60
    makers = [_sequence(golden_backend.manifest, rng) for _ in range(count)]
    expected = [_alone(golden_backend, make()) for make in makers]
    scheduler = Scheduler(golden_backend, slots, 48, spare=48)
    tickets, shared, idle = [], 0, 0
    while len(tickets) < count or not scheduler.is_idle:
        for _ in range(rng.integers(0, 3)):
            if len(tickets) < count:
                tickets.append(scheduler.submit(makers[len(tickets)]()))
        moved = scheduler.tick()
        used = [ticket.slot for ticket in moved]
        shared += len(moved) > 1
        idle += bool(moved) and max(used) - min(used) + 1 > len(moved)
    assert [
        (t.sequence.canvas.tolist(), [step.as_list() for step in t.sequence.trace]) for t in tickets
    ] == expected
    assert max(ticket.waited for ticket in tickets) <= slots + 1 + 4
    assert slots == 1 or (shared > 120 and idle > 8)


@pytest.mark.parametrize("count", [3, 40])
def test_several_steps_a_call_come_out_as_one_at_a_time(golden_artifact, count):
    """Requests whose rules a backend can follow and others, in company: the same answers and traces in fewer
    calls; each tick tells of all its steps."""
    backend = load(golden_artifact, "ort", threads=1).backend
    rng = np.random.default_rng(count)
    more = [
        {},
        {"policy": "factor", "factor": 1.5},
        {"policy": "fixed"},
        {"policy": "entropy"},
        {"policy": "threshold", "temperature": 5.0},
    ]
    makers = [
        _sequence(backend.manifest, rng, **{**more[i % 5 if i > 40 else i % 3], "threshold": 0.9})
        for i in range(80)
    ]
    expected = [_alone(backend, make()) for make in makers]
    forwards = sum(len(trace) for _, trace in expected)
    calls, several, real, real_steps = [], [], backend.forward, backend.refine_steps
    backend.steps_per_sync = count
    backend.forward = lambda role, *args, **options: (
        calls.extend([1] * (role == "refine")) or real(role, *args, **options)
    )

    def stepping(cache, slots, window, rules):
        several.append(len(rules))
        return real_steps(cache, slots, window, rules)

    backend.refine_steps = stepping
    scheduler, told, tickets = Scheduler(backend, 5, 48, spare=48), {}, []

    def step(ticket):
        told.setdefault(ticket.number, []).append(len(ticket.sequence.trace))

    while len(tickets) < len(makers) or not scheduler.is_idle:
        if len(tickets) < len(makers):
            tickets.append(scheduler.submit(makers[len(tickets)](), step))
        scheduler.tick()
    assert [
        (t.sequence.canvas.tolist(), [step.as_list() for step in t.sequence.trace]) for t in tickets
    ] == expected
    assert len(several) > 20 and max(several) > 1 and len(several) + len(calls) < 0.8 * forwards
    assert all(told[t.number][-1] == len(t.sequence.trace) for t in tickets)
    assert any(b - a > 1 for counts in told.values() for a, b in pairwise(counts))


def test_idle_rows_between_those_of_several_steps_hold_no_mask(golden_artifact):
    """Also where the mask is token 0, which idle rows are filled with otherwise."""
    backend = load(golden_artifact, "ort", threads=1).backend
    rng = np.random.default_rng(7)
    fixed = {"gen_length": 24, "block_length": 8, "cache": "dual", "threshold": 0.99, "stop_at_eos": False}
    scheduler = Scheduler(backend, 3, 64)
    tickets = [scheduler.submit(_sequence(backend.manifest, rng, **fixed)()) for _ in range(3)]
    while any(ticket.sequence.state.step == 0 for ticket in tickets):
        scheduler.tick()
    group = [Wanted(i, tickets[i].sequence, tickets[i].sequence.next_forward()) for i in (0, 2)]
    assert set(window_of(group, scheduler.cache.capacity).input_ids[1]) == {0}
    for ticket in (tickets[0], tickets[2]):
        ticket.sequence.rules = replace(ticket.sequence.rules, mask_token_id=0)
    assert set(window_of(group, scheduler.cache.capacity).input_ids[1]) == {1}


def test_all_goldens_in_company(golden_backend, golden_cases):
    """Recorded cases in shuffled order through four slots."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(golden_cases))
    longest = max(len(prompt) + case["gen_length"] for case in golden_cases for prompt in case["prompt"])
    scheduler = Scheduler(golden_backend, 4, longest)
    held = []
    for index in order:
        rows = decode_cases.rows_of(golden_backend.manifest, golden_cases[index])
        held.append((golden_cases[index], rows))
        for row in rows:
            scheduler.submit(row.sequence)
    while not scheduler.is_idle:
        scheduler.tick()
    for case, rows in held:
        assert replay.compare(case, replay.replayed(case, rows)) is None


def test_requests_leave_and_join_between_forwards(golden_backend):
    rng = np.random.default_rng(3)
    scheduler = Scheduler(golden_backend, 2, 48)
    makers = [
        _sequence(
            golden_backend.manifest,
            rng,
            gen_length=24,
            block_length=8,
            cache="dual",
            threshold=0.9,
            stop_at_eos=False,
        )
        for _ in range(5)
    ]
    tickets = [scheduler.submit(make()) for make in makers]
    for _ in range(3):
        scheduler.tick()
    assert [ticket.slot for ticket in tickets] == [0, 1, None, None, None]
    scheduler.cancel(tickets[0])
    scheduler.cancel(tickets[3])
    assert scheduler.rows[0] is None and len(scheduler.queue) == 2
    scheduler.tick()
    assert tickets[2].slot == 0
    while not scheduler.is_idle:
        scheduler.tick()
    assert [ticket.is_cancelled for ticket in tickets] == [True, False, False, True, False]
    for ticket, make in zip(tickets, makers, strict=True):
        if not ticket.is_cancelled:
            assert ticket.sequence.canvas.tolist() == _alone(golden_backend, make())[0]
    scheduler.cancel(tickets[1])
    assert not tickets[1].is_cancelled


def test_a_short_request_is_not_held_up_by_long_ones(golden_backend):
    """Placed beside three long ones it is served at least every fourth tick."""
    rng, manifest = np.random.default_rng(4), golden_backend.manifest
    scheduler = Scheduler(golden_backend, 4, 64)
    long = {"gen_length": 40, "block_length": 4, "cache": "dual", "threshold": 0.99, "stop_at_eos": False}
    tickets = [scheduler.submit(_sequence(manifest, rng, **long)()) for _ in range(3)]
    for _ in range(20):
        scheduler.tick()
    short = scheduler.submit(
        _sequence(
            manifest, rng, gen_length=8, block_length=8, cache="prefix", threshold=0.02, stop_at_eos=False
        )()
    )
    ticks = 0
    while not short.is_done:
        scheduler.tick()
        ticks += 1
    assert ticks <= 5 * short.sequence.nfe and not any(ticket.is_done for ticket in tickets)


def test_the_cache_is_as_long_as_its_requests_need(golden_backend):
    """It grows under rows in mid-block and shrinks after a while, and nobody's tokens change."""
    rng, manifest = np.random.default_rng(5), golden_backend.manifest
    long = {"gen_length": 120, "block_length": 8, "cache": "dual", "threshold": 0.9, "stop_at_eos": False}
    short = long | {"gen_length": 16}
    makers = [_sequence(manifest, rng, **(long if i in {3, 90} else short)) for i in range(120)]
    scheduler, tickets, seen = Scheduler(golden_backend, 3, 200), [], []
    while len(tickets) < 120 or not scheduler.is_idle:
        if len(tickets) < 120:
            tickets.append(scheduler.submit(makers[len(tickets)]()))
        scheduler.tick()
        seen.append(scheduler.cache.capacity)
    assert [ticket.sequence.canvas.tolist() for ticket in tickets] == [
        _alone(golden_backend, make())[0] for make in makers
    ]
    changes = [b - a for a, b in pairwise(seen) if a != b]
    assert (
        max(seen) < 200
        and sum(change > 64 for change in changes) == 2
        and sum(change < -64 for change in changes) >= 1
    )


def test_a_canvas_that_no_slot_holds_is_refused(golden_backend):
    scheduler = Scheduler(golden_backend, 1, 20)
    sequence = _sequence(golden_backend.manifest, np.random.default_rng(0), gen_length=24)()
    with pytest.raises(DllmError, match="expected at most 20"):
        scheduler.submit(sequence)
    assert scheduler.tick() == []
