"""What a request may say: every field of OpenAI's API is honoured, taken where it changes nothing, or refused
by its name."""

from __future__ import annotations

import json
import re

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from serving import PROMPT, post, serving

from trt_runtime.decoding.config import GenerationConfig, option_names
from trt_runtime.serving.requests import OPTIONS, ChatRequest, CompletionRequest

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "clean hall with mop"}]}
TEXT = {"model": "demo", "prompt": "clean hall with mop", "max_tokens": 8}
# values that change nothing, and values that would, of what is not honoured
BOTH = {
    "frequency_penalty": ([0, 0.0, None], [0.5, -1]),
    "presence_penalty": ([0, None], [1]),
    "logit_bias": ([{}, {"5": 0}, None], [{"5": 10}]),
    "user": (["u1", None], [7]),
    "logprobs": ([None, 0, 0.0], [5, 1]),
    "stop": ([None, []], [[""]]),
    "seed": ([None, 3, 3.0], [3.5, -1]),
    "n": ([None, 1, 1.0], [0, 1.5]),
    "stream": ([None, False], [1]),
    "stream_options": ([None], [{}]),
    "temperature": ([None, 0, 0.0], ["0"]),
    "top_p": ([None, 1, 0.5], [2]),
    "top_k": ([None, -1, 0, 5, 5.0], [-2, 1.5]),
    "max_tokens": ([None, 64, 64.0, 10**9], [64.5, 0, -1, "9"]),
}
OF_CHAT = {
    "audio": ([None], [{"voice": "x", "format": "wav"}]),
    "function_call": ([None, "none", "auto"], [{"name": "f"}]),
    "functions": ([None, []], [[{"name": "f"}]]),
    "logprobs": ([None, False], [True]),
    "max_completion_tokens": ([None, 64, 64.0], [0, 1.5]),
    "metadata": ([None, {}, {"a": "b"}], ["x"]),
    "modalities": ([None, ["text"]], [["text", "audio"]]),
    "moderation": ([None], [{"model": "m"}]),
    "parallel_tool_calls": ([None, True, False], [1]),
    "prediction": ([None], [{"type": "content", "content": "x"}]),
    "prompt_cache_key": ([None, "k"], [1]),
    "prompt_cache_options": ([None, {}], [[]]),
    "prompt_cache_retention": ([None, "in_memory"], ["for ever"]),
    "reasoning_effort": ([None, "none"], ["high"]),
    "response_format": (
        [None, {"type": "text"}],
        [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}],
    ),
    "safety_identifier": ([None, "s"], [1]),
    "service_tier": ([None, "auto", "default"], ["flex"]),
    "store": ([None, False], [True]),
    "tool_choice": ([None, "none", "auto"], ["required", {"type": "function"}]),
    "tools": ([None, []], [[{"type": "function", "function": {"name": "f"}}]]),
    "top_logprobs": ([None, 0], [3]),
    "verbosity": ([None, "medium"], ["low"]),
    "web_search_options": ([None], [{}]),
}
OF_TEXT = {"best_of": ([None, 1, 1.0], [2]), "echo": ([None, False], [True]), "suffix": ([None, ""], [7])}


@pytest.mark.parametrize(("path", "body", "cases", "params"), [
    ("chat/completions", CHAT, BOTH | OF_CHAT, chat_create_params.CompletionCreateParamsNonStreaming),
    ("completions", TEXT, BOTH | OF_TEXT, completion_create_params.CompletionCreateParamsNonStreaming),
], ids=["chat", "text"])  # fmt: skip
def test_every_field_of_openai_is_taken_or_refused_by_name(demo, path, body, cases, params):
    known = {name for cls in params.__mro__ for name in getattr(cls, "__annotations__", {})} | set(
        params.__annotations__
    )
    known -= {"model", "messages", "prompt"}
    assert known >= {"logit_bias", "stop", "top_p", "user"} and known <= set(cases), known - set(cases)
    expected = post(demo[0], body, path).json()["choices"]
    for name, (taken, refused) in cases.items():
        for value in taken:
            answer = post(demo[0], body | {name: value}, path)
            assert answer.status_code == 200, (name, value, answer.text)
            if name != "max_tokens":
                assert answer.json()["choices"] == expected, (name, value)
        for value in refused:
            answer = post(demo[0], body | {name: value}, path)
            assert answer.status_code == 400 and name in answer.json()["error"]["message"], (
                name,
                value,
                answer.text,
            )


def test_messages_as_clients_write_them(demo):
    def asked(*messages):
        return post(demo[0], CHAT | {"messages": list(messages)})

    user = CHAT["messages"][0]
    expected = asked(user).json()["choices"]
    nothing = {
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "provider_specific_fields": {"refusal": None},
    }
    text = {"type": "text", "text": "clean hall ", "cache_control": {"type": "ephemeral"}}
    for message in (
        user | nothing,
        user | {"name": "bob"},
        user | {"content": [text, {"type": "text", "text": "with mop"}]},
    ):
        assert asked(message).json()["choices"] == expected, message
    system, developer = (
        asked({"role": role, "content": "Plan."}, user).json()["choices"] for role in ("system", "developer")
    )
    assert system == developer
    none, empty = (
        asked(user, {"role": "assistant", "content": content} | nothing, user).json()["choices"]
        for content in (None, "")
    )
    assert none == empty
    for messages, said in (
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "image_url"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "input_audio"),
        ([{"role": "user", "content": [{"type": "text"}]}], "has no field 'text'"),
        ([{"role": "user", "content": [7]}], "content"),
        ([{"role": "user", "content": None}], "no content"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": []}], "no content"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "tools are not supported"),
        ([{"role": "function", "name": "f", "content": "x"}], "tools are not supported"),
        ([user, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, user], "tool_calls"),
        ([{"role": "bot", "content": "x"}], "role"),
        ([user | {"mood": "good"}], "mood"),
        ([user | {"name": 7}], "name"),
        ([7], "messages.0"),
    ):
        answer = asked(*messages)
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], (
            messages,
            answer.text,
        )


def test_a_request_need_not_name_the_one_model(demo):
    named, unnamed = (
        httpx.post(f"{demo[0]}/v1/completions", json=TEXT | {"model": name}).json() for name in ("demo", None)
    )
    assert named["choices"] == unnamed["choices"] and unnamed["model"] == "demo"
    without = {key: value for key, value in TEXT.items() if key != "model"}
    assert httpx.post(f"{demo[0]}/v1/completions", json=without).json()["choices"] == named["choices"]


def test_json_by_any_name(demo):
    content = json.dumps(TEXT).encode()
    for kind in (
        None,
        "text/plain",
        "text/plain; charset=utf-8",
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-8",
    ):
        request = httpx.Request(
            "POST",
            f"{demo[0]}/v1/completions",
            content=content,
            headers={"content-type": kind} if kind else {},
        )
        with httpx.Client(timeout=60) as http:
            assert http.send(request).status_code == 200, kind
    for number in ("NaN", "Infinity", "-Infinity", "1e400", "-1e400"):
        for field in ("temperature", "max_tokens", "seed", "user"):
            raw = json.dumps(TEXT | {field: "@"}).replace('"@"', number).encode()
            answer = httpx.post(
                f"{demo[0]}/v1/completions", content=raw, headers={"content-type": "application/json"}
            )
            assert answer.status_code == 400, (field, number, answer.text)
        hint = {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": "@"}]}]
        }  # anything is taken there
        raw = json.dumps({"model": "demo"} | hint).replace('"@"', number).encode()
        answer = httpx.post(
            f"{demo[0]}/v1/chat/completions", content=raw, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400 and "not valid JSON" in answer.json()["error"]["message"]


def test_the_answer_gets_the_room_that_is_left(demo, model):
    prompt = [9, 17, 33, 44] * 40
    for asked, got in ((1000, 32), (32, 32), (5, 5), (None, 32)):
        answer = post(demo[0], {"model": "demo", "prompt": prompt, "max_tokens": asked}, "completions").json()
        row = model.generate([prompt], GenerationConfig(gen_length=got))[0]
        assert answer["choices"][0]["text"] == row.text
        assert answer["choices"][0]["finish_reason"] == ("stop" if row.num_useful < got else "length")
    for long in (prompt * 2, "clean hall with mop " * 60):
        error = post(demo[0], {"model": "demo", "prompt": long, "max_tokens": 5}, "completions").json()[
            "error"
        ]
        assert "shorten the prompt to 191" in error["message"] and error["code"] == "context_length_exceeded"


def test_a_suffix_is_the_text_behind_a_gap(demo, model):
    mask, tokenizer = model.manifest.decoding.mask_token_id, model.tokenizer
    before, after = '[{"do": "clean", "in": "', '", "with": "mop"}]'
    prompt = tokenizer.render_chat(CHAT["messages"]) + before
    body = {"model": "demo", "prompt": prompt, "suffix": after, "max_tokens": 1}
    ids = [*tokenizer.encode(prompt), mask, *tokenizer.encode(after)]
    (expected,) = model.generate([ids], GenerationConfig(gen_length=0, infill=True))
    gap = tokenizer.decode(expected.canvas[len(tokenizer.encode(prompt)) : -len(tokenizer.encode(after))])
    answer = post(demo[0], body, "completions").json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (gap, "stop") and gap.strip() == "hall"
    assert answer["usage"]["prompt_tokens"] == len(ids) - 1 and answer["usage"]["completion_tokens"] == 1
    streamed = post(demo[0], body | {"stream": True}, "completions").text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert (
        "".join(event["choices"][0]["text"] for event in events) == gap
        and events[-1]["choices"][0]["finish_reason"] == "stop"
    )
    assert post(demo[0], body | {"prompt": ""}, "completions").status_code == 200  # a gap may stand first
    assert len(post(demo[0], body | {"prompt": [prompt, prompt]}, "completions").json()["choices"]) == 2
    filled = post(demo[0], body | {"max_tokens": 10**6}, "completions").json()["usage"]
    assert filled["total_tokens"] == 192
    for change in (
        {"suffix": 5},
        {"suffix": ["x"]},
        {"template": [{"mask": 2}], "prompt": None, "max_tokens": None},
    ):
        assert post(demo[0], body | change, "completions").status_code == 400, change
    masks = {"suffix_masks": 8, "suffix_decay": True}
    row = model.generate([PROMPT], GenerationConfig(suffix=8, suffix_decay=True))[0]
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]}
    assert post(demo[0], body | masks).json()["choices"][0]["message"]["content"] == row.text


def test_what_is_drawn_without_a_seed_differs_and_says_its_seed(demo, model):
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}], "temperature": 1.5}
    answers = [post(demo[0], body) for _ in range(4)]
    seeds = [int(answer.headers["x-dllm-seed"]) for answer in answers]
    assert (
        len(set(seeds)) == 4
        and len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) > 1
    )
    again = post(demo[0], body | {"seed": seeds[0]})
    assert again.json()["choices"] == answers[0].json()["choices"] and again.headers["x-dllm-seed"] == str(
        seeds[0]
    )
    assert all(
        f"-seed-{seed}" in answer.json()["system_fingerprint"]
        for seed, answer in zip(seeds, answers, strict=True)
    )
    streamed = post(demo[0], body | {"stream": True}).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    (fingerprint,) = {event["system_fingerprint"] for event in events}
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    seed = int(re.search(r"-seed-(\d+)$", fingerprint)[1])
    assert text == model.generate([PROMPT], GenerationConfig(temperature=1.5, seed=seed))[0].text
    assert "x-dllm-seed" not in post(demo[0], CHAT).headers


def test_the_options_of_a_generation_are_fields():
    """Whatever GenerationConfig has, so that none is forgotten; but for those that a request says in another
    way."""
    for name in option_names():
        named = OPTIONS.get(name)
        closed = {"infill", "stop_at_eos", "gen_length", "alg_temp", "speculate"}
        assert named in ChatRequest.model_fields if named else name in closed, name
    assert OPTIONS["suffix"] == "suffix_masks" and "suffix_masks" in CompletionRequest.model_fields


def test_how_many_prompts_and_choices(model):
    """All of a request's answers are queued, or none."""
    with serving(model, slots=2, most_queued=2) as (url, worker):
        for count, status in ((4, 200), (5, 429), (257, 400)):
            answer = post(
                url, {"model": "demo", "prompt": ["clean hall"] * count, "max_tokens": 4}, "completions"
            )
            assert answer.status_code == status and worker.num_open == 0, count
            assert (
                status == 200
                or ("slots and queue hold 4" if status == 429 else "256") in answer.json()["error"]["message"]
            )
        for bad in ([], [[]], [""], ["x", ""], ["x", 1], [[1], "x"], [1, [1]], [True], [1.5], {"a": 1}, 7):
            answer = post(url, {"model": "demo", "prompt": bad, "max_tokens": 4}, "completions")
            assert answer.status_code == 400 and answer.json()["error"]["message"], bad
        assert (
            post(
                url, {"model": "demo", "prompt": [[5.0, 6, 7.0]], "max_tokens": 4.0}, "completions"
            ).status_code
            == 200
        )


def test_names_with_slashes_and_the_version(model):
    from trt_runtime import __version__

    with serving(model, name="GSAI-ML/LLaDA-8B-Instruct") as (url, _):
        for name in ("GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML%2FLLaDA-8B-Instruct"):
            assert httpx.get(f"{url}/v1/models/{name}").json()["id"] == "GSAI-ML/LLaDA-8B-Instruct"
        assert httpx.get(f"{url}/v1/models/GSAI-ML/other").status_code == 404
        assert httpx.get(f"{url}/v1/models/").json()["data"][0]["id"] == "GSAI-ML/LLaDA-8B-Instruct"
        assert httpx.get(f"{url}/version").json() == {"version": __version__}


def test_pages_of_other_origins(model):
    asked = {
        "origin": "http://localhost:3000",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    with serving(model) as (url, _):
        answer = httpx.options(f"{url}/v1/chat/completions", headers=asked)
        assert answer.status_code >= 400 and "access-control-allow-origin" not in answer.headers
    for origins, allowed in (
        (("http://localhost:3000",), True),
        (("https://other",), False),
        (("*",), True),
        (("https://other", "http://localhost:3000"), True),
    ):
        with serving(model, cors=origins, api_key="secret") as (url, _):
            answer = httpx.options(f"{url}/v1/chat/completions", headers=asked)
            assert (answer.status_code == 200) == allowed and (
                "access-control-allow-origin" in answer.headers
            ) == allowed
            if allowed:
                assert {"authorization", "content-type"} <= set(
                    re.split(r"[, ]+", answer.headers["access-control-allow-headers"].lower())
                )
            refused = httpx.get(f"{url}/v1/models", headers={"origin": asked["origin"]})
            assert (
                refused.status_code == 401 and ("access-control-allow-origin" in refused.headers) == allowed
            )
            sent = {"origin": asked["origin"], "authorization": "Bearer secret"}
            assert httpx.get(f"{url}/v1/models", headers=sent).headers.get("access-control-allow-origin") == (
                ("*" if origins == ("*",) else asked["origin"]) if allowed else None
            )
