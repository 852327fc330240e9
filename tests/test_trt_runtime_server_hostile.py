"""Clients, templates and devices that never end, and what they must not do to the others."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import resource
import shutil
import signal
import socket
import threading
import time
from dataclasses import replace

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
import itertools

from serving import PROMPT, process_of, serving, until

from trt_runtime import manifest as manifests
from trt_runtime.errors import DllmError
from trt_runtime.model import Update
from trt_runtime.server import room
from trt_runtime.server.connections import room_for
from trt_runtime.server.errors import Failure, clipped, spoken
from trt_runtime.server.limits import Limits, is_local_name
from trt_runtime.server.mailbox import Mailbox
from trt_runtime.server.preparing import Preparing
from trt_runtime.server.serve import _Calm

CHAT = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]}


def _post(url, body, path="chat/completions"):
    return httpx.post(f"{url}/v1/{path}", json=body, timeout=60)


def _connect(url):
    return socket.create_connection(("127.0.0.1", httpx.URL(url).port))


def _sent(body, path="chat/completions"):
    raw = json.dumps(body).encode()
    return f"POST /v1/{path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw


# --- texts


def test_a_text_that_cannot_fit_is_refused_before_all_of_it_is_tokenised(demo, model, monkeypatch):
    seen, real = [], model.tokenizer._encoding
    monkeypatch.setattr(model.tokenizer, "_encoding", lambda text: seen.append(len(text)) or real(text))
    long = "clean hall with mop " * 40_000
    for path, body in (("chat/completions", {"messages": [{"role": "user", "content": long}]}), ("completions", {"prompt": long}),
                       ("completions", {"prompt": ["clean", long]}), ("completions", {"template": [long, {"mask": 3}]}),
                       ("completions", {"prompt": "clean", "suffix": long})):  # fmt: skip
        answer = _post(demo[0], {"model": "demo", "max_tokens": None} | body, path)
        assert answer.status_code == 400 and "tokens" in answer.json()["error"]["message"], body
    assert seen and max(seen) < 10_000


def test_texts_that_may_fit_are_never_refused_unread(model):
    """Many characters a token: what the beginning does not tell is tokenised."""
    tokenizer = model.tokenizer
    for text in ("clean hall" + " " * 50_000, "x" * 50_000, "clean " * 100, "clean hall with mop " * 5000):
        for most in (3, 50, 1000, 30_000):
            assert not tokenizer.surely_exceeds(text, most) or len(tokenizer.encode(text)) > most


def test_tokenising_leaves_the_interpreter_to_others(model):
    """Another thread runs meanwhile."""
    text, counts = "clean hall with mop " * 50_000, []

    def count():
        begin = time.perf_counter()
        while not counts or counts[-1] is not None:
            counts.append(time.perf_counter() - begin)
            time.sleep(0.001)

    other = threading.Thread(target=count)
    other.start()
    model.tokenizer.encode(text)
    held = list(counts)
    counts.append(None)
    other.join()
    assert max(b - a for a, b in itertools.pairwise(held)) < 0.5 * held[-1] and len(held) > 5


def test_errors_say_little_of_what_was_sent(demo):
    long = "x" * 5000
    for path, change in (("chat/completions", {"model": long}), ("chat/completions", {long: 1}), ("chat/completions", {"policy": long}), ("chat/completions", {"cache": long}),
                         ("chat/completions", {"messages": [{"role": long, "content": "x"}]}), ("chat/completions", {"messages": [{"role": "user", "content": "x", long: 1}]}),
                         ("chat/completions", {"stop": [long]}), ("chat/completions", {"messages": [{"role": "user", "content": [{"type": long}]}]}),
                         ("chat/completions", {"messages": [{"role": "user", "content": "\ud800" + long}]}), ("chat/completions", {"logit_bias": {long: 3}}),
                         ("chat/completions", {"tool_choice": long}), ("completions", {"prompt": {long: long}}), ("chat/completions", {"seed": long}),
                         ("chat/completions", {"metadata": {long: 7}}), ("chat/completions", {"stream_options": {long: 7}})):  # fmt: skip
        body = {"model": "demo"} | ({"messages": CHAT["messages"]} if "chat" in path else {}) | change
        answer = httpx.post(f"{demo[0]}/v1/{path}", content=json.dumps(body), headers={"content-type": "application/json"})
        assert answer.status_code in (400, 404) and answer.json()["error"]["message"] and len(answer.content) < 1000, change
        assert "x" * 201 not in answer.text, change
    assert httpx.get(f"{demo[0]}/v1/models/{long}").text.count("x") < 201
    assert "x" * 201 not in clipped(long) and clipped("short") == "short"


def test_clients_are_told_nothing_of_the_command_line(demo, model, monkeypatch):
    mask = model.manifest.decoding.mask_token_id
    for path, body in (("completions", {"prompt": [5, mask]}), ("completions", {"prompt": [5] * 500}), ("completions", {"prompt": "x " * 500}),
                       ("completions", {"prompt": [5], "suffix_decay": True}), ("completions", {"prompt": [5], "steps": 1}), ("completions", {"prompt": " "}),
                       ("completions", {"prompt": [99999]}), ("completions", {"prompt": [5], "block_length": 3, "steps": 2, "policy": "fixed"}),
                       ("completions", {"prompt": [5], "top_p": 3}), ("completions", {"prompt": [5], "refresh_window": 3})):  # fmt: skip
        said = _post(demo[0], {"model": "demo"} | body, path).json()["error"]["message"]
        assert "--" not in said and "gen_length" not in said and " infill" not in said and "suffix goes" not in said, said
    monkeypatch.setattr(type(model.backend), "gives_logits", property(lambda self: False))
    said = _post(demo[0], CHAT | {"temperature": 1}).json()["error"]["message"]
    assert "leave out temperature" in said and "--" not in said
    held, model.tokenizer = model.tokenizer, None
    try:
        said = _post(demo[0], {"model": "demo", "prompt": "x"}, "completions").json()["error"]["message"]
        assert "token ids" in said and "--" not in said
    finally:
        model.tokenizer = held
    assert spoken(DllmError("gen_length is 0 (--gen-length): suffix_decay goes with suffix: x (generate --ids).")) == (
        "max_tokens is 0: suffix_decay goes with suffix_masks: x."
    )


# --- streams that nobody reads


def _update(number, changed=(0,), finished=False, tokens=96):
    return Update(0, number, "dual", "", "", [0] * tokens, list(changed), [0.5] * len(changed), (0, 8), finished)


def test_a_mailbox_holds_a_bounded_number_and_loses_nothing():
    async def run():
        box = Mailbox()
        for number in range(5000):
            for index in (0, 1):
                box.put(index, _update(number, [number % 96]))
        assert len(box) <= 2 * 64
        for index in (0, 1):
            box.put(index, None)
        seen, last = {0: [], 1: []}, {}
        while len(box):
            index, update = await box.get()
            if update is not None:
                seen[index] += update.changed
                last[index] = update.nfe
        assert all(changed == [number % 96 for number in range(5000)] for changed in seen.values()) and last == {0: 4999, 1: 4999}
        box.put(0, _update(1, tokens=100_000))
        box.put(0, _update(2, tokens=100_000))
        assert len(box) == 1  # of long canvases the newest alone
        box.put(1, ValueError("x"))
        await box.get()
        with pytest.raises(ValueError, match="x"):
            await box.get()

    asyncio.run(run())


def _unread(url, **more):
    """A stream with much to send, over a connection that takes in little and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    client.connect(("127.0.0.1", httpx.URL(url).port))
    client.sendall(_sent(CHAT | {"stream": True, "policy": "fixed", "stream_options": {"provisional": True}} | more))
    return client


@pytest.fixture
def small_buffers(monkeypatch):
    """Sockets of the server take in little that is not read."""
    from trt_runtime.server import connections

    real = connections._Connection.connection_made

    def made(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        transport.set_write_buffer_limits(1024)
        real(self, transport)

    monkeypatch.setattr(connections._Connection, "connection_made", made)


def test_a_stream_that_nobody_reads_counts_as_open_and_is_cut_off(model, small_buffers, monkeypatch):
    monkeypatch.setattr("trt_runtime.server.limits._LATE_SECONDS", 0.2)
    with serving(model, timeout=2.0, slots=2, most_queued=0) as (url, worker):
        clients = [_unread(url) for _ in range(2)]
        until(lambda: not worker._open and len(worker._held) == 2)  # decoded, and not delivered
        assert httpx.get(f"{url}/ready").json()["open"] == 2
        assert _post(url, CHAT).status_code == 429
        until(lambda: worker.num_open == 0, 10)
        until(lambda: not worker.connections)  # dropped with what is unsent, which nobody has read
        assert _post(url, CHAT).status_code == 200
        for client in clients:
            client.close()


# --- connections


def test_silent_and_half_open_connections_do_not_keep_others_out(model):
    with serving(model, header_seconds=1.0, slots=1, most_queued=0) as (url, _):
        silent = [_connect(url) for _ in range(200)]
        for number, client in enumerate(silent):
            client.sendall([b"", b"GET / HT", b"POST /v1/completions HTTP/1.1\r\nhost: lo", b"\r\n"][number % 4])
        assert httpx.get(f"{url}/health").status_code == 200 and _post(url, CHAT).status_code == 200
        for client in silent:
            client.settimeout(5)
            assert client.recv(100) == b""  # closed when its head did not come
            client.close()
        slow = _connect(url)
        for _ in range(30):  # a byte now and then does not keep it
            time.sleep(0.05)
            try:
                slow.sendall(b"x")
            except OSError:
                break
        else:
            raise AssertionError("a head may take for ever")
        slow.close()


def test_where_there_is_no_room_the_oldest_idle_connection_goes(model, monkeypatch):
    monkeypatch.setattr("trt_runtime.server.serve.room_for", lambda most: 5)
    with serving(model, slots=1) as (url, worker):
        clients = [_connect(url) for _ in range(5)]
        for client in clients:
            client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b"200 OK" in client.recv(1000)
        newest = _connect(url)
        newest.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b"200 OK" in newest.recv(1000)
        clients[0].settimeout(5)
        while clients[0].recv(1000):  # the end of its answer, then the end of the connection
            pass
        for client in [*clients, newest]:
            client.close()
        whole = model.backend.refine
        monkeypatch.setattr(model.backend, "refine", lambda *args, **options: (time.sleep(0.1), whole(*args, **options))[1])
        until(lambda: httpx.get(f"{url}/health").status_code == 200)
        busy = [_connect(url) for _ in range(5)]
        for client in busy:
            client.sendall(_sent(CHAT | {"policy": "fixed"}))
        until(lambda: worker.num_open == 5)
        late = _connect(url)
        late.settimeout(5)
        head, _, body = late.recv(4000).partition(b"\r\n\r\n")
        assert b"503" in head and b"retry-after" in head and json.loads(body)["error"]["type"] == "server_error"
        for client in [*busy, late]:
            client.close()


def test_more_requests_than_may_be_open_get_503(model, monkeypatch):
    monkeypatch.setattr("trt_runtime.server.app.most_open", lambda options: 2)
    whole = model.backend.refine
    monkeypatch.setattr(model.backend, "refine", lambda *args, **options: (time.sleep(0.05), whole(*args, **options))[1])
    with serving(model) as (url, worker):
        clients = [_connect(url) for _ in range(2)]
        for client in clients:
            client.sendall(_sent(CHAT | {"policy": "fixed"}))
        until(lambda: worker.num_open == 2)
        answer = _post(url, CHAT)
        assert answer.status_code == 503 and answer.headers["retry-after"] and answer.json()["error"]["type"] == "server_error"
        assert httpx.get(f"{url}/health").status_code == 200
        for client in clients:
            client.close()
        until(lambda: worker.num_open == 0)
        assert _post(url, CHAT).status_code == 200


def test_few_descriptors_are_shared_out(monkeypatch):
    held = {"soft": 256, "hard": 512}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (held["soft"], held["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: held.update(soft=limits[0]))
    assert room_for(2000) == 512 - 64 and held["soft"] == 512 and room_for(100) == 100
    calm, lines = _Calm(), []

    class Loop:
        def default_exception_handler(self, context):
            lines.append(context["message"])

    for _ in range(1000):
        calm(Loop(), {"message": "socket.accept() out of system resource"})
    assert len(lines) == 1


def test_of_a_body_that_is_too_large_no_more_than_its_limit_is_held():
    """However it comes; and the rest is read, up to a multiple of the limit, so that a client which sends first gets its answer."""

    async def run(part, count):
        taken = []

        async def receive():
            taken.append(part)
            return {"type": "http.request", "body": part, "more_body": len(taken) < count}

        limits = Limits(None, most_body=1000, api_key=None, only_local=False, count=lambda status: None)
        return len(await limits._body(receive)), len(taken)

    assert asyncio.run(run(b"x" * 10, 50)) == (500, 50)
    assert asyncio.run(run(b"x" * 400, 10)) == (1001, 10)
    assert asyncio.run(run(b"x" * 10**6, 3)) == (1001, 1)


def test_a_body_in_single_bytes_does_not_hold_up_others(model):
    """And costs what its bytes cost, not their square."""
    with serving(model) as (url, _):
        client = _connect(url)
        body = json.dumps(CHAT | {"user": "u" * 60_000}).encode()
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        sender = threading.Thread(target=lambda: client.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"))
        sender.start()
        slowest = 0.0
        while sender.is_alive():
            begin = time.perf_counter()
            assert httpx.get(f"{url}/health", timeout=20).status_code == 200
            slowest = max(slowest, time.perf_counter() - begin)
        sender.join()
        client.settimeout(20)
        assert b"200 OK" in client.recv(1000) and slowest < 5
        client.close()


def test_this_machine_by_its_names():
    for host in (
        "localhost",
        "LOCALHOST",
        "localhost.",
        "Localhost.:8000",
        "127.0.0.1",
        "127.0.0.1:8000",
        "[::1]",
        "[::1]:8000",
        "localhost:",
        "127.0.0.2",
    ):
        assert is_local_name(host), host
    for host in (
        "",
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[::2]",
        "10.0.0.1",
        "0.0.0.0",
        "localhost:80:80",
        "[::1",
        "evil:1@localhost",
        "localhost..",
        "::",
    ):
        assert not is_local_name(host), host


# --- what never ends


@pytest.fixture
def stuck(model, monkeypatch):
    """A forward that waits for an event, which the test or the end sets."""
    go, real = threading.Event(), model.backend.prefix
    monkeypatch.setattr(model.backend, "prefix", lambda *args, **options: (go.wait(), real(*args, **options))[1])
    yield go
    go.set()


def test_a_forward_that_does_not_end_is_said(model, stuck):
    with serving(model, timeout=0.3) as (url, worker):
        assert httpx.get(f"{url}/ready").status_code == 200
        assert _post(url, CHAT).status_code == 504
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
            answer = _post(url, CHAT)
            assert answer.status_code == 504 and "not prepared within" in answer.json()["error"]["message"]
        until(lambda: not [thread for thread in threading.enumerate() if thread.name == "dllm-trt prompt"])
        assert threading.active_count() <= before + 1 and httpx.get(f"{url}/ready").status_code == 200
        monkeypatch.undo()
        assert _post(url, CHAT).status_code == 200


def test_threads_that_cannot_be_stopped_are_bounded_and_said():
    async def run():
        preparing, go = Preparing(most=2, seconds=0.2), threading.Event()
        for _ in range(2):
            with pytest.raises(Failure, match="not prepared"):
                await preparing.run(go.wait)  # in C: no exception reaches it
        assert preparing.is_stuck
        with pytest.raises(Failure, match="other prompts"):
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
        answer = _post(url, CHAT)
        assert answer.status_code == 400 and "tokenizer fails" in answer.json()["error"]["message"]
        held.is_down = "decode"
        for stream in (False, True):
            answer = _post(url, CHAT | {"stream": stream})
            assert (
                answer.status_code == (200 if stream else 500) and "server_error" in answer.text and "unwrap" not in answer.text
            )
        held.is_down = "nothing"
        assert _post(url, CHAT).status_code == 200 and worker.is_alive and worker.num_open == 0


def test_no_memory_is_an_answer(model, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    with serving(model) as (url, worker):
        real = model.sequence
        monkeypatch.setattr(model, "sequence", lambda *args, **options: (_ for _ in ()).throw(MemoryError("x")))
        answer = _post(url, CHAT)
        assert answer.status_code == 503 and answer.json()["error"]["type"] == "server_error" and answer.headers["retry-after"]
        monkeypatch.setattr(model, "sequence", real)
        refine = model.backend.refine
        monkeypatch.setattr(model.backend, "refine", lambda *args, **options: (_ for _ in ()).throw(MemoryError("x")))
        assert _post(url, CHAT).status_code == 500
        monkeypatch.setattr(model.backend, "refine", refine)
        assert _post(url, CHAT).status_code == 200 and worker.num_open == 0


# --- as a process


def _ended(process, seconds):
    try:
        return process.wait(seconds)
    finally:
        process.kill()


def test_sigterm_does_not_wait_for_streams_that_nobody_reads(demo_artifact):
    process, url = process_of(demo_artifact, "--threads", "1", "--timeout", "2")
    client = _connect(url)
    client.sendall(_sent(CHAT)[:-5])  # a body that does not come
    idle = _connect(url)
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
    client = _connect(url)
    if count == 2:  # something that is under way
        client.sendall(_sent(CHAT)[:-5])
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
    client = _connect(url)
    client.sendall(_sent(CHAT))
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert _ended(process, 20) in (0, 1)
    lines = process.stderr.read()
    assert "Traceback" not in lines
    process.stderr.close()
    client.close()


NEVER = """import sys, threading
from trt_runtime import cli
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.server.worker import Worker
forever = lambda *given, **options: threading.Event().wait()
setattr({OrtBackend}, "{name}", forever)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("cls", "name", "said"), [("OrtBackend", "prefix", "a forward does not end"), ("Worker", "stop", "something does not end")]
)
def test_a_process_that_something_holds_ends_with_a_line(demo_artifact, cls, name, said):
    """A forward that never returns, and any other thread that does not."""
    program = NEVER.replace("{OrtBackend}", cls).replace("{name}", name)
    process, url = process_of(demo_artifact, "--threads", "1", "--timeout", "0.5", program=program)
    client = _connect(url)
    client.sendall(_sent(CHAT))
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


# --- memory at the start


def test_the_default_canvas_is_what_memory_holds(demo_artifact, model, monkeypatch):
    facts = replace(model.manifest.model, max_length=131_072)
    each = 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * 4
    length = room.longest_canvas(facts, 8, None, free=8 * each * 10_000)
    assert length % 64 == 0 and (length + 64) * each * 8 <= 0.5 * 8 * each * 10_000 < (length + 64 + 64) * each * 8
    assert room.longest_canvas(facts, 8, None, free=1 << 60) == 131_072 == room.longest_canvas(facts, 8, None, free=0)
    assert room.longest_canvas(facts, 8, 500, free=1) == 500 and room.longest_canvas(facts, 8, 10**9, free=1) == 131_072
    with pytest.raises(DllmError, match=r"--slots.*--max-length"):
        room.longest_canvas(facts, 8, None, free=8 * each * 100)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (10 << 40, 10 << 40))
    assert 0 < room.free_memory() <= 10 << 40


def test_the_start_line_says_what_was_chosen(demo_artifact, monkeypatch, capsys):
    from trt_runtime import cli

    monkeypatch.setattr(
        "trt_runtime.server.serve.run_app", lambda app, listening, said, *more: (listening.close(), print(said))[0] or 0
    )
    one = room.cache_bytes(manifests.load(demo_artifact).model, room.Work(1, 1, 1))
    monkeypatch.setattr("trt_runtime.server.room.free_memory", lambda: 2 * one * (64 + 128))
    assert cli.main(["serve", str(demo_artifact), "--port", "0", "--slots", "1", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "1 slots of 128 tokens" in said and "what half of the free memory holds" in said
    assert cli.main(["serve", str(demo_artifact), "--port", "0", "--slots", "64", "--threads", "1"]) == 1
    said = capsys.readouterr().err
    assert "--slots" in said and "--max-length" in said and len(said.splitlines()) == 1


def test_keys_origins_and_the_open_door(demo_artifact, monkeypatch, capsys):
    from trt_runtime import cli

    held = {}
    monkeypatch.setattr("trt_runtime.server.serve.run", lambda model, options, host, port: held.update(options=options) or 0)
    monkeypatch.setenv("DLLM_API_KEY", "a, b,c")
    assert cli.main(["serve", str(demo_artifact)]) == 0 and held["options"].api_key == ("a", "b", "c")
    assert (
        cli.main(["serve", str(demo_artifact), "--api-key", "x,y", "--api-key", "z", "--cors", "*", "--cors", "http://h:1"]) == 0
    )
    assert held["options"].api_key == ("x,y", "z") and held["options"].cors == ("*", "http://h:1")
    assert len(held["options"].examples) == 3
    for wrong in (["--api-key", "a", "--api-key", ""], ["--cors", "localhost"], ["--cors", "http://h/path"], ["--cors", ""]):
        assert cli.main(["serve", str(demo_artifact), *wrong]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setenv("DLLM_API_KEY", "a,,b")
    assert cli.main(["serve", str(demo_artifact)]) == 1
    monkeypatch.undo()
    process, _ = process_of(demo_artifact, "--host", "0.0.0.0", "--threads", "1")
    process.send_signal(signal.SIGTERM)
    assert _ended(process, 20) == 0
    process.stderr.close()


@pytest.mark.parametrize(
    ("host", "key", "warns"), [("0.0.0.0", None, True), ("0.0.0.0", ("k",), False), ("127.0.0.1", None, False)]
)
def test_an_open_door_is_said(monkeypatch, capsys, host, key, warns):
    from trt_runtime.server import serve

    monkeypatch.setattr(serve.Server, "run", lambda self, sockets: sockets[0].close())
    monkeypatch.setattr(serve.signal, "signal", lambda number, handler: None)
    assert serve.run_app(None, serve.listen(host, 0), "demo", serve.Options("demo", api_key=key), 8) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("warning:") and "--api-key" in line for line in lines] == ([True, False] if warns else [False])


def test_several_keys(model):
    with serving(model, api_key=("one", "two")) as (url, _):
        for key, status in (("one", 200), ("two", 200), ("three", 401), ("one,two", 401), ("onetwo", 401)):
            assert httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == status, key
