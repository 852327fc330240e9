"""A cache plan from outside, in one file."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from demo import PROMPT
from outside import OUTSIDE, added, command

from trt_runtime.decoding.cache_plan import REFINE_BLOCK, PrefixCache, RowView, Suffix
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.plans import PLANS
from trt_runtime.errors import DllmError


@pytest.fixture
def always(monkeypatch):
    monkeypatch.syspath_prepend(str(OUTSIDE))
    from outside_cache_plan import Always

    with added(PLANS, Always, "always"):
        yield Always
    sys.modules.pop("outside_cache_plan")


def test_a_cache_that_is_always_rebuilt_decodes_as_none(model, always):
    """In a batch, by the scheduler's step function, and with speculation, too."""
    prompts = [PROMPT, "clean hall with mop"]
    for options in ({}, {"policy": "fixed"}, {"suffix": 8}):
        expected = model.generate(prompts, GenerationConfig(cache="none", **options))
        made = model.generate(prompts, GenerationConfig(cache="always", **options))
        assert [row.tokens for row in made] == [row.tokens for row in expected]
        assert {step.kind for row in made for step in row.trace} == {"prefix_pass"}
        assert (
            [row.nfe for row in made] == [row.nfe for row in expected] == [row.prefix_passes for row in made]
        )
    speculated = model.generate(prompts, GenerationConfig(cache="always", policy="fixed", speculate=4))
    assert [row.tokens for row in speculated] == [
        row.tokens for row in model.generate(prompts, GenerationConfig(cache="none", policy="fixed"))
    ]


@pytest.mark.parametrize(("installed", "name"), [(True, "always"), (False, "outside_cache_plan:Always")])
def test_the_command_line_has_it(demo_artifact, installed, name):
    words = ("-m", "trt_runtime.cli", "generate", demo_artifact, PROMPT, "--cache", name, "--json")
    done = command(*words, installed=installed, cwd=OUTSIDE)
    assert done.returncode == 0, done.stderr
    assert {step[0] for step in json.loads(done.stdout)[0]["trace"]} == {"prefix_pass"}


def test_unknown_plans_are_refused_with_those_that_exist(model, always):
    with pytest.raises(DllmError, match="unknown cache 'alwys': did you mean 'always'"):
        GenerationConfig(cache="alwys").resolved(model.manifest)


def test_a_plan_sees_what_stands_around_the_block():
    """The row's view: masks of the block, gaps before it, and what is seen after it."""
    is_masked = np.zeros(20, bool)
    is_masked[[2, 9, 10, 13, 16, 17, 19]] = True
    view = RowView(is_masked, 8, 12, 1, (4, 8), opens_block=False, is_first_only=False, fills_gaps=True)
    assert view.inside.tolist() == [9, 10] and view.masked.tolist() == [2, 9, 10]
    assert view.after(Suffix(2)).tolist() == [12, 13, 14, 15, 18, 19]
    forward = PrefixCache(suffix=Suffix(0)).next_forward(view)
    assert forward.kind != REFINE_BLOCK and forward.far.tolist() == [12, 14, 15, 18] and forward.kv_len == 16
