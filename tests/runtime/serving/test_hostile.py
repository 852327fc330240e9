"""Forwards, templates and threads that never end, panics, no memory; how the process ends."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import shutil
import signal
import threading
import time

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from serving import CHAT, connect, post, process_of, sent, serving, until

from trt_runtime.serving.errors import Failure
from trt_runtime.serving.preparing import Preparing


@pytest.fixture
def stuck(model, monkeypatch):
    """A forward that waits for an event, which the test or the end sets."""
    go, real = threading.Event(), model.backend.forward
    monkeypatch.setattr(
        model.backend, "forward", lambda *args, **options: (go.wait(), real(*args, **options))[1]
    )
    yield go
    go.set()


def test_a_forward_that_does_not_end_is_said(model, stuck):
    with serving(model, timeout=0.3) as (url, worker):
        assert httpx.get(f"{url}/ready").status_code == 200
        assert post(url, CHAT).status_code == 504
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert "a forward has been running" in httpx.get(f"{url}/ready").json()["error"]["message"]
        assert httpx.get(f"{url}/health").status_code == 200 and not worker.stop(0.0)
        stuck.set()


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_is_stopped(model, monkeypatch):
    with serving(model, prompt_seconds=0.5) as (url, _):
        monkeypatch.setattr(model.tokenizer, "_template", ENDLESS)
        before = threading.active_count()
        for _ in range(3):
            answer = post(url, CHAT)
            assert answer.status_code == 504 and "not prepared within" in answer.json()["error"]["message"]
        until(lambda: not [thread for thread in threading.enumerate() if thread.name == "dllm-trt prompt"])
        assert threading.active_count() <= before + 1 and httpx.get(f"{url}/ready").status_code == 200
        monkeypatch.undo()
        assert post(url, CHAT).status_code == 200


def test_threads_that_cannot_be_stopped_are_bounded_and_said():
    async def run():
        preparing, go = Preparing(most=2, seconds=0.2), threading.Event()
        for _ in range(2):
            with pytest.raises(Failure, match="not prepared"):
                await preparing.run(go.wait)  # in C: no exception reaches it
        assert preparing.is_stuck
        with pytest.raises(Failure, match="preparing other prompts"):
            await preparing.run(lambda: 1)
        go.set()
        while preparing.is_stuck:
            await asyncio.sleep(0.01)
        assert await preparing.run(lambda: 1) == 1
        with pytest.raises(ZeroDivisionError):
            await preparing.run(lambda: 1 / 0)

    asyncio.run(run())


class PanicException(BaseException):
    """As pyo3 raises it where code in Rust panics."""


def test_a_panic_is_of_its_request_alone(model, monkeypatch):
    real = model.tokenizer._tokenizer

    class Tokenizer:
        is_down = "encode"

        def __getattr__(self, name):
            if name.startswith(self.is_down):
                raise PanicException("called `Option::unwrap()` on a `None` value")
            return getattr(real, name)

    with serving(model) as (url, worker):
        held = Tokenizer()
        monkeypatch.setattr(model.tokenizer, "_tokenizer", held)
        monkeypatch.setattr(model.tokenizer._detokenizer, "_tokenizer", held)
        answer = post(url, CHAT)
        assert answer.status_code == 400 and "tokenizer failed" in answer.json()["error"]["message"]
        held.is_down = "decode"
        for stream in (False, True):
            answer = post(url, CHAT | {"stream": stream})
            assert (
                answer.status_code == (200 if stream else 500)
                and "server_error" in answer.text
                and "unwrap" not in answer.text
            )
        held.is_down = "nothing"
        assert post(url, CHAT).status_code == 200 and worker.is_alive and worker.num_open == 0


def test_no_memory_is_an_answer(model, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    with serving(model) as (url, worker):
        real = model.sequence
        monkeypatch.setattr(
            model, "sequence", lambda *args, **options: (_ for _ in ()).throw(MemoryError("x"))
        )
        answer = post(url, CHAT)
        assert (
            answer.status_code == 503
            and answer.json()["error"]["type"] == "server_error"
            and answer.headers["retry-after"]
        )
        monkeypatch.setattr(model, "sequence", real)
        forward = model.backend.forward
        monkeypatch.setattr(
            model.backend, "forward", lambda *args, **options: (_ for _ in ()).throw(MemoryError("x"))
        )
        assert post(url, CHAT).status_code == 500
        monkeypatch.setattr(model.backend, "forward", forward)
        assert post(url, CHAT).status_code == 200 and worker.num_open == 0


def _ended(process, seconds):
    try:
        return process.wait(seconds)
    finally:
        process.kill()


def test_sigterm_does_not_wait_for_streams_that_nobody_reads(demo_artifact):
    process, url = process_of(demo_artifact, "--threads", "1", "--timeout", "2")
    client = connect(url)
    client.sendall(sent(CHAT)[:-5])  # a body that does not come
    idle = connect(url)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert _ended(process, 15) == 0
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    client.close()
    idle.close()


@pytest.mark.parametrize("count", [1, 2])
def test_sigint_ends_it_without_a_traceback(demo_artifact, count):
    process, url = process_of(demo_artifact, "--threads", "1")
    client = connect(url)
    if count == 2:  # something that is under way
        client.sendall(sent(CHAT)[:-5])
    time.sleep(0.3)
    for _ in range(count):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert _ended(process, 20) in (0, 130)
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    client.close()


def test_what_never_ends_does_not_hold_the_process(demo_artifact, tmp_path):
    """A chat template that never ends, in a process that is told to end."""
    artifact = tmp_path / "artifact"
    shutil.copytree(demo_artifact, artifact)
    file = next((artifact / "tokenizer").glob("chat_template.jinja"), None)
    if file is None:
        file = artifact / "tokenizer" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": ENDLESS}))
    else:
        file.write_text(ENDLESS)
    manifest = json.loads((artifact / "manifest.json").read_text())

    entry = manifest["files"][str(file.relative_to(artifact))]
    entry.update(size=file.stat().st_size, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    process, url = process_of(artifact, "--threads", "1", "--timeout", "1")
    client = connect(url)
    client.sendall(sent(CHAT))
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert _ended(process, 20) in (0, 1)
    lines = process.stderr.read()
    assert "Traceback" not in lines
    process.stderr.close()
    client.close()


NEVER = """import sys, threading
from trt_runtime.cli import main as cli
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.serving.worker import Worker
forever = lambda *given, **options: threading.Event().wait()
setattr({OrtBackend}, "{name}", forever)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("cls", "name", "said"),
    [("OrtBackend", "forward", "a forward is stuck"), ("Worker", "stop", "a thread or task is stuck")],
)
def test_a_process_that_something_holds_ends_with_a_line(demo_artifact, cls, name, said):
    """A forward that never returns, and any other thread that does not."""
    program = NEVER.replace("{OrtBackend}", cls).replace("{name}", name)
    process, url = process_of(demo_artifact, "--threads", "1", "--timeout", "0.5", program=program)
    client = connect(url)
    client.sendall(sent(CHAT))
    client.settimeout(10)
    assert client.recv(100)
    process.send_signal(signal.SIGTERM)
    assert _ended(process, 30) == 1
    lines = process.stderr.read()
    assert (
        said in lines
        and "Traceback" not in lines
        and len([line for line in lines.splitlines() if line.startswith("error:")]) == 1
    )
    process.stderr.close()
    client.close()
