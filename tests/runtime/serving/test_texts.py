"""Long texts, and what a client is told of what it sent."""

from __future__ import annotations

import json
import threading
import time

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
import itertools

from serving import CHAT, post

from trt_runtime.errors import DllmError
from trt_runtime.serving.errors import clipped, spoken


def test_a_text_that_cannot_fit_is_refused_before_all_of_it_is_tokenised(demo, model, monkeypatch):
    seen, real = [], model.tokenizer._encoding
    monkeypatch.setattr(model.tokenizer, "_encoding", lambda text: seen.append(len(text)) or real(text))
    long = "clean hall with mop " * 40_000
    for path, body in (
        ("chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("completions", {"prompt": long}),
        ("completions", {"prompt": ["clean", long]}),
        ("completions", {"template": [long, {"mask": 3}]}),
        ("completions", {"prompt": "clean", "suffix": long}),
    ):
        answer = post(demo[0], {"model": "demo", "max_tokens": None} | body, path)
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


def test_errors_say_little_of_what_wassent(demo):
    long = "x" * 5000
    for path, change in (
        ("chat/completions", {"model": long}),
        ("chat/completions", {long: 1}),
        ("chat/completions", {"policy": long}),
        ("chat/completions", {"cache": long}),
        ("chat/completions", {"messages": [{"role": long, "content": "x"}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x", long: 1}]}),
        ("chat/completions", {"stop": [long]}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": long}]}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud800" + long}]}),
        ("chat/completions", {"logit_bias": {long: 3}}),
        ("chat/completions", {"tool_choice": long}),
        ("completions", {"prompt": {long: long}}),
        ("chat/completions", {"seed": long}),
        ("chat/completions", {"metadata": {long: 7}}),
        ("chat/completions", {"stream_options": {long: 7}}),
    ):
        body = {"model": "demo"} | ({"messages": CHAT["messages"]} if "chat" in path else {}) | change
        answer = httpx.post(
            f"{demo[0]}/v1/{path}", content=json.dumps(body), headers={"content-type": "application/json"}
        )
        assert (
            answer.status_code in (400, 404)
            and answer.json()["error"]["message"]
            and len(answer.content) < 1000
        ), change
        assert "x" * 201 not in answer.text, change
    assert httpx.get(f"{demo[0]}/v1/models/{long}").text.count("x") < 201
    assert "x" * 201 not in clipped(long) and clipped("short") == "short"


def test_clients_are_told_nothing_of_the_command_line(demo, model, monkeypatch):
    mask = model.manifest.decoding.mask_token_id
    for path, body in (
        ("completions", {"prompt": [5, mask]}),
        ("completions", {"prompt": [5] * 500}),
        ("completions", {"prompt": "x " * 500}),
        ("completions", {"prompt": [5], "suffix_decay": True}),
        ("completions", {"prompt": [5], "steps": 1}),
        ("completions", {"prompt": " "}),
        ("completions", {"prompt": [99999]}),
        ("completions", {"prompt": [5], "block_length": 3, "steps": 2, "policy": "fixed"}),
        ("completions", {"prompt": [5], "top_p": 3}),
        ("completions", {"prompt": [5], "refresh_window": 3}),
    ):
        said = post(demo[0], {"model": "demo"} | body, path).json()["error"]["message"]
        assert (
            "--" not in said
            and "gen_length" not in said
            and " infill" not in said
            and "suffix goes" not in said
        ), said
    monkeypatch.setattr(type(model.backend), "gives_logits", property(lambda self: False))
    said = post(demo[0], CHAT | {"temperature": 1}).json()["error"]["message"]
    assert "remove temperature" in said and "--" not in said
    held, model.tokenizer = model.tokenizer, None
    try:
        said = post(demo[0], {"model": "demo", "prompt": "x"}, "completions").json()["error"]["message"]
        assert "token ids" in said and "--" not in said
    finally:
        model.tokenizer = held
    assert spoken(
        DllmError("gen_length is 0 (--gen-length): suffix_decay needs suffix: x (generate --ids).")
    ) == ("max_tokens is 0: suffix_decay needs suffix_masks: x.")
