"""What clients and probes send beside good requests: nulls of any name, bodies of any type, nested or broken
JSON, HEAD, heads without end."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from serving import CHAT, connect, post, sent, serving, until

TEXT = {"model": "demo", "prompt": "clean hall with mop", "max_tokens": 8}


def _said(answer):
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["message"]


def _raw(url, content, kind="application/json"):
    return httpx.post(
        f"{url}/v1/chat/completions", content=content, headers={"content-type": kind}, timeout=60
    )


@pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("completions", TEXT)])
def test_null_is_taken_for_a_field_of_any_name(demo, path, body):
    expected = post(demo[0], body, path).json()["choices"]
    for name in ("guided_json", "echo", "suffix", "tools", "functions", "best_of", "timeout", "some_field"):
        assert post(demo[0], body | {name: None}, path).json()["choices"] == expected, name
    for name in ("guided_json", "timeout", "some_field"):
        assert name in _said(post(demo[0], body | {name: False}, path))
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": None}}
    assert post(demo[0], body | options, path).status_code == 200
    if path == "chat/completions":
        assert (
            post(demo[0], body | {"response_format": {"type": "text", "json_schema": None}}, path).json()[
                "choices"
            ]
            == expected
        )


def test_a_temperature_too_small_to_draw_with_takes_the_best_token(demo):
    expected = post(demo[0], CHAT).json()
    for small in (0.0001, 1e-5, 1e-8, 5e-324, 0.00099):
        answer = post(demo[0], CHAT | {"temperature": small})
        assert answer.status_code == 200 and answer.json()["choices"] == expected["choices"], small
        assert answer.json()["usage"] == expected["usage"] and "x-dllm-seed" not in answer.headers
    for wrong in (-1e-9, -0.0001, 101.0):
        assert "temperature" in _said(post(demo[0], CHAT | {"temperature": wrong}))


def test_the_largest_seed_draws_as_many_choices_as_any(demo):
    body = CHAT | {"temperature": 1.5, "seed": 2**63 - 1, "n": 3}
    first, again = post(demo[0], body), post(demo[0], body)
    assert first.status_code == 200 and first.json()["choices"] == again.json()["choices"]
    text = [choice["message"]["content"] for choice in first.json()["choices"]]
    assert (
        text[1]
        == post(demo[0], CHAT | {"temperature": 1.5, "seed": 0}).json()["choices"][0]["message"]["content"]
    )
    assert (
        post(
            demo[0], TEXT | {"prompt": ["clean hall", "tidy porch"], "seed": 2**63 - 1}, "completions"
        ).status_code
        == 200
    )


def test_several_choices_where_positions_are_drawn(demo):
    body = CHAT | {"policy": "origin", "n": 3, "seed": 1}
    answer = post(demo[0], body)
    assert (
        answer.status_code == 200
        and len({choice["message"]["content"] for choice in answer.json()["choices"]}) > 1
    )
    assert "would be the same" in _said(post(demo[0], CHAT | {"n": 2}))
    assert "would be the same" in _said(post(demo[0], CHAT | {"n": 2, "temperature": 1e-5}))


def test_a_suffix_counts_and_is_said(demo):
    said = _said(post(demo[0], {"model": "demo", "prompt": [9] * 191, "suffix": " and"}, "completions"))
    assert "192 tokens with its suffix" in said


def test_bodies_that_are_no_request(demo):
    url, good = demo[0], json.dumps(CHAT)
    for kind in (
        "multipart/form-data; boundary=x",
        "application/xml",
        "text/html",
        "nonsense",
        "application/octet-stream",
    ):
        assert _raw(url, good.encode(), kind).status_code == 200, kind
        assert "not valid JSON" in _said(_raw(url, b"--x", kind))
    for content in (
        '{"model": "é"}'.encode("latin-1"),
        b"\xff\xfe{",
        good[:-1].encode() + b', "max_tokens": ' + b"9" * 5000 + b"}",
    ):
        assert "not valid JSON" in _said(_raw(url, content)), content[:40]
    for content in (b"", b"null", b"[]", b'"x"', b"5"):
        assert "not a JSON object" in _said(_raw(url, content)), content
    for content in (b"[" * 100_000, b'{"a":' * 50_000):
        assert "nested too deeply" in _said(_raw(url, content))


def test_what_is_nested_in_a_message_is_an_error_of_the_client(demo):
    message = '{"role": "user", "content": "x", "z": @}'
    part = '{"role": "user", "content": [{"type": "text", "text": "x", "z": @}]}'
    for where in (message, part):
        for depth in (50, 400, 900, 5000):
            nested = where.replace("@", '{"a":' * depth + "null" + "}" * depth)
            answer = _raw(demo[0], b'{"model": "demo", "messages": [' + nested.encode() + b"]}")
            assert answer.status_code == (
                200 if depth == 50 else answer.status_code
            ) and answer.status_code in (200, 400), depth
            if answer.status_code == 400:
                assert "nested too deeply" in _said(answer)


def test_an_error_names_what_is_wrong_in_a_part(demo):
    part = {"type": "text", "text": "x"}
    for wrong, name in (
        (part | {"foo": 1}, "foo"),
        ({"text": "x"}, "type"),
        (part | {"text": 5}, "text"),
        (part | {"type": 5}, "type"),
    ):
        body = {"model": "demo", "messages": [{"role": "user", "content": [part, wrong]}]}
        answer = post(demo[0], body)
        assert f"messages.0.content.1.{name}" in _said(answer) and answer.json()["error"]["param"].endswith(
            name
        ), answer.text


def test_probes_ask_by_head(demo):
    for path in (
        "/",
        "/health",
        "/ready",
        "/version",
        "/metrics",
        "/v1/models",
        "/v1/models/demo",
        "/v1/models/demo/",
    ):
        got, head = httpx.get(f"{demo[0]}{path}"), httpx.head(f"{demo[0]}{path}")
        assert (got.status_code, head.status_code, head.content) == (200, 200, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
    assert httpx.head(f"{demo[0]}/nowhere").status_code == 404
    assert httpx.head(f"{demo[0]}/v1/completions").status_code == 405


def _answered(client):
    client.settimeout(10)
    got = b""
    while piece := client.recv(1 << 16):
        got += piece
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"NONSENSE\r\n\r\n", b"GET /\xff HTTP/9\r\n\r\n"],
)
def test_what_is_no_http_is_answered_in_openais_form(demo, sent):
    with connect(demo[0]) as client:
        client.sendall(sent)
        assert _answered(client)[0] == 400


def _poured(client, piece, most):
    """Send until the server closes; bytes that went."""
    gone = 0
    try:
        while gone < most:
            gone += client.send(piece)
            time.sleep(0.001)
    except OSError:
        pass
    return gone


@pytest.mark.parametrize("begin", [b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: ", b"GET /", b"x" * 10])
def test_a_head_without_end_is_cut_off(model, begin):
    with serving(model, header_seconds=60.0) as (url, _), connect(url) as client:
        client.sendall(begin)
        assert _poured(client, b"a" * 4096, 1 << 23) < 1 << 23
        assert httpx.get(f"{url}/health").status_code == 200
    with serving(model) as (url, _), connect(url) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 70_000)
        status, said = _answered(client)
        assert status == 431 and "65536 bytes" in said


def test_trailers_without_end_are_cut_off_and_bodies_in_small_pieces_are_not(model):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    with serving(model) as (url, _):
        for begin in (b"1\r\n{\r\n0\r\nx: ", b"1;x="):
            with connect(url) as client:
                client.sendall(head + begin)
                assert _poured(client, b"a" * 4096, 1 << 23) < 1 << 23
        body = json.dumps(TEXT).encode() + b" " * 30_000
        with connect(url) as client:
            client.sendall(head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
            client.settimeout(20)
            assert client.recv(15) == b"HTTP/1.1 200 OK"
            client.shutdown(socket.SHUT_RDWR)


def test_a_client_that_leaves_after_several_requests_at_once_leaves_nothing_behind(
    model, monkeypatch, caplog
):
    gate, real = threading.Event(), model.backend.forward
    monkeypatch.setattr(
        model.backend, "forward", lambda *given, **more: (gate.wait(30), real(*given, **more))[1]
    )
    with serving(model) as (url, worker):
        try:
            for stream in (False, True):
                gate.clear()
                with connect(url) as client:
                    client.sendall(sent(CHAT | {"stream": stream}) * 3)
                    until(lambda: worker.num_open == 1)
                until(lambda: not worker._held)  # given up, while its first forward is under way
                gate.set()
                until(lambda: worker.num_open == 0)
        finally:
            gate.set()
        assert (
            worker.metrics.requests.labels("left")._value.get() == 2
            and worker.metrics.requests.labels("done")._value.get() == 0
        )
        with connect(url) as client:  # who stays gets all answers, in their order
            client.sendall(sent(CHAT) + b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n")
            got = b""
            while b'"version"' not in got:
                got += client.recv(1 << 16)
            assert got.index(b"chat.completion") < got.index(b'"version"')
    assert "Exception" not in caplog.text
