"""The server with a model of block-causal attention: each answer is what the model says alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import demo
import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
from serving import OTHERS, PROMPT, chat, serving  # noqa: E402

from trt_runtime.decoding.config import GenerationConfig  # noqa: E402
from trt_runtime.model import load  # noqa: E402

EDITS = {"threshold": 0.3, "edit_threshold": 0.1, "edit_steps": 4}
OPTIONS = (
    {},
    {"fuse_stores": False},
    {"cache": "block_dual", "small_block": 4},
    {"cache": "none"},
    EDITS,
)


@pytest.fixture(scope="module")
def model(block_causal_demo):
    with load(block_causal_demo, "ort", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module", params=[1, 2], ids=["one lane", "two lanes"])
def client(model, request):
    with serving(model, slots=4, lanes=request.param) as (url, _):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def _ask(client, prompt, options, **more):
    return client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": prompt}], extra_body=options, **more
    )


def test_the_order_becomes_the_plan_whole_and_as_a_stream(client, model):
    expected = model.generate([PROMPT], GenerationConfig())[0]
    whole = chat(client)
    assert demo.demo_task.is_right(whole.choices[0].message.content, demo.PLAN)
    assert whole.choices[0].message.content == expected.text
    assert whole.usage.model_extra["nfe"] == expected.nfe
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(client, stream=True) if chunk.choices]
    assert "".join(pieces) == expected.text and sum(map(bool, pieces)) > 3


def test_requests_of_all_options_share_slots_and_get_what_each_gets_alone(client, model):
    asked = [(prompt, options) for options in OPTIONS for prompt in OTHERS]
    expected = [model.generate([prompt], GenerationConfig(**options))[0] for prompt, options in asked]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda pair: _ask(client, *pair), asked))
    assert [answer.choices[0].message.content for answer in got] == [result.text for result in expected]
    assert [answer.usage.model_extra["nfe"] for answer in got] == [result.nfe for result in expected]
    edits = [result.num_edits for result in expected if result.num_edits]
    assert [n for answer in got if (n := answer.usage.model_extra.get("edits"))] == edits and edits


def test_a_stream_shows_each_edit_and_sends_text_that_no_longer_changes(client, model):
    """The canvas of the updates ends as the answer, though tokens of it changed; the text only grows."""
    expected = model.generate([PROMPT], GenerationConfig(**EDITS))[0]
    text, tokens, edited = "", {}, 0
    for chunk in chat(client, stream=True, **EDITS, stream_options={"provisional": True}):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            assert expected.text.startswith(text)
        for update in [(chunk.model_extra or {}).get("provisional")]:
            if update is None:
                continue
            first, end = update["block"]
            for position, _, _ in update["cells"]:
                changed = tokens.get(position, update["tokens"][position]) != update["tokens"][position]
                assert not changed or (position in update["edited"] and first <= position < end)
                tokens[position] = update["tokens"][position]
            edited += len(update.get("edited", ()))
    assert text == expected.text and edited == expected.num_edits > 0
    assert all(token == expected.tokens[position] for position, token in tokens.items())
    assert len(tokens) > 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache": "dual"}, "cache is 'dual', which is not for a model with block-causal attention"),
        ({"suffix_masks": 8}, "suffix_masks is for models with full attention"),
        ({"cache": "none", "fuse_stores": True}, "fuse_stores stores a block by the first step of the next"),
    ],
)
def test_options_of_full_attention_are_refused_with_the_reason(client, options, said):
    with pytest.raises(openai.BadRequestError, match=said):
        _ask(client, PROMPT, options)
