"""hold_back_eos: end tokens are committed last, whatever the policy; against a naive restatement, and with a
model that is surest of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest

from trt_runtime.decoding.backend import Backend, Cache, Stats
from trt_runtime.decoding.cache_plan import PREFIX_PASS, REFINE_BLOCK
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.generator import Generator
from trt_runtime.decoding.policies.base import BlockState, RowStats, select_holding_back, without_confidence
from trt_runtime.decoding.policies.registry import POLICIES
from trt_runtime.decoding.rules import rules_of
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.decoding.speculation import Speculating
from trt_runtime.model import Model

WORDS, LENGTH = 5, 16
OPTIONS = {name: {"policy": name} for name in POLICIES.names()} | {
    "entropy drawn": {"policy": "entropy", "alg_temp": 0.5},
    "maskgit_plus drawn": {"policy": "maskgit_plus", "alg_temp": 2.0},
    "fixed, 4 steps": {"policy": "fixed", "steps": 4},
    "bounded threshold": {"policy": "threshold", "steps": 4},
    "loose factor": {"policy": "factor", "factor": 6.0},
    "loose threshold": {"policy": "threshold", "threshold": 0.05},
    "loose eb": {"policy": "eb", "gamma": 50.0},
}


class Hasty(Backend):
    """Surest of the end token, the surer the further right. It has WORDS words to say, but as soon as an end
    token stands, none."""

    name = "hasty"

    def __init__(self, manifest, max_batch=None):
        self.manifest, self.max_batch = manifest, max_batch
        self.end, self.word = manifest.decoding.eos_token_ids[-1], 3
        assert self.word not in (*manifest.decoding.eos_token_ids, manifest.decoding.mask_token_id)

    def new_cache(self, batch, capacity):
        return Cache(batch, capacity, np.zeros((batch, capacity), np.int64))

    def copy_slot(self, cache, source, slots):
        cache.buffers[slots] = cache.buffers[source]
        return True

    def close(self):
        pass

    def _forward(self, role, cache, slots, window, want_logits):
        shape, shift = window.logit_rows.shape, self.manifest.decoding.logit_shift
        token, confidence = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        for b, rows in enumerate(window.logit_rows):
            canvas = cache.buffers[slots][b]
            canvas[window.position_ids[b]] = window.input_ids[b]
            answer = canvas[2 : 2 + LENGTH]
            has_ended, has_begun = self.end in answer, self.word in answer
            for r, row in enumerate(rows):
                # the row before a window tells nothing of its first position: what is asked there anyway gets
                # nonsense
                at = int(window.position_ids[b, row]) + shift - 2
                first_too = at > 0 or shift == 0 or has_begun
                is_word = not has_ended and at < WORDS and first_too
                token[b, r], confidence[b, r] = (
                    (self.word, 0.3 - 0.01 * at) if is_word else (self.end, 0.9 + 0.005 * at)
                )
        return Stats(token, confidence, np.float32(1 - confidence) / 2, np.float32(1 - confidence))


def _run(manifest, branches=1, **options):
    config = GenerationConfig(**{"gen_length": LENGTH, "block_length": 8, **options}).resolved(manifest)
    backend = Hasty(manifest)
    row = Sequence(np.array([7, 8]), rules_of(config, manifest), seed=5)
    (Generator(backend, [row]) if branches == 1 else Speculating(backend, [row], branches)).run()
    return row, backend


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_answer_that_would_be_empty_is_not(golden_backend, cache, options):
    manifest = golden_backend.manifest
    plain, backend = _run(manifest, cache=cache, **options)
    # these may draw a word first, or begin with it
    if options.get("policy") not in ("origin", "sequential") and "alg_temp" not in options:
        assert plain.num_useful < WORDS or len(plain.trace[0].tokens) > WORDS  # or all at once
        assert plain.num_useful == 0 or {"factor", "threshold", "gamma", "steps"} & set(options)
    row, backend = _run(manifest, cache=cache, hold_back_eos=True, **options)
    assert row.output[:WORDS].tolist() == [backend.word] * WORDS and row.num_useful == WORDS
    for step in row.trace:  # an end token only with all other candidates of its forward
        candidates, stats, _ = step.seen
        others = set(candidates[stats.token != backend.end].tolist())
        assert backend.end not in step.tokens or others <= set(step.positions)


def test_a_first_position_that_only_a_pass_can_fill_waits_for_one(golden_backend):
    """Where the row before a block predicts its first position, no refine step may be asked for it."""
    manifest = golden_backend.manifest
    row, _ = _run(manifest, cache="dual", policy="fixed", hold_back_eos=True)
    kinds = [step.kind for step in row.trace]
    assert kinds[:2] == (
        [PREFIX_PASS, PREFIX_PASS] if manifest.decoding.first_commit else [PREFIX_PASS, REFINE_BLOCK]
    )
    plain, _ = _run(manifest, cache="dual", policy="fixed")
    assert [step.kind for step in plain.trace][:1] == [PREFIX_PASS]


@pytest.mark.parametrize("branches", [2, 4, 12])
def test_speculation_holds_back_too(golden_backend, branches):
    for cache in ("none", "dual"):
        options = {"cache": cache, "policy": "fixed", "hold_back_eos": True, "stop_at_eos": False}
        alone, _ = _run(golden_backend.manifest, **options)
        made, _ = _run(golden_backend.manifest, branches, **options)
        assert [(s.positions, s.tokens) for s in made.trace] == [
            (s.positions, s.tokens) for s in alone.trace
        ] and made.nfe <= alone.nfe


def test_a_device_is_given_no_rule_for_it(golden_backend):
    """A commit kernel knows nothing of end tokens: the host chooses."""
    for held in (False, True):
        manifest = golden_backend.manifest
        config = GenerationConfig(
            gen_length=8, block_length=8, hold_back_eos=held, stop_at_eos=False
        ).resolved(manifest)
        row = Sequence(np.array([7, 8]), rules_of(config, manifest))
        first = row.next_forward()
        stats = np.full(len(first.candidates), 0.5, np.float32)
        row.commit(first, RowStats(np.full(len(stats), 3), stats, stats / 2, stats))
        assert (row.commit_rule(row.next_forward()) is None) == held


@pytest.mark.parametrize("seed", range(3))
def test_it_is_confidence_zero(seed):
    """The policies of which the paper speaks choose as if the confidence of end tokens were 0, restated with
    lists."""
    rng = np.random.default_rng(seed)
    for _ in range(600):
        size = int(rng.integers(1, 20))
        confidence, is_end = (
            rng.choice([0.2, 0.5, 0.9, 0.95], size).astype(np.float32),
            rng.random(size) < 0.5,
        )
        stats = RowStats(np.arange(size), confidence, confidence / 3, 1 - confidence)
        held = [0.0 if end else float(c) for c, end in zip(confidence, is_end, strict=True)]
        count, value = int(rng.integers(1, size + 1)), float(rng.choice([0.5, 0.9]))
        steps = -(-size // count)
        for options, expected in (
            (
                {"policy": "threshold", "threshold": value},
                oracle.threshold(held, [True] * size, np.float32(value)),
            ),
            ({"policy": "factor", "factor": 1 + value}, oracle.factor(held, [True] * size, 1 + value)),
            (
                {"policy": "fixed", "steps": steps},
                oracle.fixed(held, [True] * size, oracle.quota(size, steps)[0]),
            ),
        ):
            policy = GenerationConfig(gen_length=size, block_length=size, **options).make_policy()
            chosen = select_holding_back(
                policy, without_confidence(stats, is_end), is_end, BlockState(size, 0)
            )
            assert set(np.flatnonzero(chosen).tolist()) == expected, (options, held)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_policy_commits_an_end_before_the_rest(options):
    rng = np.random.default_rng(7)
    config = GenerationConfig(gen_length=24, block_length=24, **options)
    policy = config.make_policy()
    for _ in range(400):
        size = int(rng.integers(1, 24))
        confidence = rng.choice([0.0, 0.3, 0.9999, 1.0], size)  # 0: a drawn proposal may underflow
        is_end = rng.random(size) < rng.choice([0.2, 0.8, 1.0])
        stats = RowStats(
            np.arange(size), confidence, confidence * rng.choice([1e-9, 0.5, 1.0], size), rng.random(size)
        )
        state = BlockState(
            24, int(rng.integers(0, 3)), uniform=rng.random(size), rng=rng, positions=np.arange(size)
        )
        chosen = select_holding_back(policy, without_confidence(stats, is_end), is_end, state)
        assert chosen.any() and (not (chosen & is_end).any() or chosen[~is_end].all())


def test_the_option_reaches_the_decoding(model, demo_artifact, capsys):
    """By its name in the API and on the command line; answers that end by themselves keep their text."""
    from trt_runtime.cli import main as cli

    order = "clean hall with mop"
    plain = model.generate([order], GenerationConfig())[0]
    held = model.generate([order], GenerationConfig(hold_back_eos=True))[0]
    assert held.text == plain.text and held.nfe >= plain.nfe
    assert cli.main(["generate", str(demo_artifact), order, "--hold-back-eos"]) == 0
    assert plain.text in capsys.readouterr().out.replace("\n    ", " ")
    assert rules_of(
        GenerationConfig(hold_back_eos=True).resolved(model.manifest), model.manifest
    ).hold_back_eos
    assert isinstance(model, Model) and not replace(GenerationConfig()).hold_back_eos
