"""What the server refuses and bounds, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from places import ROOT

pytest.importorskip("fastapi")
pytest.importorskip("openai")
from serving import PROMPT, process_of, serving, until

BAD = [
    ({"tools": [{}]}, 400, "tools", "not supported"),
    ({"logit_bias": {"5": 3}}, 400, "logit_bias", "not supported"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", ""),
    ({"max_tokens": 0}, 400, "max_tokens", ""),
    ({"max_tokens": "9"}, 400, "max_tokens", ""),
    ({"model": "gpt"}, 404, "model", "this server has only 'demo'"),
    ({"messages": []}, 400, "messages", ""),
    ({"messages": "x"}, 400, "messages", ""),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", ""),
    ({"threshold": 2.0}, 400, None, "threshold is 2.0"),
    ({"threshold": 0.5, "policy": "fixed"}, 400, None, "needs policy"),
    ({"policy": "best"}, 400, None, "unknown policy 'best'"),
    (
        {"messages": [{"role": "user", "content": "clean hall with mop " * 60}]},
        400,
        "prompt",
        "shorten the prompt to 191",
    ),
    ({"n": 2}, 400, None, "all choices would be the same"),
    ({"stop": ["a"] * 65}, 400, None, "stop has 65"),
    ({"stop": ""}, 400, None, "none of them empty"),
    ({"temperature": float("1e9")}, 400, None, "temperature"),
    ({"stream_options": {}}, 400, None, "needs stream"),
    ({"seed": -1}, 400, "seed", ""),
    ({"top_p": 1.5}, 400, None, "top_p"),
    ({"max_tokens": 8, "max_completion_tokens": 8}, 400, None, "are the same option"),
    ({"stop": 5}, 400, "stop", ""),
    ({"treshold": 0.5}, 400, "treshold", "did you mean 'threshold'?"),
    ({"colour": 5}, 400, "colour", "not supported"),
    ({"steps": 1}, 400, None, "steps is 1"),
]


@pytest.mark.parametrize(("change", "status", "param", "said"), BAD, ids=lambda item: str(item)[:40])
def test_what_is_not_honoured_is_refused_by_name(demo, change, status, param, said):
    body = {"model": "demo", "messages": [{"role": "user", "content": "clean hall with mop"}]} | change
    answer = httpx.post(f"{demo[0]}/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (
        (answer.status_code, error["param"]) == (status, param)
        and said in error["message"]
        and "\n" not in error["message"]
    )


def test_other_bad_requests(demo):
    url = f"{demo[0]}/v1/completions"
    for content, status in (
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b"", 400),
        (b"{" + b" " * (1 << 20) + b"}", 413),
        (b'{"model": "demo"}', 400),
        (b'{"model": "demo", "prompt": [999999]}', 400),
        (b'{"model": "demo", "prompt": ""}', 400),
        (b'{"model": "demo", "template": ["x"]}', 400),
        (b'{"model": "demo", "prompt": "x", "template": ["x", {"mask": 2}]}', 400),
    ):
        answer = httpx.post(url, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status and answer.json()["error"]["message"], content[:50]

    def pieces():
        for _ in range(40):
            yield b" " * 40_000

    assert httpx.post(url, content=pieces(), headers={"content-type": "application/json"}).status_code == 413
    assert httpx.get(f"{demo[0]}/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(url).status_code == 405


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
        until(lambda: worker.num_open == 0)


def test_a_forward_that_fails_ends_its_answers_and_no_others(model, monkeypatch, caplog):
    """One refine step raises: the answer in the slot is lost, those that wait are not; nothing of the inside
    is told, the log has it."""
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]}
    with serving(model, slots=1) as (url, worker):
        real, failed, got = model.backend.forward, [], []

        def failing(role, *args, **options):
            if role == "refine" and not failed:
                failed.append(1)
                raise RuntimeError("/secret/path")
            return real(role, *args, **options)

        monkeypatch.setattr(model.backend, "forward", failing)
        threads = [
            threading.Thread(
                target=lambda: got.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60))
            )
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
            "a forward of the model failed" in streamed
            and not [answer for answer in got if "secret" in answer.text]
            and "secret" not in streamed
        )
        assert (
            "/secret/path" in caplog.text
            and 'dllm_answers_total{end="failed"} 2.0' in httpx.get(f"{url}/metrics").text
        )


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
    answer = httpx.post(
        f"{demo[0]}/v1/completions",
        json={"model": "demo", "template": ["clean ", {"mask": 4}], "max_tokens": 8},
    )
    assert (
        answer.status_code == 400
        and "cannot be combined with max_tokens" in answer.json()["error"]["message"]
    )
    half = httpx.post(
        f"{demo[0]}/v1/completions",
        content=b'{"model": "\\ud800", "prompt": "x"}',
        headers={"content-type": "application/json"},
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
        worker._lanes[0].commands.put(lambda: (_ for _ in ()).throw(RuntimeError("a command")))
        body = {"model": "demo", "messages": [{"role": "user", "content": "clean hall with mop"}]}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        worker.stop()
        assert httpx.get(f"{url}/ready").status_code == 503
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 503 and answer.headers["retry-after"]


def test_keys(model):
    with serving(model, api_key="secret") as (url, _):
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "secret"},
            {"host": "x/health?"},
        ):
            answer = httpx.get(f"{url}/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "bearer secret"}).status_code == 200
        assert (
            httpx.get(f"{url}/health").json() == {"status": "ok"}
            and httpx.get(f"{url}/ready").status_code == 200
        )
        assert httpx.get(f"{url}/metrics").status_code == 401


def test_sigterm_lets_streams_end(demo_artifact, model):
    """Signalled in mid-stream, every stream comes to its end, and the process ends with 0."""
    process, url = process_of(demo_artifact, "--threads", "1")
    try:
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": PROMPT}],
            "policy": "fixed",
            "stream": True,
        }
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
    from trt_runtime.cli import main as cli

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


def test_hostile_requests_break_nothing(demo_artifact):
    """A few hundred of what benchmarks/cpu/load.py sends by the thousand."""
    prompts = ROOT / "checkpoints" / "llada-demo" / "prompts.txt"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "cpu" / "load.py"),
        str(demo_artifact),
        "--prompts",
        str(prompts),
        "--faults",
        "300",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert (
        sum(report["kinds"].values()) == 300 and report["open_at_the_end"] == 0 and len(report["kinds"]) >= 5
    )
