"""The server: OpenAI's client against it, streams, cancellation, templates, metrics."""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from places import ROOT

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
from serving import OTHERS, PROMPT, chat, serving, until  # noqa: E402

from trt_runtime.decoding.config import GenerationConfig  # noqa: E402
from trt_runtime.errors import DllmError  # noqa: E402
from trt_runtime.serving.answers import ServeOptions  # noqa: E402
from trt_runtime.serving.app import create_app  # noqa: E402


def test_openai_s_client_gets_what_the_model_says(client, model):
    expected = model.generate([PROMPT], GenerationConfig())[0]
    whole = chat(client)
    assert whole.choices[0].message.content == expected.text and whole.choices[0].finish_reason == "stop"
    assert (
        whole.usage.completion_tokens == expected.num_useful
        and whole.usage.model_extra["nfe"] == expected.nfe
    )
    assert whole.usage.prompt_tokens == len(model.encode(PROMPT))
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == expected.text and sum(bool(text) for text in texts) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage
    assert chat(client, max_tokens=16).choices[0].finish_reason == "length"
    assert client.models.list().data[0].id == "demo"


def test_decoding_options_are_honoured(client, model):
    for options in ({"threshold": 0.5}, {"policy": "fixed"}, {"cache": "none"}, {"block_length": 32}):
        expected = model.generate([PROMPT], GenerationConfig(**options))[0]
        got = chat(client, **options)
        assert (got.choices[0].message.content, got.usage.model_extra["nfe"]) == (expected.text, expected.nfe)
    drawn = chat(client, temperature=0.8, n=3, seed=5)
    alone = [
        model.generate([PROMPT], GenerationConfig(temperature=0.8, seed=5 + i))[0].text for i in range(3)
    ]
    assert [choice.message.content for choice in drawn.choices] == alone and len(set(alone)) > 1


def test_many_at_once_get_what_each_gets_alone(client, model):
    expected = {prompt: model.generate([prompt], GenerationConfig())[0].text for prompt in OTHERS}
    wrong = []

    def ask(i):
        prompt = OTHERS[i % len(OTHERS)]
        if i % 2:
            text = chat(client, prompt).choices[0].message.content
        else:
            text = "".join(
                chunk.choices[0].delta.content or ""
                for chunk in chat(client, prompt, stream=True)
                if chunk.choices
            )
        if text != expected[prompt]:
            wrong.append((prompt, text))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_lanes_answer_as_one_does(model):
    """Two threads over one session: each answer is what the model says alone; both lanes work."""
    expected = {prompt: model.generate([prompt], GenerationConfig())[0].text for prompt in OTHERS}
    with serving(model, slots=5, lanes=2) as (url, worker):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor(8) as pool:
            texts = list(
                pool.map(lambda i: chat(client, OTHERS[i % 4]).choices[0].message.content, range(32))
            )
        assert texts == [expected[OTHERS[i % 4]] for i in range(32)]
        assert [len(lane.scheduler.rows) for lane in worker._lanes] == [2, 3]
        assert all(lane.scheduler.tick_number > 20 for lane in worker._lanes) and worker.num_open == 0


def test_lanes_that_cannot_be_had(model, monkeypatch):
    with pytest.raises(DllmError, match="at most one per slot"):
        create_app(model, ServeOptions(name="demo", slots=1, lanes=2))
    monkeypatch.setattr(model.backend, "is_concurrent", False)
    with pytest.raises(DllmError, match="supports one call at a time"):
        create_app(model, ServeOptions(name="demo", lanes=2))


def test_text_is_cut_at_stop_strings(client, model):
    full = model.generate([PROMPT], GenerationConfig())[0].text
    for stop in ('"to"', ["nowhere", '"item"'], '", "color'):
        first = min(at for one in ([stop] if isinstance(stop, str) else stop) if (at := full.find(one)) >= 0)
        whole = chat(client, stop=stop).choices[0]
        streamed = "".join(
            chunk.choices[0].delta.content or ""
            for chunk in chat(client, stop=stop, stream=True)
            if chunk.choices
        )
        assert whole.message.content == streamed == full[:first] and whole.finish_reason == "stop"


def test_provisional_text_comes_when_it_is_asked_for(demo, model):
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": PROMPT}],
        "stream": True,
        "stream_options": {"provisional": True},
    }
    with httpx.stream("POST", f"{demo[0]}/v1/chat/completions", json=body, timeout=60) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    seen = [event["provisional"] for event in events if "provisional" in event]
    assert len(seen) == model.generate([PROMPT], GenerationConfig())[0].nfe
    assert all(event["choices"] == [] for event in events if "provisional" in event)
    cells = {position: text for event in seen for position, text, _ in event["cells"]}
    confidence = [c for event in seen for _, _, c in event["cells"]]
    assert len(cells) > 40 and all(0 < c <= 1 for c in confidence) and cells[1].strip() == "do"
    assert seen[-1]["text"] == "" and seen[0]["nfe"] == 1 and len(seen[0]["tokens"]) == 96


def test_templates_are_filled(client, model):
    """Fixed text stays, gaps are filled, as by infill."""
    fixed = ["clean hall with mop", "take red cups"]
    made = client.completions.create(
        model="demo", prompt=None, extra_body={"template": [fixed[0], {"mask": 6}, fixed[1], {"mask": 2}]}
    )
    mask = model.manifest.decoding.mask_token_id
    ids = [*model.tokenizer.encode(fixed[0]), *[mask] * 6, *model.tokenizer.encode(fixed[1]), mask, mask]
    (expected,) = model.generate([ids], GenerationConfig(gen_length=0, infill=True))
    assert (
        made.choices[0].text == model.text(__import__("numpy").array(expected.canvas))
        and mask not in expected.canvas
    )


def test_a_client_that_leaves_frees_its_slot(demo):
    url, worker = demo
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": PROMPT}],
        "policy": "fixed",
        "stream": True,
    }
    for _ in range(6):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=body | {"stream": False}, timeout=0.02)
    until(lambda: worker.num_open == 0)
    assert all(lane.scheduler.is_idle for lane in worker._lanes)
    assert float(re.search(r"^dllm_cancelled_total (\S+)", httpx.get(f"{url}/metrics").text, re.M)[1]) >= 5


def test_canvases_up_to_the_model_s_last_position(model):
    """A last short block, padded to another row's block, reaches beyond the model's positions: with the
    default length."""
    long = {"model": "demo", "prompt": [9, 17, 33, 44] * 63, "max_tokens": 4}
    with serving(model, max_length=None, slots=4) as (url, _):
        for _ in range(4):
            answers = []
            jobs = [
                ("completions", long),
                *[
                    ("chat/completions", {"model": "demo", "messages": [{"role": "user", "content": text}]})
                    for text in OTHERS
                ],
            ]
            threads = [
                threading.Thread(
                    target=lambda job=job, answers=answers: answers.append(
                        httpx.post(f"{url}/v1/{job[0]}", json=job[1], timeout=60)
                    )
                )
                for job in jobs
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [answer.status_code for answer in answers] == [200] * 5


def test_a_client_that_leaves_without_a_stream_frees_its_slots(model):
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": PROMPT}],
        "policy": "fixed",
        "temperature": 0.5,
        "n": 8,
    }
    with serving(model, slots=2) as (url, worker):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.2)
        begin = time.perf_counter()
        until(lambda: worker.num_open == 0)
        assert time.perf_counter() - begin < 1
        text = httpx.get(f"{url}/metrics").text
        assert "dllm_queue_requests 0.0" in text and "dllm_slots_busy 0.0" in text
        assert float(re.search(r"^dllm_cancelled_total (\S+)", text, re.M)[1]) >= 6


def test_what_a_stop_string_ends_is_counted_as_it_was_shown(client, model):
    stop = '"to"'
    whole = chat(client, stop=stop)
    shown = whole.choices[0].message.content
    assert (
        whole.usage.completion_tokens == len(model.tokenizer.encode(shown))
        and 0 < whole.usage.model_extra["nfe"] < 16
    )
    *_, last = chat(client, stop=stop, stream=True, stream_options={"include_usage": True})
    assert last.usage == whole.usage


def test_metrics_count_forwards_and_tokens(demo, client):
    def metric(name):
        return float(re.search(rf"^{re.escape(name)} (\S+)", httpx.get(f"{demo[0]}/metrics").text, re.M)[1])

    before = [metric(f'dllm_forwards_total{{kind="{kind}"}}') for kind in ("prefix_pass", "refine_block")] + [
        metric("dllm_committed_tokens_total")
    ]
    nfe = chat(client).usage.model_extra["nfe"]
    after = [metric(f'dllm_forwards_total{{kind="{kind}"}}') for kind in ("prefix_pass", "refine_block")] + [
        metric("dllm_committed_tokens_total")
    ]
    assert sum(after[:2]) - sum(before[:2]) == nfe and after[2] > before[2]
    assert metric("dllm_slots") == 4 and metric("dllm_time_to_first_block_seconds_count") > 0


def test_several_steps_a_look(model, monkeypatch):
    """The same answers, streamed and whole; every forward and every token is told and counted once."""
    alone = model.generate([PROMPT], GenerationConfig())[0]
    monkeypatch.setattr(model.backend, "steps_per_sync", 4)
    calls, real = [], model.backend.refine_steps
    monkeypatch.setattr(model.backend, "refine_steps", lambda *args: calls.append(1) or real(*args))
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]}
    with serving(model) as (url, _):
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert (
            answer["choices"][0]["message"]["content"] == alone.text and answer["usage"]["nfe"] == alone.nfe
        )
        assert 0 < len(calls) < alone.nfe
        streamed = httpx.post(
            f"{url}/v1/chat/completions",
            json=body | {"stream": True, "stream_options": {"provisional": True}},
            timeout=60,
        ).text
        events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        cells = [
            position
            for event in events
            if "provisional" in event
            for position, *_ in event["provisional"]["cells"]
        ]
        committed = [
            position - len(model.encode(PROMPT)) for step in alone.trace for position in step.positions
        ]
        assert sorted(cells) == sorted(committed) and answer["usage"]["committed_tokens"] == len(committed)
        assert (
            "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
            == alone.text
        )
        text = httpx.get(f"{url}/metrics").text
        counted = sum(float(number) for number in re.findall(r"^dllm_forwards_total\{.*\} (\S+)", text, re.M))
        assert counted == 2 * alone.nfe and f"dllm_committed_tokens_total {2.0 * len(committed)}" in text


def test_the_example_of_the_document_runs(model, capsys):
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "how-to" / "serve.md").read_text(encoding="utf-8"), re.S
    )
    with serving(model, name="llada-demo") as (url, _):
        exec(compile(example.replace("http://127.0.0.1:8000", url), "docs/how-to/serve.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "blue" in printed and "nfe=" in printed


def test_the_page_is_one_file_that_asks_nothing_of_others(demo):
    answer = httpx.get(demo[0])
    assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
    assert (
        not re.findall(r"""(?:src|href)\s*=|@import|https?://""", answer.text)
        and "innerHTML" not in answer.text
    )


def test_the_openapi_document_says_what_is_answered(demo):
    document = httpx.get(f"{demo[0]}/openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "404", "413", "429", "500", "503", "504"} <= set(
        chat["responses"]
    ) and "422" not in chat["responses"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    fields = document["components"]["schemas"]["ChatRequest"]
    assert fields["additionalProperties"] is False and {
        "threshold",
        "policy",
        "block_length",
        "cache",
        "stop",
    } <= set(fields["properties"])
