"""What a server is started with: memory, keys, origins, an open door."""

from __future__ import annotations

import resource
from dataclasses import replace

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from serving import serving

from trt_runtime.artifact import manifest as manifests
from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError
from trt_runtime.serving import room


def test_the_default_canvas_is_what_memory_holds(demo_artifact, model, monkeypatch):
    facts = replace(model.manifest.model, max_length=131_072)
    each = 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * 4
    length = room.longest_canvas(facts, 8, None, free=8 * each * 10_000)
    assert (
        length % 64 == 0
        and (length + 64) * each * 8 <= 0.5 * 8 * each * 10_000 < (length + 64 + 64) * each * 8
    )
    assert (
        room.longest_canvas(facts, 8, None, free=1 << 60)
        == 131_072
        == room.longest_canvas(facts, 8, None, free=0)
    )
    assert room.longest_canvas(facts, 8, 500, free=1) == 500
    with pytest.raises(DllmError, match="--max-length is 131073, expected at most 131072"):
        room.longest_canvas(facts, 8, 131_073, free=1)
    with pytest.raises(DllmError, match=r"--slots.*--max-length"):
        room.longest_canvas(facts, 8, None, free=8 * each * 100)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (10 << 40, 10 << 40))
    assert 0 < room.free_memory() <= 10 << 40


def test_the_start_line_says_what_was_chosen(demo_artifact, monkeypatch, capsys):
    monkeypatch.setattr(
        "trt_runtime.serving.process.run_app",
        lambda app, listening, said, *more: (listening.close(), print(said))[0] or 0,
    )
    one = room.cache_bytes(manifests.load(demo_artifact).model, room.Work(1, 1, 1))
    monkeypatch.setattr("trt_runtime.serving.room.free_memory", lambda: 2 * one * (64 + 128))
    assert cli.main(["serve", str(demo_artifact), "--port", "0", "--slots", "1", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "1 slots of 128 tokens" in said and "limited by half of the free memory" in said
    assert cli.main(["serve", str(demo_artifact), "--port", "0", "--slots", "64", "--threads", "1"]) == 1
    said = capsys.readouterr().err
    assert "--slots" in said and "--max-length" in said and len(said.splitlines()) == 1


def test_keys_origins_and_the_open_door(demo_artifact, monkeypatch, capsys):
    from trt_runtime.cli import main as cli

    held = {}
    monkeypatch.setattr(
        "trt_runtime.serving.process.run",
        lambda model, options, host, port: held.update(options=options) or 0,
    )
    monkeypatch.setenv("DLLM_API_KEY", "a, b,c")
    assert cli.main(["serve", str(demo_artifact)]) == 0 and held["options"].api_key == ("a", "b", "c")
    assert (
        cli.main(
            [
                "serve",
                str(demo_artifact),
                "--api-key",
                "x,y",
                "--api-key",
                "z",
                "--cors",
                "*",
                "--cors",
                "http://h:1",
            ]
        )
        == 0
    )
    assert held["options"].api_key == ("x,y", "z") and held["options"].cors == ("*", "http://h:1")
    assert len(held["options"].examples) == 3
    for wrong in (
        ["--api-key", "a", "--api-key", ""],
        ["--cors", "localhost"],
        ["--cors", "http://h/path"],
        ["--cors", ""],
        ["--name", ""],
        ["--name", " "],
        ["--name", "a\nb"],
        ["--name", "a\udcff"],
    ):
        assert cli.main(["serve", str(demo_artifact), *wrong]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setenv("DLLM_API_KEY", "a,,b")
    assert cli.main(["serve", str(demo_artifact)]) == 1


def test_origins_as_browsers_send_them_are_taken_and_no_others():
    from trt_runtime.errors import DllmError
    from trt_runtime.serving import cors

    for good in (
        "http://localhost:3000",
        "https://www.site.test",
        "http://127.0.0.1:8080",
        "http://[::1]:3000",
        "tauri://localhost",
        "null",
        "*",
        "https://app-1.example.com:8443",
        "chrome-extension://abcs",
        "http://host:8080",
        "https://host:80",
    ):
        cors.check((good,))
    for bad in (
        "localhost:3000",
        "http://localhost:3000/",
        "http://h/path",
        "http://a b",
        "http://a\tb",
        "https://*.site.test",
        "HTTP://h",
        "http://Host",
        "http://a,http://b",
        "http://user@h",
        "http://h?x",
        "http://h#x",
        "http://",
        "",
        "http://h:80",
        "https://h:443",
    ):
        with pytest.raises(DllmError, match="--cors is"):
            cors.check((good, bad))


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [("0.0.0.0", None, True), ("0.0.0.0", ("k",), False), ("127.0.0.1", None, False)],
)
def test_an_open_door_is_said(monkeypatch, capsys, host, key, warns):
    from trt_runtime.serving import process as serve

    monkeypatch.setattr(serve.Server, "run", lambda self, sockets: sockets[0].close())
    monkeypatch.setattr(serve.signal, "signal", lambda number, handler: None)
    assert serve.run_app(None, serve.listen(host, 0), "demo", serve.ServeOptions("demo", api_key=key), 8) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("warning:") and "--api-key" in line for line in lines] == (
        [True, False] if warns else [False]
    )


def test_signals_end_a_server_that_is_starting_by_its_own_way(monkeypatch):
    """Two of them at that moment tore down an event loop that was half made, with warnings of Python's."""
    import signal

    from trt_runtime.serving import process as serve

    def started(self, sockets):
        sockets[0].close()
        assert {signal.getsignal(number) for number in before} == {self.handle_exit}
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert self.should_exit and self.force_exit
        signal.raise_signal(signal.SIGTERM)

    class Timer:
        def __init__(self, *given): ...
        def start(self): ...

    monkeypatch.setattr(serve.Server, "run", started)
    monkeypatch.setattr(serve.threading, "Timer", Timer)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert serve.run_app(None, serve.listen("127.0.0.1", 0), "demo", serve.ServeOptions("demo"), 8) == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_several_keys(model):
    with serving(model, api_key=("one", "two")) as (url, _):
        for key, status in (("one", 200), ("two", 200), ("three", 401), ("one,two", 401), ("onetwo", 401)):
            assert (
                httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code
                == status
            ), key


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--queue", "-1", "--queue is -1, expected from 0."),
        ("--port", "99999", "--port is 99999, expected 0 to 65535."),
        ("--timeout", "0", "--timeout is 0, expected above 0 and at most 86400 seconds."),
    ],
)
def test_the_option_that_is_wrong_is_named_alone(demo_artifact, capsys, option, value, said):
    assert cli.main(["serve", str(demo_artifact), option, value]) == 1
    assert capsys.readouterr().err == f"error: {said}\n"
