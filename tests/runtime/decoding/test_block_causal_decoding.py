"""Decoding with block-causal attention: every way of running it gives the tokens of the plain loop, and what
it cannot do is refused with the reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from official import BY_NAME

from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.blocks import blocks_of, row_lengths
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.generator import Generator
from trt_runtime.decoding.policies.base import BlockState, RowStats
from trt_runtime.decoding.policies.registry import POLICIES
from trt_runtime.decoding.rules import check_prompt, rules_of
from trt_runtime.decoding.scheduler import Scheduler
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.decoding.speculation import Speculating
from trt_runtime.decoding.step import Wanted, assemble
from trt_runtime.errors import DllmError
from trt_runtime.measure import likelihood
from trt_runtime.model import Model

LENGTHS = (1, 3, 8, 13, 16, 21)  # of prompts


@pytest.fixture(scope="module", params=BY_NAME)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def artifact(family, tmp_path_factory):
    return BY_NAME[family].export(tmp_path_factory.mktemp(family) / "artifact", head="logits")


@pytest.fixture(scope="module")
def backend(artifact):
    return OrtBackend(artifact, threads=1)


def _rows(backend, seed=0, **options):
    """One row for each length of LENGTHS."""
    rng, manifest = np.random.default_rng(seed), backend.manifest
    config = GenerationConfig(
        **{"gen_length": 21, "block_length": 8, "threshold": 0.6, "stop_at_eos": False, **options}
    ).resolved(manifest)
    return [
        Sequence(rng.integers(0, 1000, length), rules_of(config, manifest), seed=length) for length in LENGTHS
    ]


def _run(backend, **options):
    rows = _rows(backend, **options)
    for row in rows:
        Generator(backend, [row]).run()
    return rows


def _outputs(rows):
    return [row.output.tolist() for row in rows]


def _decisions(rows):
    """What was committed, forward by forward, whatever the forwards computed."""
    return [[(step.positions, step.tokens) for step in row.trace if step.positions] for row in rows]


def test_the_cache_is_exact(backend):
    """The same decisions as with a pass over everything in each forward."""
    assert _decisions(_run(backend)) == _decisions(_run(backend, cache="none"))


def test_the_answer_has_the_length_that_was_asked_for(backend):
    for gen in (1, 7, 8, 21):
        for row in _run(backend, gen_length=gen):
            assert len(row.output) == gen and 1000 not in row.output
            assert row.length >= row.end == row.prompt_length + gen
            assert row.ranges[0][0] == row.prompt_length and row.ranges[-1][1] == row.end


def test_a_store_fused_with_the_next_step_changes_only_the_number_of_forwards(family, backend):
    if backend.manifest.decoding.next_from_store:
        with pytest.raises(DllmError, match="next block begins with a token of the store"):
            _rows(backend, fuse_stores=True)
        return
    plain, fused = _run(backend, fuse_stores=False), _run(backend, fuse_stores=True)
    assert _decisions(fused) == _decisions(plain)
    assert [row.trace for row in fused] == [row.trace for row in _run(backend)]  # the default
    for one, other in zip(plain, fused, strict=True):
        stores = sum(step.kind in ("store", "prefill") for step in one.trace)
        assert other.nfe == one.nfe - stores
        assert not any(step.kind == "store" for step in other.trace)


def test_rows_of_any_lengths_in_one_batch_are_each_alone(backend):
    alone, together = _run(backend), _rows(backend)
    Generator(backend, together).run()
    assert [row.trace for row in together] == [row.trace for row in alone]


@pytest.mark.parametrize("slots", [1, 3])
def test_a_scheduler_gives_each_request_what_it_gets_alone(family, backend, slots):
    expected = _run(backend) + _run(backend, block_length=4, policy="fixed", steps=12)
    requests = _rows(backend) + _rows(backend, block_length=4, policy="fixed", steps=12)
    scheduler = Scheduler(backend, slots, 64)
    for request in requests[::2] + requests[1::2]:
        scheduler.submit(request)
    while not scheduler.is_idle:
        scheduler.tick()
    assert [row.trace for row in requests] == [row.trace for row in expected]


def test_speculation_saves_calls_and_changes_no_token(family, backend):
    options = {"policy": "fixed"}
    if family == "fastdllm_v2":
        options["small_block"] = 8
    plain, rows = _run(backend, **options), _rows(backend, **options)
    for row in rows:
        Speculating(backend, [row], 3).run()
    assert [[s.as_list() for s in row.trace] for row in rows] == [
        [s.as_list() for s in row.trace] for row in plain
    ]
    assert sum(row.num_free for row in rows) > 10


@pytest.mark.parametrize("cache", ["block", "block_dual"])
def test_several_steps_a_call_come_out_as_one_at_a_time(family, artifact, backend, cache):
    options = {"cache": cache} | ({"small_block": 4} if cache == "block_dual" else {})
    for policy in ("threshold", "fixed", "factor"):
        plain, rows = _run(backend, policy=policy, **options), _rows(backend, policy=policy, **options)
        several = OrtBackend(artifact, threads=1)
        several.steps_per_sync = 4
        Generator(several, rows).run()
        assert [row.trace for row in rows] == [row.trace for row in plain]


def test_steps_of_small_blocks_compute_the_small_block_alone(family, backend):
    rows = _run(backend, cache="block_dual", small_block=4)
    kinds = {step.kind for row in rows for step in row.trace}
    assert {"refine_fill", "refine_small", "store"} <= kinds and "refine_block" not in kinds
    assert all(step.length == 4 for row in rows for step in row.trace if step.kind == "refine_small")


def test_an_end_token_ends_the_row_at_once_and_is_the_last_of_its_text(backend):
    plain = _run(backend, policy="fixed")
    manifest = backend.manifest
    for row in plain:
        end = int(row.output[9])
        rules = rules_of(GenerationConfig(gen_length=21, block_length=8, policy="fixed").resolved(manifest),
                         manifest)  # fmt: skip
        stopped = Sequence(row.canvas[: row.prompt_length], replace(rules, eos_token_ids=(end,)))
        Generator(backend, [stopped]).run()
        first = row.output.tolist().index(end)
        assert stopped.num_useful == first and stopped.output[:first].tolist() == row.output[:first].tolist()
        assert stopped.nfe <= row.nfe and 1000 not in stopped.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"infill": True}, "a gap would not see what is right of its block"),
        (
            {"cache": "dual"},
            "cache is 'dual', which is not for a model with block-causal attention: use none",
        ),
        ({"refresh_every": 2}, "refresh_every is for models with full attention"),
        ({"suffix": 8}, "suffix is for models with full attention"),
        ({"small_block": 9}, "small_block is 9, expected 1 to the block length, 8"),
        ({"small_block": 0}, "small_block is 0"),
        ({"cache": "block_dual", "small_block": 8}, "a block has only one: use cache 'block'"),
        ({"cache": "block_dual"}, "a block has only one: use cache 'block'"),
        (
            {"cache": "block_dual", "small_block": 4, "speculate": 2},
            "speculate verifies steps of exact caches",
        ),
        ({"cache": "none", "fuse_stores": True}, "fuse_stores stores a block by the first step of the next"),
    ],
)
def test_what_does_not_go_with_it_is_refused_with_the_reason(backend, options, said):
    with pytest.raises(DllmError) as error:
        GenerationConfig(**{"block_length": 8, **options}).resolved(backend.manifest)
    assert said in str(error.value)


def test_a_canvas_that_the_model_cannot_hold_is_refused(family, backend):
    """512 positions: with blocks of 30 from position 0 on, 510 of them."""
    config = GenerationConfig(gen_length=50, block_length=30).resolved(backend.manifest)
    absolute = backend.manifest.decoding.block_origin == manifests.ABSOLUTE
    check_prompt([1] * 460, config, backend.manifest)
    if absolute:
        with pytest.raises(DllmError, match="more than the model's 510 in whole blocks of 30"):
            check_prompt([1] * 461, config, backend.manifest)
    else:
        check_prompt([1] * 462, config, backend.manifest)


def test_drawn_proposals_depend_on_the_seed_alone(backend):
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "policy": "fixed"}
    one, again, together = _run(backend, **options), _run(backend, **options), _rows(backend, **options)
    Generator(backend, together).run()
    assert _outputs(one) == _outputs(again) == _outputs(together)
    assert _outputs(one) != _outputs(_run(backend, policy="fixed"))


def test_updates_show_the_answer_alone(artifact, backend):
    """Positions behind gen_length are decoded with the last block, and shown nowhere."""
    model = Model(artifact, backend)
    config = GenerationConfig(gen_length=5, block_length=8, policy="fixed", stop_at_eos=False)
    updates = list(model.stream([[3, 4, 5]], config))
    assert sorted(p for update in updates for p in update.changed) == list(range(5))
    assert all(len(update.changed) == len(update.confidence) for update in updates)
    assert all(0 <= update.block[0] < update.block[1] <= 5 for update in updates)
    (result,) = model.generate([[3, 4, 5]], config)
    assert result.tokens == updates[-1].tokens and len(result.canvas) == 8 and len(result.pieces) == 5
    assert "block 1" in result._repr_html_()


@pytest.mark.parametrize("origin", manifests.ORIGINS)
def test_blocks_are_counted_from_their_origin(backend, origin):
    """Against a loop over positions."""
    facts = replace(backend.manifest.decoding, block_origin=origin)
    for length in (1, 3, 4, 7):
        for prompt in range(1, 10):
            blocks = blocks_of(facts, length, 2)
            total = blocks.canvas_length(prompt, 6)
            borders = list(range(0, 100, length)) if origin == "absolute" else []
            if not borders:
                borders = sorted({0, *range(prompt % length, 100, length)})
            assert total == min((b for b in borders if b >= prompt + 6), default=0) or origin != "absolute"
            assert total == prompt + 6 or origin == "absolute"
            reach = blocks.reach(prompt, total)
            for position in range(total):
                end = min(total, *(b for b in borders if b > position))
                start = max(b for b in borders if b <= position)
                assert reach[position] == end
                assert blocks.block_of(position, prompt, total) == (start, end)
                small = start + (position - start) // min(2, length) * min(2, length)
                found = blocks.small_block_of(position, prompt, total)
                assert found == (small, min(small + min(2, length), end))
    assert row_lengths(np.array([0, 3, 4, 7]), 6, 4).tolist() == [4, 4, 6, 6]


def _stats(confidence):
    values = np.array(confidence)
    return RowStats(np.arange(len(values)), values, 1 - values, values)


def _sdar(name, confidence, masked, quota, threshold):
    """SDAR's remasking, position by position."""
    order = sorted((i for i, m in enumerate(masked) if m), key=lambda i: (-confidence[i], i))
    if name == "sequential":
        return set(sorted(order)[:quota])
    if name == "low_confidence_dynamic":
        sure = {i for i in order if confidence[i] >= threshold}
        if len(sure) >= quota:
            return sure
    return set(order[:quota])


@pytest.mark.parametrize("name", ["sequential", "low_confidence_static", "low_confidence_dynamic"])
def test_sdars_policies_are_its_rules(name):
    rng = np.random.default_rng(0)
    for _ in range(300):
        length, steps = int(rng.integers(1, 17)), int(rng.integers(1, 20))
        masked = rng.random(length) < 0.7
        if not masked.any():
            continue
        confidence, step = rng.random(length).round(1), int(rng.integers(0, steps))
        quota = max(1, length // steps + (step < length % steps))
        policy = POLICIES.find(name).made({"threshold": 0.6}, steps)
        state = BlockState(int(masked.sum()), step, length=length)
        chosen = policy.select(_stats(confidence), masked, state)
        assert set(np.flatnonzero(chosen)) == _sdar(name, confidence, masked, quota, 0.6)


def test_a_likelihood_is_that_of_the_blocks(artifact, backend):
    """Of a target in one block, exactly: one masked token, and one token from the store before it."""
    model, rng = Model(artifact, backend), np.random.default_rng(3)
    facts = backend.manifest.decoding
    context, target = rng.integers(0, 1000, 32).tolist(), rng.integers(0, 1000, 1).tolist()
    got = likelihood.estimate(model, context, target, samples=4)
    assert got.forwards == 1 and got.standard_error == 0
    config = GenerationConfig(
        gen_length=1, block_length=facts.block_length, cache="none", policy="fixed", stop_at_eos=False
    )
    row = model.sequence(context, config)
    wanted = Wanted(0, row, row.next_forward())
    cache = backend.new_cache(1, row.length)
    stats = backend.forward(wanted.forward.role, cache, slice(0, 1), assemble([wanted]), want_logits=True)
    logits = stats.logits[0, 0].astype(np.float64)
    expected = logits[target[0]] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    assert got.mean == pytest.approx(expected, abs=1e-4)
    long = likelihood.estimate(model, context, rng.integers(0, 1000, 70).tolist(), samples=30)
    assert long.mean < got.mean and long.standard_error > 0 and 30 <= long.forwards < 40
