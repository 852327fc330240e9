"""Clients that do not read, do not send, or send in pieces, and what they must not do to the others."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import threading
import time

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from serving import CHAT, connect, post, sent, serving, until

from trt_runtime.model import Update
from trt_runtime.serving.connections import room_for
from trt_runtime.serving.limits import Limits, is_local_name
from trt_runtime.serving.mailbox import Mailbox
from trt_runtime.serving.process import _Calm


def _update(number, changed=(0,), finished=False, tokens=96):
    return Update(
        0, number, "dual", "", "", [0] * tokens, list(changed), [0.5] * len(changed), (0, 8), finished
    )


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
        assert all(
            changed == [number % 96 for number in range(5000)] for changed in seen.values()
        ) and last == {0: 4999, 1: 4999}
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
    client.sendall(
        sent(CHAT | {"stream": True, "policy": "fixed", "stream_options": {"provisional": True}} | more)
    )
    return client


@pytest.fixture
def small_buffers(monkeypatch):
    """Sockets of the server take in little that is not read."""
    from trt_runtime.serving import connections

    real = connections._Connection.connection_made

    def made(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        transport.set_write_buffer_limits(1024)
        real(self, transport)

    monkeypatch.setattr(connections._Connection, "connection_made", made)


def test_a_stream_that_nobody_reads_counts_as_open_and_is_cut_off(model, small_buffers, monkeypatch):
    monkeypatch.setattr("trt_runtime.serving.limits._LATE_SECONDS", 0.2)
    with serving(model, timeout=2.0, slots=2, most_queued=0) as (url, worker):
        clients = [_unread(url) for _ in range(2)]
        until(lambda: not worker._open and len(worker._held) == 2)  # decoded, and not delivered
        assert httpx.get(f"{url}/ready").json()["open"] == 2
        assert post(url, CHAT).status_code == 429
        until(lambda: worker.num_open == 0, 10)
        until(lambda: not worker.connections)  # dropped with what is unsent, which nobody has read
        assert post(url, CHAT).status_code == 200
        for client in clients:
            client.close()


def test_silent_and_half_open_connections_do_not_keep_others_out(model):
    with serving(model, header_seconds=1.0, slots=1, most_queued=0) as (url, _):
        silent = [connect(url) for _ in range(200)]
        for number, client in enumerate(silent):
            client.sendall(
                [b"", b"GET / HT", b"POST /v1/completions HTTP/1.1\r\nhost: lo", b"\r\n"][number % 4]
            )
        assert httpx.get(f"{url}/health").status_code == 200 and post(url, CHAT).status_code == 200
        for client in silent:
            client.settimeout(5)
            assert client.recv(100) == b""  # closed when its head did not come
            client.close()
        slow = connect(url)
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
    monkeypatch.setattr("trt_runtime.serving.process.room_for", lambda most: 5)
    with serving(model, slots=1) as (url, worker):
        clients = [connect(url) for _ in range(5)]
        for client in clients:
            client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b"200 OK" in client.recv(1000)
        newest = connect(url)
        newest.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b"200 OK" in newest.recv(1000)
        clients[0].settimeout(5)
        while clients[0].recv(1000):  # the end of its answer, then the end of the connection
            pass
        for client in [*clients, newest]:
            client.close()
        whole = model.backend.forward
        monkeypatch.setattr(
            model.backend, "forward", lambda *args, **options: (time.sleep(0.1), whole(*args, **options))[1]
        )
        until(lambda: httpx.get(f"{url}/health").status_code == 200)
        busy = [connect(url) for _ in range(5)]
        for client in busy:
            client.sendall(sent(CHAT | {"policy": "fixed"}))
        until(lambda: worker.num_open == 5)
        late = connect(url)
        late.settimeout(5)
        head, _, body = late.recv(4000).partition(b"\r\n\r\n")
        assert (
            b"503" in head and b"retry-after" in head and json.loads(body)["error"]["type"] == "server_error"
        )
        for client in [*busy, late]:
            client.close()


def test_more_requests_than_may_be_open_get_503(model, monkeypatch):
    monkeypatch.setattr("trt_runtime.serving.app.most_open", lambda options: 2)
    whole = model.backend.forward
    monkeypatch.setattr(
        model.backend, "forward", lambda *args, **options: (time.sleep(0.05), whole(*args, **options))[1]
    )
    with serving(model) as (url, worker):
        clients = [connect(url) for _ in range(2)]
        for client in clients:
            client.sendall(sent(CHAT | {"policy": "fixed"}))
        until(lambda: worker.num_open == 2)
        answer = post(url, CHAT)
        assert (
            answer.status_code == 503
            and answer.headers["retry-after"]
            and answer.json()["error"]["type"] == "server_error"
        )
        assert httpx.get(f"{url}/health").status_code == 200
        for client in clients:
            client.close()
        until(lambda: worker.num_open == 0)
        assert post(url, CHAT).status_code == 200


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
    """However it comes; and the rest is read, up to a multiple of the limit, so that a client which sends
    first gets its answer."""

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
        client = connect(url)
        body = json.dumps(CHAT | {"user": "u" * 60_000}).encode()
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        sender = threading.Thread(
            target=lambda: client.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        )
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
