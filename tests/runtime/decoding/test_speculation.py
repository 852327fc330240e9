"""Speculation changes how many forwards an answer takes, and nothing of the answer."""

from __future__ import annotations

import numpy as np
import pytest
from places import ROOT

from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.generator import Generator
from trt_runtime.decoding.rules import rules_of
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.decoding.speculation import Speculating
from trt_runtime.errors import DllmError
from trt_runtime.measure import cases as decode_cases

PROMPTS = ROOT / "checkpoints" / "llada-demo" / "prompts.txt"


def _made(row):
    return [(step.kind, step.positions, step.tokens) for step in row.trace]


def _draws(sequence):
    rules = sequence.rules
    return (
        rules.sampler.needs_logits
        or rules.policy.name == "origin"
        or getattr(rules.policy, "alg_temp", 0) > 0
    )


@pytest.mark.parametrize("branches", [2, 5])
def test_goldens_come_out_as_with_a_call_a_step(golden_backend, golden_cases, branches):
    """All recorded prompts, decoded as recorded where nothing is drawn, and one token per step."""
    manifest, saved, compared = golden_backend.manifest, 0, 0
    for case in golden_cases[branches % 2 :: 2]:  # every case once
        rows = [row.sequence for row in decode_cases.rows_of(manifest, case)]
        others = [row.sequence for row in decode_cases.rows_of(manifest, case)]
        if _draws(rows[0]) or (
            case["mode"] == "none" and branches == 5
        ):  # canvases of whole branches: once is enough
            continue
        Generator(golden_backend, rows).run()
        Speculating(golden_backend, others, branches).run()
        assert [_made(row) for row in others] == [_made(row) for row in rows], case["id"]
        assert all(other.nfe <= row.nfe for other, row in zip(others, rows, strict=True))
        saved, compared = saved + sum(other.num_free for other in others), compared + len(rows)
    assert compared > 10 and saved > 50


@pytest.mark.parametrize(
    "options",
    [{}, {"cache": "prefix"}, {"cache": "none"}, {"refresh_every": 0}, {"suffix": 8}, {"policy": "eb"}],
    ids=str,
)
def test_answers_of_the_demo_model_stay(model, options):
    """One token per step (and a policy) with and without; the calls that were made are the forwards that are
    counted."""
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()[:6]
    base = {"policy": "fixed"} | options
    plain = model.generate(prompts, GenerationConfig(**base))
    made = model.generate(prompts, GenerationConfig(**base, speculate=4))
    assert [result.canvas for result in made] == [result.canvas for result in plain]
    assert [[step.positions for step in result.trace] for result in made] == [
        [step.positions for step in result.trace] for result in plain
    ]
    ratio = sum(result.nfe for result in plain) / sum(result.nfe for result in made)
    assert ratio > (1.0 if "policy" in options else 1.5), ratio
    assert all(
        result.nfe == result.prefix_passes + result.refine_steps and result.refine_steps >= 0
        for result in made
    )


class Counted:
    """A backend that counts its calls, and cannot copy slots."""

    def __init__(self, backend):
        self.backend, self.calls = backend, 0
        self.manifest, self.max_batch, self.steps_per_sync, self.new_cache = (
            backend.manifest,
            4,
            1,
            backend.new_cache,
        )

    def copy_slot(self, cache, source, slots):
        return False

    def forward(self, *args, **options):
        self.calls += 1
        return self.backend.forward(*args, **options)


def test_a_backend_that_cannot_copy_makes_every_branch(golden_backend):
    backend = Counted(golden_backend)
    config = GenerationConfig(gen_length=24, block_length=8, policy="fixed", stop_at_eos=False).resolved(
        backend.manifest
    )
    rules = rules_of(config, backend.manifest)
    plain, made = (Sequence(np.arange(3, 12), rules) for _ in range(2))
    Generator(golden_backend, [plain]).run()
    Speculating(backend, [made], 4).run()
    assert _made(made) == _made(plain) and made.nfe == backend.calls < plain.nfe
    with pytest.raises(DllmError, match="support 4 rows per call"):
        Speculating(backend, [Sequence(np.arange(3, 12), rules)], 5)


def test_streams_show_every_step_once(model):
    updates = list(
        model.stream(
            [PROMPTS.read_text(encoding="utf-8").splitlines()[0]],
            GenerationConfig(policy="fixed", speculate=4),
        )
    )
    changed = [position for update in updates for position in update.changed]
    assert len(changed) == len(set(changed)) > 30 and updates[-1].nfe == len(updates) and updates[-1].finished


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.5}, {"policy": "origin"}, {"policy": "entropy", "alg_temp": 0.5}, {"speculate": 0}],
)
def test_what_is_drawn_is_not_foretold(golden_backend, options):
    with pytest.raises(DllmError, match="speculate"):
        GenerationConfig(**{"speculate": 2} | options).resolved(golden_backend.manifest)
