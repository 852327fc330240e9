"""Stop strings: special tokens, many of them, and what a naive search says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
from serving import PROMPT, post

from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.serving.stops import Cutter


def test_a_stop_string_may_be_a_special_token(model, demo, monkeypatch):
    """The text does not show it. The model is made to write it in the place of what stands between two
    steps."""
    tokenizer = model.tokenizer
    glue, special = tokenizer.encode('"}, {"')[0], tokenizer.encode("<|user|>")[0]

    def instead(real):
        def call(*args, **options):
            stats = real(*args, **options)
            return replace(stats, token=np.where(stats.token == glue, special, stats.token))

        return call

    monkeypatch.setattr(model.backend, "forward", instead(model.backend.forward))
    row = model.generate([PROMPT], GenerationConfig())[0]
    assert row.tokens.count(special) > 1
    first = row.tokens.index(special)
    last = tokenizer.spelled(row.tokens[first - 1 : first])
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]}
    for stop, shown in (
        ("<|user|>", first),
        (["nowhere", last[-2:] + "<|user|>"], None),
        ("<|user|>" + tokenizer.spelled(row.tokens[first + 1 : first + 2])[:1], None),
    ):
        expected = tokenizer.spelled(row.tokens)
        wanted = stop if isinstance(stop, str) else stop[1]
        assert wanted in expected
        for change, where in (
            ({}, "chat/completions"),
            ({"prompt": tokenizer.render_chat(body["messages"]), "messages": None}, "completions"),
        ):
            sent = {
                key: value
                for key, value in (body | {"stop": stop, "max_tokens": 96} | change).items()
                if value is not None
            }
            choice = post(demo[0], sent, where).json()["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            streamed = post(demo[0], sent | {"stream": True}, where).text
            events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
            pieces = [
                one.get("text") or one.get("delta", {}).get("content") or ""
                for event in events
                for one in event["choices"]
            ]
            assert choice["finish_reason"] == "stop" and "".join(pieces) == text
            assert text == (
                tokenizer.decode(row.tokens[:shown]) if shown else expected[: expected.index(wanted)]
            )
    assert "<|user|>" not in post(demo[0], body).json()["choices"][0]["message"]["content"]


def test_cutting_is_what_a_naive_search_says(model):
    """Random tokens, special ones among them: the text before the first stop string of the spelled text,
    special tokens left out; and as tokens come one by one, nothing is shown that is not shown in the end."""
    tokenizer, rng = model.tokenizer, np.random.default_rng(0)
    words = tokenizer.encode('clean hall with mop take red cups "}, {" <|user|> <|assistant|>')
    met = 0
    for _ in range(300):
        ids = rng.choice(words, int(rng.integers(1, 14))).tolist()
        pieces = [tokenizer.spelled(ids[i : i + 2]).strip() for i in rng.integers(0, len(ids), 2)]
        stops = [
            piece for piece in pieces if piece and any(text in piece for text in tokenizer.special_texts)
        ] or ["<|user|>"]
        cutter = Cutter(stops, tokenizer)
        text, stopped = cutter.cut(tokenizer.decode(ids), ids, is_last=True)
        spelled = tokenizer.spelled(ids)
        found = [spelled.index(stop) for stop in stops if stop in spelled]
        met += bool(found)
        assert stopped == bool(found)
        if not found:
            assert text == tokenizer.decode(ids)
        else:
            whole = max(n for n in range(len(ids) + 1) if len(tokenizer.spelled(ids[:n])) <= min(found))
            assert text.startswith(tokenizer.decode(ids[:whole])) and not any(
                special in text for special in tokenizer.special_texts
            )
        shown = ""
        for count in range(1, len(ids) + 1):
            part, ended = cutter.cut(tokenizer.decode(ids[:count]), ids[:count], is_last=count == len(ids))
            assert part.startswith(shown)
            shown = part
            if ended:
                break
        assert shown == text
    assert met > 100


def test_many_stop_strings(demo, model):
    full = model.generate([PROMPT], GenerationConfig())[0].text
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]}
    stops = [f"nowhere {i}" for i in range(63)]
    assert (
        post(demo[0], body | {"stop": [*stops, '"item"']}).json()["choices"][0]["message"]["content"]
        == full.split('"item"')[0]
    )
    assert post(demo[0], body | {"stop": [*stops, "a", "b"]}).status_code == 400
    assert post(demo[0], body | {"stop": ["a" * 257]}).status_code == 400
