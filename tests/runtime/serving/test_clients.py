"""The server as its clients use it: OpenAI's own package, litellm, LangChain, LlamaIndex and
lm-evaluation-harness, each by the calls that it makes by default. Nothing is asked of anyone but the
server."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
from places import DEMO
from serving import OTHERS, PROMPT, serving

os.environ |= {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}
pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
from trt_runtime.decoding.config import GenerationConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the clients' own


@pytest.fixture
def text(model):
    """What the model says to PROMPT alone."""
    return model.generate([PROMPT], GenerationConfig())[0].text


def test_openai_an_answer_goes_back_as_history(client, model, text):
    messages = [{"role": "developer", "content": "Plan."}, {"role": "user", "content": PROMPT, "name": "bob"}]
    answer = client.chat.completions.create(model="demo", messages=messages)
    history = [
        *messages,
        answer.choices[0].message.model_dump(),
        {"role": "user", "content": "clean hall with mop"},
    ]
    told = [
        {"role": "system", "content": "Plan."},
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": answer.choices[0].message.content},
        {"role": "user", "content": "clean hall with mop"},
    ]
    second = client.chat.completions.create(model="demo", messages=history)
    expected, limited = GenerationConfig(), 192 - len(model.encode(told))
    expected = GenerationConfig(gen_length=min(96, limited))
    assert second.choices[0].message.content == model.generate([told], expected)[0].text
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": PROMPT[:20]}, {"type": "text", "text": PROMPT[20:]}],
        }
    ]
    assert client.chat.completions.create(model="demo", messages=parts).choices[0].message.content == text
    assert client.models.retrieve("demo").id == "demo"
    raw = client.chat.completions.with_raw_response.create(model="demo", messages=parts, temperature=0.9)
    assert raw.parse().system_fingerprint.endswith(f"-seed-{raw.headers['x-dllm-seed']}")


def test_openai_asynchronously_and_in_streams(demo, text):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{demo[0]}/v1", api_key="none", max_retries=0) as client:
            messages = [{"role": "user", "content": PROMPT}]
            whole = await client.chat.completions.create(model="demo", messages=messages)
            stream = await client.chat.completions.create(model="demo", messages=messages, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
            async with client.chat.completions.stream(model="demo", messages=messages) as helper:
                final = await helper.get_final_completion()
            return whole.choices[0].message.content, "".join(pieces), final.choices[0].message.content

    assert asyncio.run(ask()) == (text, text, text)


def test_openai_several_prompts_are_answered_in_their_order(client, model):
    prompts = [model.tokenizer.render_chat([{"role": "user", "content": prompt}]) for prompt in OTHERS]
    alone = [client.completions.create(model="demo", prompt=prompt, max_tokens=96) for prompt in prompts]
    for given in (prompts, [model.tokenizer.encode(prompt) for prompt in prompts]):
        made = client.completions.create(model="demo", prompt=given, max_tokens=96)
        assert [(c.index, c.text, c.finish_reason) for c in made.choices] == [
            (i, one.choices[0].text, one.choices[0].finish_reason) for i, one in enumerate(alone)
        ]
        for name in ("prompt_tokens", "completion_tokens", "total_tokens", "nfe", "committed_tokens"):
            assert getattr(made.usage, name) == sum(getattr(one.usage, name) for one in alone), name
    texts = [""] * len(prompts)
    for chunk in client.completions.create(
        model="demo", prompt=prompts, max_tokens=96, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [one.choices[0].text for one in alone] and chunk.usage == made.usage
    drawn = client.completions.create(
        model="demo", prompt=prompts[:2], n=3, temperature=0.8, seed=5, max_tokens=96
    )
    each = [
        model.generate([prompts[i // 3]], GenerationConfig(temperature=0.8, seed=5 + i), raw=True)[0].text
        for i in range(6)
    ]
    assert [choice.text for choice in drawn.choices] == each and drawn.usage.prompt_tokens == sum(
        len(model.tokenizer.encode(prompt)) for prompt in prompts[:2]
    )


def test_litellm(demo, text):
    litellm = pytest.importorskip("litellm")
    litellm.telemetry = False
    held = {"model": "openai/demo", "api_base": f"{demo[0]}/v1", "api_key": "none", "num_retries": 0}
    messages = [{"role": "user", "content": PROMPT}]
    answer = litellm.completion(messages=messages, **held)
    assert answer.choices[0].message.content == text and answer.usage.completion_tokens > 0
    streamed = litellm.completion(
        messages=messages, stream=True, stream_options={"include_usage": True}, **held
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices) == text
    history = [
        *messages,
        answer.choices[0].message.model_dump(),
        {"role": "user", "content": "clean hall with mop"},
    ]
    assert litellm.completion(messages=history, **held).choices[0].message.content is not None
    assert litellm.completion(messages=[*messages, answer.choices[0].message, messages[0]], **held).choices
    assert asyncio.run(litellm.acompletion(messages=messages, **held)).choices[0].message.content == text
    made = litellm.text_completion(
        model="text-completion-openai/demo",
        prompt=[PROMPT, PROMPT],
        max_tokens=16,
        api_base=held["api_base"],
        api_key="none",
    )
    assert len(made.choices) == 2 and made.choices[0].text == made.choices[1].text


def test_langchain(demo, text):
    langchain_openai = pytest.importorskip("langchain_openai")
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    held = {"model": "demo", "base_url": f"{demo[0]}/v1", "api_key": "none", "max_retries": 0}
    chat = langchain_openai.ChatOpenAI(**held)
    answer = chat.invoke(PROMPT)
    assert answer.content == text and answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream(PROMPT)) == text
    assert asyncio.run(chat.ainvoke([HumanMessage(PROMPT)])).content == text
    assert [made.content for made in chat.batch([PROMPT, PROMPT])] == [text, text]
    told = [
        SystemMessage("Plan."),
        HumanMessage([{"type": "text", "text": PROMPT}]),
        answer,
        AIMessage("[]"),
        HumanMessage("clean hall with mop"),
    ]
    assert isinstance(chat.invoke(told).content, str)
    assert chat.bind_tools([]).invoke(PROMPT).content == text
    assert chat.bind(stop=['"to"', '"target"']).invoke(PROMPT).content in text
    texts = langchain_openai.OpenAI(**held, max_tokens=16)  # temperature 0.7
    assert isinstance(texts.invoke(PROMPT), str) and len(texts.generate([PROMPT, PROMPT]).generations) == 2


def test_llama_index(demo, text):
    """Its package for OpenAI's API wants openai below 3: `.ci/run` runs this test in an environment that
    holds it."""
    like = pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage

    chat = like.OpenAILike(
        model="demo", api_base=f"{demo[0]}/v1", api_key="none", is_chat_model=True, temperature=0
    )
    assert (
        chat.complete(PROMPT).text
        == chat.chat([ChatMessage(role="user", content=PROMPT)]).message.content
        == text
    )
    assert "".join(chunk.delta or "" for chunk in chat.stream_complete(PROMPT)) == text
    texts = like.OpenAILike(model="demo", api_base=f"{demo[0]}/v1", api_key="none", is_chat_model=False)
    assert isinstance(texts.complete(PROMPT).text, str)


@pytest.mark.parametrize("tokenized", [True, False])
def test_lm_eval_over_completions(model, tokenized):
    """generate_until of several prompts, with more stop strings than OpenAI's four."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from types import SimpleNamespace

    from lm_eval.models.openai_completions import LocalCompletionsAPI

    prompts = [model.tokenizer.render_chat([{"role": "user", "content": prompt}]) for prompt in OTHERS]
    stops = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", '"}, {"']
    with serving(model, slots=4) as (url, _):
        asked = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions",
            model="demo",
            tokenizer=str(DEMO),
            tokenizer_backend="huggingface",
            tokenized_requests=tokenized,
            batch_size=4,
            max_retries=1,
            num_concurrent=1,
        )
        requests = [
            SimpleNamespace(args=(prompt, {"until": stops, "max_gen_toks": 96, "do_sample": False}))
            for prompt in prompts
        ]
        got = asked.generate_until(requests, disable_tqdm=True)
    expected = [
        model.generate([prompt], GenerationConfig(gen_length=96), raw=True)[0].text.split('"}, {"')[0]
        for prompt in prompts
    ]
    assert got == expected


def test_lm_eval_over_chat(model, text):
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from types import SimpleNamespace

    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion

    with serving(model, slots=4) as (url, _):
        asked = LocalChatCompletion(
            base_url=f"{url}/v1/chat/completions", model="demo", max_retries=1, num_concurrent=1
        )
        prompt = JsonChatStr(json.dumps([{"role": "user", "content": PROMPT}]))
        request = SimpleNamespace(args=(prompt, {"until": ["nowhere"], "max_gen_toks": 96}))
        assert asked.generate_until([request], disable_tqdm=True) == [text]
