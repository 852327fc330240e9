"""Replicas behind a front: real ones under Ray Serve that are killed and replaced under load, and a front
over stand-ins that fail."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading

import httpx
import pytest
from serving import OTHERS, process_of, until

ray = pytest.importorskip("ray")
from ray.exceptions import ActorDiedError  # noqa: E402
from ray.serve.exceptions import BackPressureError  # noqa: E402

from trt_runtime.cli import main as cli  # noqa: E402
from trt_runtime.decoding.config import GenerationConfig  # noqa: E402
from trt_runtime.serving.replicas import Front, Replica  # noqa: E402


class Handle:
    """Stands for Ray's: each request gets the next of `plans`, a list of what is yielded; an exception in it
    is raised."""

    def __init__(self, *plans):
        self.plans, self.asked, self.cancelled = list(plans), [], 0

    def options(self, stream):
        return self

    def remote(self, asked):
        self.asked.append(asked)
        return Answer(self._answer(self.plans.pop(0)), self)

    async def _answer(self, plan):
        for part in plan:
            if isinstance(part, Exception):
                raise part
            if part is None:
                await asyncio.Event().wait()
            yield part


class Answer:
    def __init__(self, parts, handle):
        self.parts, self.handle = parts, handle

    def __aiter__(self):
        return self.parts

    def cancel(self):
        self.handle.cancelled += 1


def _ask(handle, *, leaves=False, timeout=5.0):
    """What a client gets of a front over a handle: status, body."""
    front, sent = Front(lambda: handle, "app", timeout), []
    messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await asyncio.sleep(0.05 if leaves else 60)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    asyncio.run(front(scope, receive, send))
    assert front.num_open == 0
    heads = [message["status"] for message in sent if message["type"] == "http.response.start"]
    assert len(heads) == (0 if leaves else 1)
    return heads[0] if heads else None, b"".join(message.get("body", b"") for message in sent)


HEAD, DIED = (200, [(b"content-type", b"text/event-stream")]), ActorDiedError()


def test_an_answer_that_has_not_begun_is_asked_of_another():
    handle = Handle([DIED], [HEAD, DIED], [HEAD, b"a", b"b"])
    assert _ask(handle) == (200, b"ab") and len(handle.asked) == 3 and len(set(map(id, handle.asked))) == 1


def test_an_answer_without_a_body_is_passed_on():
    """A redirect, as of a path with a slash at its end."""
    assert _ask(Handle([(307, [(b"location", b"/v1/models")])])) == (307, b"")


def test_a_replica_whose_forward_does_not_end_is_replaced(model):
    from trt_runtime.serving.answers import ServeOptions
    from trt_runtime.serving.app import create_app

    replica = object.__new__(Replica)
    replica.app = create_app(model, ServeOptions(name="demo", max_length=192, timeout=0.5))
    worker = replica.app.state.worker
    worker.start()
    try:
        replica.check_health()
        worker._lanes[0].busy_since = 0.0  # as if since the machine was started
        with pytest.raises(RuntimeError, match="a forward has been running"):
            replica.check_health()
        worker._lanes[0].busy_since = None
        replica.check_health()
    finally:
        worker.stop()
    with pytest.raises(RuntimeError, match="not running"):
        replica.check_health()


def test_an_answer_that_has_begun_ends_with_an_error():
    handle = Handle([HEAD, b"data: 1\n\n", DIED], [HEAD, b"never"])
    status, body = _ask(handle)
    assert status == 200 and body.startswith(b"data: 1\n\n") and len(handle.asked) == 1
    assert "was lost" in json.loads(body.split(b"data: ")[2])["error"]["message"]


def test_what_no_replica_answers():
    assert _ask(Handle([BackPressureError(num_queued_requests=1, max_queued_requests=1)]))[0] == 429
    status, body = _ask(Handle([DIED], [DIED], [DIED]), timeout=0.3)
    assert status == 503 and json.loads(body)["error"]["type"] == "server_error"


def test_a_client_that_leaves_is_told_to_the_replica():
    handle = Handle([HEAD, None])
    assert _ask(handle, leaves=True) == (None, b"") and handle.cancelled == 1


def _replicas(front):
    """Processes of the replicas of one front: other tests may have theirs on this machine."""
    found = subprocess.run(
        ["pgrep", "-f", f"ServeReplica:dllm-trt-{front}:"], capture_output=True, text=True, check=False
    )
    return {int(line) for line in found.stdout.split()}


class Load:
    """Clients that ask one thing after another, streamed and whole; what they got."""

    def __init__(self, url, expected, clients=6):
        self.url, self.expected = url, expected
        self.good = self.cut = 0
        self.wrong: list[str] = []
        self.is_over = False
        self.threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(clients)]
        for thread in self.threads:
            thread.start()

    def _ask(self, number):
        with httpx.Client(timeout=60) as http:
            while not self.is_over:
                number += 1
                prompt = OTHERS[number % len(OTHERS)]
                body = {
                    "model": "demo",
                    "messages": [{"role": "user", "content": prompt}],
                    "stream": bool(number % 2),
                }
                text = http.post(f"{self.url}/v1/chat/completions", json=body).text
                made = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")] or [
                    json.loads(text)
                ]
                begun = [choice for part in made for choice in part.get("choices", [])]
                if "error" in made[-1] and begun:
                    self.cut += 1
                    continue
                got = "".join(
                    (choice.get("message") or choice["delta"]).get("content") or "" for choice in begun
                )
                if got == self.expected[prompt]:
                    self.good += 1
                else:
                    self.wrong.append(text[-300:])

    def wait(self, more):
        until_good = self.good + more
        until(lambda: self.good >= until_good or self.wrong, seconds=30)

    def end(self):
        self.is_over = True
        for thread in self.threads:
            thread.join()


def test_replicas_are_killed_and_replaced_under_load(demo_artifact, model):
    """Nothing that had not begun is lost when a replica is killed, nothing at all by a rolling restart; then
    SIGTERM ends it with 0."""
    expected = {prompt: model.generate([prompt], GenerationConfig())[0].text for prompt in OTHERS}
    process, url = process_of(demo_artifact, "--ray", "2", "--slots", "4")
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()
    try:
        load = Load(url, expected)
        load.wait(20)
        before = _replicas(process.pid)
        os.kill(min(before), signal.SIGKILL)
        load.wait(40)
        assert load.cut <= 6  # streams that had begun in the replica that was killed
        until(lambda: httpx.get(f"{url}/ready").json().get("replicas") == {"RUNNING": 2}, seconds=30)
        cut, old = load.cut, _replicas(process.pid)
        process.send_signal(signal.SIGHUP)
        until(lambda: any("replaced the replicas" in line for line in lines), seconds=60)
        until(lambda: not old & _replicas(process.pid), seconds=30)
        load.wait(20)
        assert load.cut == cut and len(_replicas(process.pid)) == 2
        load.end()
        assert load.wrong == [] and load.good > 80
        text = httpx.get(
            f"{url}/metrics"
        ).text  # all that was answered is counted, also by replicas that are gone
        assert (
            float(text.split('dllm_answers_total{end="done"} ')[1].split()[0]) >= load.good
            and "dllm_slots 8.0" in text
        )
        assert httpx.post(f"{url}/v1/chat/completions", json={"model": "x"}).status_code == 400
        redirect = httpx.post(f"{url}/v1/chat/completions/", json={"model": "x"})
        assert redirect.status_code == 307 and redirect.headers["location"].endswith("/v1/chat/completions")
        assert httpx.get(f"{url}/health/").status_code in (200, 307)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and not _replicas(process.pid)
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def test_replicas_that_cannot_be_had_are_one_line(demo_artifact, capsys):
    assert cli.main(["serve", str(demo_artifact), "--ray", "0"]) == 1
    assert "--ray is 0" in capsys.readouterr().err
    command = [
        sys.executable,
        "-m",
        "trt_runtime.cli",
        "serve",
        str(demo_artifact),
        "--ray",
        "512",
        "--threads",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (
        done.returncode == 1 and len(errors) == 1 and "512 replicas need 1024 CPUs, but Ray has" in errors[0]
    ), done.stderr
