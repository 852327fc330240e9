"""The Python API on the demo model: generate, stream, temperature, stop, infill, chat, and what it
refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from demo import PLAN, PROMPT, demo_task

import trt_runtime as rt
from trt_runtime.decoding.cache_plan import PREFIX_PASS
from trt_runtime.decoding.plans import names_for
from trt_runtime.decoding.policies.registry import POLICIES


@pytest.fixture(scope="module")
def model(demo_artifact):
    return rt.load(demo_artifact, threads=1)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_the_demo_model_answers(model, cache):
    result = model.generate([PROMPT], rt.GenerationConfig(cache=cache))[0]
    assert demo_task.is_right(result.text, PLAN), result.text
    assert result.nfe == len(result.trace) == result.prefix_passes + result.refine_steps
    assert result.num_useful == 4 * (5 + 4 + 3) + 1
    assert (result.refine_steps == 0) == (cache == "none")
    assert result.tokens_per_forward == result.num_useful / result.nfe


def test_parallel_unmasking_needs_fewer_forwards(model):
    single = model.generate([PROMPT], rt.GenerationConfig(policy="fixed", stop_at_eos=False))[0]
    parallel = model.generate([PROMPT], rt.GenerationConfig(policy="threshold", stop_at_eos=False))[0]
    factor = model.generate([PROMPT], rt.GenerationConfig(policy="factor", stop_at_eos=False))[0]
    assert single.nfe == 96
    assert parallel.nfe < 48 and factor.nfe < 48


def test_a_batch_equals_its_rows(model):
    prompts = [
        PROMPT,
        "find red keys in attic. next give Ada pink toys",
        "clean porch with broom",
        PROMPT[:30],
    ]
    together = model.generate(prompts)
    for prompt, result in zip(prompts, together, strict=True):
        assert model.generate([prompt])[0].tokens == result.tokens


def test_stream_tells_committed_from_provisional_text(model):
    updates = list(model.stream([PROMPT]))
    result = model.generate([PROMPT])[0]
    assert [update.nfe for update in updates] == list(range(1, result.nfe + 1))
    assert updates[-1].finished and updates[-1].committed == result.text and updates[-1].provisional == ""
    assert updates[-1].tokens == result.tokens
    grown = [update.committed for update in updates]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(grown))
    assert any(update.provisional for update in updates)
    changed = [position for update in updates for position in update.changed]
    assert len(changed) == len(set(changed))
    assert all(
        block[0] <= p < block[1] for update in updates for block in [update.block] for p in update.changed
    )


def test_stop_at_eos_saves_forwards_and_changes_no_useful_token(model):
    prompt = "clean hall with mop, then clean porch with broom"
    short = model.generate([prompt], rt.GenerationConfig(stop_at_eos=True))[0]
    full = model.generate([prompt], rt.GenerationConfig(stop_at_eos=False))[0]
    assert short.text == full.text and short.nfe < full.nfe
    assert model.manifest.decoding.mask_token_id not in short.tokens


def test_temperature_follows_its_seed_and_not_its_batch_mates(model):
    hot = rt.GenerationConfig(temperature=0.8, seed=5)
    first = model.generate([PROMPT], hot)[0].tokens
    assert model.generate([PROMPT], hot)[0].tokens == first
    assert model.generate([PROMPT, "clean hall with mop"], hot)[0].tokens == first
    others = {
        tuple(model.generate([PROMPT], rt.GenerationConfig(temperature=0.8, seed=s))[0].tokens)
        for s in range(6)
    }
    assert len(others) > 1
    assert model.manifest.decoding.mask_token_id not in first


def test_infill_fills_the_gaps_of_a_template(model):
    prompt = (
        '<|user|>clean hall with mop, and give Mia red cups<|assistant|>[{"do": "clean", "in": '
        '"<|mdm_mask|>", "with": "<|mdm_mask|>"}, {"do": "give"'
    )
    with pytest.raises(rt.DllmError, match="contains the mask token"):
        model.generate([prompt], raw=True)
    config = rt.GenerationConfig(infill=True, gen_length=0)
    result = model.generate([prompt], config, raw=True)[0]
    assert '"in": "hall", "with": "mop"' in model.tokenizer.decode(result.canvas)
    assert result.tokens == []


def test_prompts_as_ids_and_as_messages(model):
    ids = model.encode(PROMPT)
    expected = model.generate([PROMPT])[0].tokens
    assert model.generate([ids])[0].tokens == expected
    assert model.generate([np.array(ids)])[0].tokens == expected
    assert model.generate([[{"role": "user", "content": PROMPT}]])[0].tokens == expected
    assert model.encode(PROMPT, raw=True) == ids[1:-1]


@pytest.mark.parametrize(
    ("prompts", "config", "said"),
    [
        ([""], {}, "the prompt is empty"),
        (["  "], {}, "the prompt is empty"),
        ([[]], {}, "the prompt is empty"),
        ([], {}, "expected a list of one or more prompts"),
        ("text", {}, "expected a list of one or more prompts"),
        (
            [[5] * 200],
            {},
            "together more than the model's 256: shorten the prompt to 160 tokens or lower gen_length to 56.",
        ),
        ([[5] * 200], {"gen_length": 256}, "the model's 256: lower gen_length to 56."),
        ([[5] * 300], {"gen_length": 96}, "the model's 256: shorten the prompt to 160 tokens."),
        ([[5] * 300], {"gen_length": 300}, "the model's 256: shorten the prompt and lower gen_length."),
        ([[5, 999]], {}, "token id 999, expected 0 to 191"),
        ([[5, 1, 7]], {}, "contains the mask token (1) at position 1"),
        ([[5]], {"threshold": 0}, "threshold is 0, expected above 0 and at most 1"),
        ([[5]], {"threshold": 2}, "threshold is 2"),
        ([[5]], {"threshold": float("nan")}, "threshold is nan"),
        ([[5]], {"factor": 0}, "factor is 0"),
        ([[5]], {"gen_length": 0}, "gen_length is 0, expected a whole number from 1"),
        ([[5]], {"gen_length": -3}, "gen_length is -3"),
        ([[5]], {"gen_length": 0, "infill": True}, "there is nothing to generate"),
        ([[5]], {"block_length": 0}, "block_length is 0"),
        ([[5]], {"cache": "duel"}, "unknown cache 'duel': did you mean 'dual'"),
        ([[5]], {"policy": "treshold"}, "unknown policy 'treshold': did you mean 'threshold'"),
        ([[5]], {"steps": 4}, "steps is 4 with policy 'threshold'"),
        ([[5]], {"steps": 0, "policy": "fixed"}, "steps is 0"),
        ([[5]], {"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_what_is_refused(model, prompts, config, said):
    with pytest.raises(rt.DllmError) as error:
        model.generate(prompts, rt.GenerationConfig(**config))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("cache", names_for("full"))
@pytest.mark.parametrize("policy", POLICIES.names())
def test_every_policy_in_every_cache_mode_fills_the_canvas(golden_backend, golden_artifact, policy, cache):
    """Rows of unequal length as one batch equal their runs alone; no forward is wasted, and no more made than
    tokens."""
    model = rt.Model(golden_artifact, golden_backend)
    config = rt.GenerationConfig(
        gen_length=20,
        block_length=None if cache == "none" else 8,
        cache=cache,
        policy=policy,
        steps=10 if POLICIES.find(policy).is_schedule else None,
        stop_at_eos=False,
    )
    prompts = [[5, 6, 7], list(range(20, 40))]
    together = model.generate(prompts, config)
    for i, (prompt, result) in enumerate(zip(prompts, together, strict=True)):
        assert model.generate([prompt], replace(config, seed=i))[0].tokens == result.tokens
        assert 1000 not in result.tokens and all(step.positions for step in result.trace) and result.nfe <= 20


def test_a_dream_has_no_blocks_without_a_cache_unless_asked(golden_backend, golden_artifact):
    model = rt.Model(golden_artifact, golden_backend)
    facts = golden_backend.manifest.decoding
    free = rt.GenerationConfig(gen_length=24, cache="none", policy="maskgit_plus", stop_at_eos=False)
    written = [step.positions[0] for step in model.generate([[1, 2]], free)[0].trace]
    blocks = [step.positions[0] for step in model.generate([[1, 2]], replace(free, block_length=4))[0].trace]
    assert [p // 4 for p in np.array(blocks) - 2] == sorted(p // 4 for p in np.array(blocks) - 2)
    assert (written == sorted(written)) is False or facts.blocks_without_cache
    cached = model.generate([[1, 2]], replace(free, cache="dual", block_length=8))[0]
    first = [step for step in cached.trace if step.kind == PREFIX_PASS]
    assert facts.first_commit == all(
        step.positions == [p] for step, p in zip(first, (2, 10, 18), strict=True)
    )


def test_top_p_and_top_k_and_alg_temp(golden_backend, golden_artifact):
    model = rt.Model(golden_artifact, golden_backend)
    base = rt.GenerationConfig(gen_length=16, block_length=8, stop_at_eos=False)
    if golden_backend.manifest.decoding.sampling == "gumbel":
        greedy, filtered = (
            model.generate([[1, 2, 3]], replace(base, top_k=k, top_p=p))[0]
            for k, p in ((None, 1.0), (1, 0.1))
        )
        assert greedy.trace == filtered.trace  # at temperature 0 they change nothing
        hot = [
            model.generate([[1, 2, 3]], replace(base, temperature=5.0, seed=3, top_p=p))[0].tokens
            for p in (1e-9, 1.0)
        ]
        assert hot[0] != hot[1]
    else:
        greedy = model.generate([[1, 2, 3]], replace(base, block_length=None, cache="none", policy="fixed"))[
            0
        ].tokens
        only = replace(
            base, block_length=None, temperature=5.0, top_k=1, cache="none", policy="fixed", seed=3
        )
        assert model.generate([[1, 2, 3]], replace(only, policy="maskgit_plus"))[0].nfe == 15
        hot = [model.generate([[1, 2, 3]], replace(only, top_k=None, top_p=p))[0].tokens for p in (1e-9, 1.0)]
        assert hot[0] != hot[1] and len(greedy) == 16
    drawn = [
        model.generate([[1, 2]], replace(base, policy="entropy", alg_temp=5.0, seed=s))[0]
        for s in (0, 0, 1, 2)
    ]
    assert drawn[0].trace == drawn[1].trace and len({str(d.trace) for d in drawn}) > 1


def test_a_temperature_needs_logits(golden_fp16, golden_artifact, monkeypatch):
    """ONNX Runtime has them in any artifact; where a backend has none, it is said."""
    from trt_runtime.backends.ort import OrtBackend

    model, hot = (
        rt.load(golden_fp16, threads=1),
        rt.GenerationConfig(temperature=20.0, gen_length=8, block_length=8),
    )
    assert model.manifest.head == "statistics"
    tokens = {tuple(model.generate([[1, 2]], replace(hot, seed=seed))[0].tokens) for seed in range(4)}
    assert len(tokens) > 1
    monkeypatch.setattr(OrtBackend, "gives_logits", False)
    with pytest.raises(
        rt.DllmError, match=r"only statistics on ort: leave them out, or export it again with HEAD=logits"
    ):
        model.generate([[1, 2]], hot)
    with pytest.raises(rt.DllmError, match="no tokenizer: give the prompt as token ids"):
        model.generate(["text"])
    assert model.generate([[1, 2]], rt.GenerationConfig(gen_length=8, block_length=8))[0].text is None


def test_the_chat_template_is_rendered_in_a_sandbox(model, monkeypatch):
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    monkeypatch.setattr(model.tokenizer, "_template", attack)
    with pytest.raises(rt.DllmError, match="the chat template failed"):
        model.tokenizer.render_chat([{"role": "user", "content": "x"}])
    monkeypatch.setattr(model.tokenizer, "_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(rt.DllmError, match="roles must alternate"):
        model.tokenizer.render_chat([])


def test_the_first_forward_of_a_block_is_a_prefix_pass(model):
    result = model.generate([PROMPT], rt.GenerationConfig(stop_at_eos=False))[0]
    assert [step.kind for step in result.trace].count(PREFIX_PASS) == 12
    assert result.trace[0].kind == PREFIX_PASS


def test_a_stream_with_gaps_commits_the_answer_once(model):
    template = (
        "<|user|>clean <|mdm_mask|> with mop, and tidy porch with broom, and clean attic with "
        "mop<|assistant|>"
    )
    config = rt.GenerationConfig(infill=True, threshold=1.0)
    updates = list(model.stream([template], config, raw=True))
    result = model.generate([template], config, raw=True)[0]
    assert updates[-1].committed == result.text
    texts = [update.committed for update in updates]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


class _Letters:
    """A tokenizer whose tokens are bytes: a character may end in the next block."""

    has_chat_template = False

    def __init__(self, text):
        self.bytes = text.encode()

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_a_character_that_is_split_between_blocks_is_printed_whole():
    import io

    from trt_runtime.cli.render import show_stream
    from trt_runtime.model import Update

    data = "né日本語é".encode()
    letters = _Letters("")
    cuts = [2, 5, 9, len(data)]
    updates = [
        Update(0, i, "dual", letters.decode(data[:n]), "", [], [], [], (0, 1), n == len(data))
        for i, n in enumerate(cuts)
    ]

    class Streamed:
        def stream(self, prompts, config, raw):
            return iter(updates)

    out = io.StringIO()
    show_stream(Streamed(), "x", rt.GenerationConfig(), out=out)
    assert out.getvalue() == "né日本語é\n"


@pytest.mark.parametrize(
    ("prompts", "config", "said"),
    [
        ([5], None, "a prompt is 5"),
        ([None], None, "a prompt is None"),
        ([["a"]], None, "a prompt contains 'a'"),
        ([[1.7]], None, "a prompt contains 1.7"),
        ([[True]], None, "a prompt contains True"),
        ([b"abc"], None, "a prompt is b'abc'"),
        ([[{"role": "user", "content": "x"}, 5]], None, "a prompt contains {'role'"),
        ([[5]], {"gen_length": 8}, "config is a dict"),
        ([[5]], rt.GenerationConfig(gen_length=True), "gen_length is True, expected int"),
        ([[5]], rt.GenerationConfig(threshold="0.9"), "threshold is '0.9', expected float"),
        ([[5]], rt.GenerationConfig(stop_at_eos="no"), "stop_at_eos is 'no', expected bool"),
        ([[5]], rt.GenerationConfig(cache=7), "cache is 7, expected str | None"),
        ([[5]], rt.GenerationConfig(seed=-1), "seed is -1"),
    ],
)
def test_wrong_types_are_refused(model, prompts, config, said):
    with pytest.raises(rt.DllmError) as error:
        model.generate(prompts, config)
    assert said in str(error.value)


def test_unknown_backend_options_are_refused(demo_artifact):
    with pytest.raises(rt.DllmError, match="unknown option of the backend 'ort' 'devise'"):
        rt.load(demo_artifact, devise="cpu")
