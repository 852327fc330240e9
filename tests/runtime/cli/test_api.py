"""The Python API around an answer: closing, what objects look like in a console and a notebook, and traces
with confidences."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import trt_runtime as rt
from trt_runtime.cli import main as cli
from trt_runtime.decoding.trace import Step
from trt_runtime.measure import recordings, replay

PROMPT = "take red cups from kitchen to garage, then hand blue pens to Mia, and clean hall with mop"


def test_a_closed_model_refuses_every_use(demo_artifact):
    with rt.load(demo_artifact, threads=1) as model:
        row, running = model.generate([PROMPT])[0], model.stream([PROMPT])
        config = rt.GenerationConfig().resolved(model.manifest)
        sequence = model.sequence(PROMPT, config)
        next(running)
        never_begun = model.stream([PROMPT])
    model.close()  # a second time
    uses = [
        lambda: model.generate([PROMPT]),
        lambda: model.generate([[5, 6]]),
        lambda: model.stream([PROMPT]),
        lambda: next(running),
        lambda: next(never_begun),
        lambda: model.encode(PROMPT),
        lambda: model.encode([5]),
        lambda: model.backend,
        lambda: model.sequence(PROMPT, config),
        lambda: model.text(sequence.output),
        lambda: model.piece(5),
        model.__enter__,
    ]
    for use in uses:
        with pytest.raises(rt.DllmError, match="the model was closed: open it again"):
            use()
    assert row.text and model.manifest.model.family == "llada" and repr(model).endswith("closed)")
    assert row._repr_html_()  # a result needs no model


def test_an_error_inside_closes_as_well(demo_artifact):
    with pytest.raises(ZeroDivisionError), rt.load(demo_artifact, threads=1) as model:
        raise ZeroDivisionError
    with pytest.raises(rt.DllmError, match="was closed"):
        model.generate([PROMPT])


def test_objects_are_short_in_a_console(model):
    result = model.generate([PROMPT])[0]
    shown = repr(result)
    assert (
        shown.startswith(f"Result(text={result.text[:40]!r}"[:-1])
        and f"num_useful={result.num_useful}, nfe={result.nfe}" in shown
    )
    assert "seconds=" in shown and "Step(" not in shown and len(shown) < 160
    update = list(model.stream([PROMPT]))[-1]
    assert (
        len(repr(update)) < 320
        and f"nfe={update.nfe}, kind='" in repr(update)
        and "finished=True" in repr(update)
    )
    assert "llada, 1.6 M parameters, fp32, on ort" in repr(model)
    assert "tokens=[" in repr(replace(result, text=None)) and len(repr(replace(result, text=None))) < 160


class _Page(HTMLParser):
    """Elements with their titles and texts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.titles, self.styles, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        held = dict(attrs)
        assert set(held) <= {"style", "title"}, held
        self.tags.append(tag)
        self.titles.append(held.get("title"))
        self.styles.append(held.get("style", ""))

    def handle_data(self, data):
        self.text += data


def test_a_notebook_shows_blocks_and_confidences(model):
    result = model.generate([PROMPT])[0]
    page = _Page(result._repr_html_())
    assert set(page.tags) == {"div", "span"} and page.text.startswith(
        "".join(result.pieces[: result.num_useful])
    )
    titles = [title for title in page.titles if title and title.startswith("forward")]
    made = {
        p: (n, c)
        for n, step in enumerate(result.trace, 1)
        for p, c in zip(step.positions, step.confidence, strict=True)
    }
    first = len(result.canvas) - len(result.tokens)
    expected = [
        f"forward {made[first + i][0]}, confidence {made[first + i][1]:.3f}" for i in range(result.num_useful)
    ]
    assert titles == expected
    shown = [title for title in page.titles if title and title.startswith("block")]
    assert len(shown) == sum(start < first + result.num_useful for start, _ in result.blocks) > 1
    colours = {style.split("background: ")[1] for style in page.styles if "background" in style}
    assert len(colours) > 1 and all(
        colour.endswith("0.3)") for colour in colours
    )  # see-through, over a light or a dark page
    assert all(
        "url(" not in style and "color: inherit" in style for style in page.styles if "background" in style
    )


def test_a_notebook_runs_nothing_that_a_model_writes(model):
    result = model.generate([PROMPT])[0]
    attacks = [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "</span></div><style>",
        "&lt;b&gt;",
        "\x00\x1b[0m\u202e",
    ]
    pieces = [attacks[i % len(attacks)] for i in range(len(result.pieces))]
    page = _Page(replace(result, pieces=pieces)._repr_html_())
    assert set(page.tags) == {"div", "span"}
    assert page.text.startswith("".join(attacks[:4]) + "\ufffd\ufffd[0m\ufffd")
    assert set(_Page(replace(result, text=attacks[0], pieces=[])._repr_html_()).tags) == {"div"}
    assert attacks[0] in _Page(replace(result, text=attacks[0], pieces=[])._repr_html_()).text


def test_a_notebook_shows_filled_gaps_and_what_is_not_known(model):
    template = (
        '<|user|>clean hall with mop<|assistant|>[{"do": "clean", "in": "<|mdm_mask|>", "with": '
        '"<|mdm_mask|>"}]'
    )
    filled = model.generate([template], rt.GenerationConfig(gen_length=0, infill=True), raw=True)[0]
    page = _Page(filled._repr_html_())
    assert (
        '"in": "hall", "with": "mop"' in page.text
        and sum(bool(t) and "confidence" in t for t in page.titles) == 2
    )
    result = model.generate([PROMPT])[0]
    blind = replace(
        result, trace=[Step(s.kind, s.start, s.length, s.positions, s.tokens) for s in result.trace]
    )
    assert "forward 1, confidence not known" in blind._repr_html_() and "hsla" not in blind._repr_html_()
    joined = model.generate([PROMPT], rt.GenerationConfig(speculate=4))[0]
    assert ("step 2," in joined._repr_html_()) == (joined.nfe < len(joined.trace))


def test_traces_in_json_have_confidences(demo_artifact, capsys):
    assert cli.main(["generate", str(demo_artifact), PROMPT, "--json", "--threads", "1"]) == 0
    (made,) = json.loads(capsys.readouterr().out)
    for _, _, _, positions, tokens, confidence in made["trace"]:
        assert len(positions) == len(tokens) == len(confidence) and all(
            0 < value <= 1 for value in confidence
        )


def test_results_of_replay_have_confidences_and_are_still_compared(demo_artifact, model, tmp_path, capsys):
    """As expectations, steps with and without confidences say the same; recorded cases are written as
    ever."""
    recorded, results, again = tmp_path / "cases.json", tmp_path / "results.json", tmp_path / "again.json"
    options = ["--count", "3", "--threads", "1"]
    assert cli.main(["replay", str(demo_artifact), "--record", str(recorded), *options]) == 0
    held = json.loads(recorded.read_text())["cases"]
    assert {len(step) for case in held for step in case["trace"]} == {5}
    pair = {**held[0], "id": "pair", "prompt": [held[0]["prompt"][0], held[1]["prompt"][0]]}
    for key in ("output", "trace", "nfe"):
        pair.pop(key)
    recorded.write_text(json.dumps({"cases": [*held, pair]}))
    assert (
        cli.main(["replay", str(demo_artifact), str(recorded), "--output", str(results), "--threads", "1"])
        == 0
    )
    made = json.loads(results.read_text())["cases"]
    assert all(
        len(step) == 6 and len(step[5]) == len(step[3]) and all(step[5])
        for case in made
        for step in case["trace"]
    )
    again.write_text(
        json.dumps({"cases": [{**case, **result} for case, result in zip([*held, pair], made, strict=True)]})
    )
    assert cli.main(["replay", str(demo_artifact), str(again), "--threads", "1"]) == 0
    assert "4 with expectations, 0 mismatches" in capsys.readouterr().out
    case = recordings.read_cases(again)[0]
    assert replay.follow(model.backend, case, 0.0).mismatch is None
    case["trace"][1][4][0] += 1
    assert replay.compare(case, replay.replay(model.backend, case)) is not None
    case["trace"][1][5] = "sure"
    with pytest.raises(rt.DllmError, match="trace is"):
        replay.replay(model.backend, case)
