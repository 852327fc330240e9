"""The server: OpenAI's client against it, what it refuses, limits, streams, cancellation, and its end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from conftest import ROOT

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
import uvicorn  # noqa: E402

from trt_runtime.config import GenerationConfig  # noqa: E402
from trt_runtime.model import load  # noqa: E402
from trt_runtime.server.answers import Options  # noqa: E402
from trt_runtime.server.app import create_app  # noqa: E402

PROMPT = "take red cups from kitchen to garage, then hand blue pens to Mia, and clean hall with mop"
OTHERS = [
    "clean hall with mop",
    "find red keys in attic, and tidy porch with broom",
    "hand blue pens to Mia, then clean hall with mop",
    PROMPT,
]


@contextmanager
def serving(model, **options):
    """A server in a thread, on a free port."""
    app = create_app(model, Options(**{"name": "demo", "max_length": 192} | options))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.worker
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def model(demo_artifact):
    return load(demo_artifact, "ort", threads=1)


@pytest.fixture(scope="module")
def demo(model):
    with serving(model, slots=4) as (url, worker):
        yield url, worker


@pytest.fixture
def client(demo):
    return openai.OpenAI(base_url=f"{demo[0]}/v1", api_key="none", max_retries=0)


def _until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


def _chat(client, prompt=PROMPT, **options):
    extra = {key: options.pop(key) for key in ("threshold", "policy", "cache", "block_length", "template") if key in options}
    return client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": prompt}], extra_body=extra, **options
    )


def test_openai_s_client_gets_what_the_model_says(client, model):
    expected = model.generate([PROMPT], GenerationConfig())[0]
    whole = _chat(client)
    assert whole.choices[0].message.content == expected.text and whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == expected.num_useful and whole.usage.model_extra["nfe"] == expected.nfe
    assert whole.usage.prompt_tokens == len(model.encode(PROMPT))
    chunks = list(_chat(client, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == expected.text and sum(bool(text) for text in texts) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage
    assert _chat(client, max_tokens=16).choices[0].finish_reason == "length"
    assert client.models.list().data[0].id == "demo"


def test_decoding_options_are_honoured(client, model):
    for options in ({"threshold": 0.5}, {"policy": "fixed"}, {"cache": "none"}, {"block_length": 32}):
        expected = model.generate([PROMPT], GenerationConfig(**options))[0]
        got = _chat(client, **options)
        assert (got.choices[0].message.content, got.usage.model_extra["nfe"]) == (expected.text, expected.nfe)
    drawn = _chat(client, temperature=0.8, n=3, seed=5)
    alone = [model.generate([PROMPT], GenerationConfig(temperature=0.8, seed=5 + i))[0].text for i in range(3)]
    assert [choice.message.content for choice in drawn.choices] == alone and len(set(alone)) > 1


def test_many_at_once_get_what_each_gets_alone(client, model):
    expected = {prompt: model.generate([prompt], GenerationConfig())[0].text for prompt in OTHERS}
    wrong = []

    def ask(i):
        prompt = OTHERS[i % len(OTHERS)]
        if i % 2:
            text = _chat(client, prompt).choices[0].message.content
        else:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in _chat(client, prompt, stream=True) if chunk.choices)
        if text != expected[prompt]:
            wrong.append((prompt, text))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_text_is_cut_at_stop_strings(client, model):
    full = model.generate([PROMPT], GenerationConfig())[0].text
    for stop in ('"to"', ["nowhere", '"item"'], '", "color'):
        first = min(at for one in ([stop] if isinstance(stop, str) else stop) if (at := full.find(one)) >= 0)
        whole = _chat(client, stop=stop).choices[0]
        streamed = "".join(
            chunk.choices[0].delta.content or "" for chunk in _chat(client, stop=stop, stream=True) if chunk.choices
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
    assert made.choices[0].text == model.text(__import__("numpy").array(expected.canvas)) and mask not in expected.canvas


BAD = [
    ({"tools": []}, 400, "tools", "does not honour"), ({"logit_bias": {}}, 400, "logit_bias", "does not honour"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", ""), ({"max_tokens": 0}, 400, "max_tokens", ""), ({"max_tokens": "9"}, 400, "max_tokens", ""),
    ({"model": "gpt"}, 404, "model", "this server has 'demo'"), ({"messages": []}, 400, "messages", ""), ({"messages": "x"}, 400, "messages", ""),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", ""), ({"threshold": 2.0}, 400, None, "threshold is 2.0"),
    ({"threshold": 0.5, "policy": "fixed"}, 400, None, "goes with policy"), ({"policy": "best"}, 400, None, "unknown policy 'best'"),
    ({"max_tokens": 10_000}, 400, None, "more than the model"), ({"n": 2}, 400, None, "all choices would be the same"),
    ({"stop": ["a"] * 5}, 400, None, "stop has 5"), ({"stop": ""}, 400, None, "none of them empty"), ({"temperature": float("1e9")}, 400, None, "temperature"),
    ({"stream_options": {}}, 400, None, "goes with stream"), ({"seed": -1}, 400, "seed", ""), ({"top_p": 0.5}, 400, None, "top_p"),
    ({"max_tokens": 8, "max_completion_tokens": 8}, 400, None, "are one option"), ({"stop": 5}, 400, "stop", ""), ({"steps": 1}, 400, None, "steps is 1"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "status", "param", "said"), BAD, ids=lambda item: str(item)[:40])
def test_what_is_not_honoured_is_refused_by_name(demo, change, status, param, said):
    body = {"model": "demo", "messages": [{"role": "user", "content": "clean hall with mop"}]} | change
    answer = httpx.post(f"{demo[0]}/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param) and said in error["message"] and "\n" not in error["message"]


def test_other_bad_requests(demo):
    url = f"{demo[0]}/v1/completions"
    for content, status in ((b"{", 400), (b"[]", 400), (b"\xff\xfe", 400), (b"", 400), (b"{" + b" " * (1 << 20) + b"}", 413), (b'{"model": "demo"}', 400),
                            (b'{"model": "demo", "prompt": [999999]}', 400), (b'{"model": "demo", "prompt": ""}', 400),
                            (b'{"model": "demo", "template": ["x"]}', 400), (b'{"model": "demo", "prompt": "x", "template": ["x", {"mask": 2}]}', 400)):  # fmt: skip
        answer = httpx.post(url, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status and answer.json()["error"]["message"], content[:50]

    def pieces():
        for _ in range(40):
            yield b" " * 40_000

    assert httpx.post(url, content=pieces(), headers={"content-type": "application/json"}).status_code == 413
    assert httpx.get(f"{demo[0]}/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(url).status_code == 405


def test_a_client_that_leaves_frees_its_slot(demo):
    url, worker = demo
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}], "policy": "fixed", "stream": True}
    for _ in range(6):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=body | {"stream": False}, timeout=0.02)
    _until(lambda: worker.num_open == 0)
    assert worker._scheduler.is_idle
    assert float(re.search(r"^dllm_cancelled_total (\S+)", httpx.get(f"{url}/metrics").text, re.M)[1]) >= 5


def test_a_full_queue_is_429_with_a_time_to_come_back(model):
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0.5, "n": 4}
    with serving(model, slots=1, most_queued=1) as (url, worker):
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert (
            answer.status_code == 429
            and int(answer.headers["retry-after"]) >= 1
            and answer.json()["error"]["code"] == "queue_full"
        )
        assert httpx.post(f"{url}/v1/chat/completions", json=body | {"n": 1}, timeout=60).status_code == 200
        assert worker.num_open == 0


def test_an_answer_that_takes_too_long_is_given_up(model):
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}], "policy": "fixed"}
    with serving(model, timeout=0.01) as (url, worker):
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 504
        streamed = httpx.post(f"{url}/v1/chat/completions", json=body | {"stream": True}).text
        assert "no answer within 0.01 s" in streamed and "[DONE]" not in streamed
        _until(lambda: worker.num_open == 0)


def test_a_forward_that_fails_ends_its_answers_and_no_others(model, monkeypatch, caplog):
    """One refine step raises: the answer in the slot is lost, those that wait are not; nothing of the inside is told, the log has it."""
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]}
    with serving(model, slots=1) as (url, worker):
        real, failed, got = model.backend.refine, [], []

        def failing(*args, **options):
            if not failed:
                failed.append(1)
                raise RuntimeError("/secret/path")
            return real(*args, **options)

        monkeypatch.setattr(model.backend, "refine", failing)
        threads = [
            threading.Thread(target=lambda: got.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in got) == [200, 200, 200, 500] and worker.num_open == 0
        failed.clear()
        streamed = httpx.post(f"{url}/v1/chat/completions", json=body | {"stream": True}, timeout=60).text
        assert (
            "the model failed in a forward" in streamed
            and not [answer for answer in got if "secret" in answer.text]
            and "secret" not in streamed
        )
        assert "/secret/path" in caplog.text and 'dllm_answers_total{end="failed"} 2.0' in httpx.get(f"{url}/metrics").text


def test_canvases_up_to_the_model_s_last_position(model):
    """A last short block, padded to another row's block, reaches beyond the model's positions: with the default length."""
    long = {"model": "demo", "prompt": [9, 17, 33, 44] * 63, "max_tokens": 4}
    with serving(model, max_length=None, slots=4) as (url, _):
        for _ in range(4):
            answers = []
            jobs = [
                ("completions", long),
                *[("chat/completions", {"model": "demo", "messages": [{"role": "user", "content": text}]}) for text in OTHERS],
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
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}], "policy": "fixed", "temperature": 0.5, "n": 8}
    with serving(model, slots=2) as (url, worker):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.2)
        begin = time.perf_counter()
        _until(lambda: worker.num_open == 0)
        assert time.perf_counter() - begin < 1
        text = httpx.get(f"{url}/metrics").text
        assert "dllm_queue_requests 0.0" in text and "dllm_slots_busy 0.0" in text
        assert float(re.search(r"^dllm_cancelled_total (\S+)", text, re.M)[1]) >= 6


def test_what_a_stop_string_ends_is_counted_as_it_was_shown(client, model):
    stop = '"to"'
    whole = _chat(client, stop=stop)
    shown = whole.choices[0].message.content
    assert whole.usage.completion_tokens == len(model.tokenizer.encode(shown)) and 0 < whole.usage.model_extra["nfe"] < 16
    *_, last = _chat(client, stop=stop, stream=True, stream_options={"include_usage": True})
    assert last.usage == whole.usage


def test_small_bodies_that_ask_for_much(demo):
    """Templates and stop strings that would take long to work out are refused before."""
    begin = time.perf_counter()
    for body in (
        {"template": [{"mask": 4096}] * 1024},
        {"template": [{"mask": 4}] * 1025},
        {"prompt": "x", "stop": ["a" * 50_000] * 4},
    ):
        answer = httpx.post(f"{demo[0]}/v1/completions", json={"model": "demo"} | body)
        assert answer.status_code == 400, body
    assert time.perf_counter() - begin < 2
    answer = httpx.post(f"{demo[0]}/v1/completions", json={"model": "demo", "template": ["clean ", {"mask": 4}], "max_tokens": 8})
    assert answer.status_code == 400 and "leave out max_tokens" in answer.json()["error"]["message"]
    half = httpx.post(
        f"{demo[0]}/v1/completions", content=b'{"model": "\\ud800", "prompt": "x"}', headers={"content-type": "application/json"}
    )
    assert half.status_code == 404 and "\\ud800" in half.json()["error"]["message"]
    assert httpx.get(f"{demo[0]}/docs").status_code == 404


def test_a_server_on_this_machine_answers_to_its_own_name_alone(model):
    """A page in a browser may have another name point to 127.0.0.1."""
    with serving(model, only_local=True) as (url, _):
        for host, status in (
            ("evil.example:80", 403),
            ("127.0.0.1.evil.example", 403),
            ("localhost:1", 200),
            ("[::1]:8000", 200),
            ("localhost", 200),
        ):
            assert httpx.get(f"{url}/v1/models", headers={"host": host}).status_code == status, host
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_worker_that_has_ended_is_said(model):
    with serving(model) as (url, worker):
        worker._commands.put(lambda: (_ for _ in ()).throw(RuntimeError("a command")))
        body = {"model": "demo", "messages": [{"role": "user", "content": "clean hall with mop"}]}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        worker.stop()
        assert httpx.get(f"{url}/ready").status_code == 503
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 503 and answer.headers["retry-after"]


def test_keys(model):
    with serving(model, api_key="secret") as (url, _):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"host": "x/health?"}):
            answer = httpx.get(f"{url}/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "bearer secret"}).status_code == 200
        assert httpx.get(f"{url}/health").json() == {"status": "ok"} and httpx.get(f"{url}/ready").status_code == 200
        assert httpx.get(f"{url}/metrics").status_code == 401


def test_metrics_count_forwards_and_tokens(demo, client):
    def metric(name):
        return float(re.search(rf"^{re.escape(name)} (\S+)", httpx.get(f"{demo[0]}/metrics").text, re.M)[1])

    before = [metric(f'dllm_forwards_total{{kind="{kind}"}}') for kind in ("full", "dual")] + [
        metric("dllm_committed_tokens_total")
    ]
    nfe = _chat(client).usage.model_extra["nfe"]
    after = [metric(f'dllm_forwards_total{{kind="{kind}"}}') for kind in ("full", "dual")] + [
        metric("dllm_committed_tokens_total")
    ]
    assert sum(after[:2]) - sum(before[:2]) == nfe and after[2] > before[2]
    assert metric("dllm_slots") == 4 and metric("dllm_time_to_first_block_seconds_count") > 0


def _process(demo_artifact, *options):
    command = [
        sys.executable,
        "-m",
        "trt_runtime.cli",
        "serve",
        str(demo_artifact),
        "--port",
        "0",
        "--name",
        "demo",
        "--max-length",
        "192",
        *options,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"DLLM_API_KEY": ""})
    line = process.stderr.readline()
    return process, re.search(r"http://\S+?/v1", line)[0].removesuffix("/v1")


def test_sigterm_lets_streams_end(demo_artifact, model):
    """Signalled in mid-stream, every stream comes to its end, and the process ends with 0."""
    process, url = _process(demo_artifact, "--threads", "1")
    try:
        body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}], "policy": "fixed", "stream": True}
        texts, started = [], threading.Barrier(4)

        def ask():
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                held = [next(lines)]
                started.wait()
                texts.append(held + list(lines))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        started.wait()
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert len(texts) == 3 and all("data: [DONE]" in lines for lines in texts)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stderr.close()


def test_an_address_that_is_taken_is_one_line(demo_artifact, capsys):
    from trt_runtime import cli

    with socket.create_server(("127.0.0.1", 0)) as held:
        assert cli.main(["serve", str(demo_artifact), "--port", str(held.getsockname()[1])]) == 1
    for wrong in (
        ["--slots", "0"],
        ["--port", "70000"],
        ["--timeout", "0"],
        ["--timeout", "inf"],
        ["--max-length", "0"],
        ["--api-key", ""],
    ):
        assert cli.main(["serve", str(demo_artifact), *wrong]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7 and "cannot listen on 127.0.0.1" in lines[0]


def test_the_example_of_the_document_runs(model, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), re.S)
    with serving(model, name="llada-demo") as (url, _):
        exec(compile(example.replace("http://127.0.0.1:8000", url), "docs/serving.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "blue" in printed and "nfe=" in printed


def test_hostile_requests_break_nothing(demo_artifact):
    """A few hundred of what benchmarks/load.py sends by the thousand."""
    prompts = ROOT / "checkpoints" / "llada-demo" / "prompts.txt"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "load.py"),
        str(demo_artifact),
        "--prompts",
        str(prompts),
        "--faults",
        "300",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert sum(report["kinds"].values()) == 300 and report["open_at_the_end"] == 0 and len(report["kinds"]) >= 5


def test_the_page_is_one_file_that_asks_nothing_of_others(demo):
    answer = httpx.get(demo[0])
    assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.findall(r"""(?:src|href)\s*=|@import|https?://""", answer.text) and "innerHTML" not in answer.text


def test_the_openapi_document_says_what_is_answered(demo):
    document = httpx.get(f"{demo[0]}/openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "404", "413", "429", "500", "503", "504"} <= set(chat["responses"]) and "422" not in chat[
        "responses"
    ]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    fields = document["components"]["schemas"]["ChatRequest"]
    assert fields["additionalProperties"] is False and {"threshold", "policy", "block_length", "cache", "stop"} <= set(
        fields["properties"]
    )
