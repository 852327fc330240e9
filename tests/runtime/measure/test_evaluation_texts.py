"""Likelihoods of long texts in bounded memory, BOS tokens before texts, and what a model without blocks
fills."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from places import export_quietly
from tiny import write_checkpoint

from export import families
from trt_runtime import load
from trt_runtime.cli import main as cli
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError
from trt_runtime.measure import likelihood
from trt_runtime.model import Model

pytest.importorskip("lm_eval")
from trt_runtime.measure import evaluation
from trt_runtime.measure.harness import MOST_WINDOW


def _asked(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


@pytest.fixture
def calls(monkeypatch):
    """The shape [B, R, V] of the logits, and the rows of the canvas [B, S], of every call that asks for
    logits."""
    from trt_runtime.decoding.backend import Backend

    seen, real = [], Backend.forward

    def forward(self, role, cache, slots, window, *, want_logits=False):
        stats = real(self, role, cache, slots, window, want_logits=want_logits)
        if want_logits:
            seen.append((stats.logits.shape, window.input_ids.shape))
        return stats

    monkeypatch.setattr(Backend, "forward", forward)
    return seen


@pytest.mark.parametrize("fit", [1, 3, 7, 1000])
def test_no_call_holds_more_logits_than_the_bound(golden_artifact, golden_backend, calls, monkeypatch, fit):
    """A sample with more masks than fit is made in pieces; the estimate stays."""
    model, rng = Model(golden_artifact, golden_backend), np.random.default_rng(1)
    context, target = rng.integers(0, 900, 6).tolist(), rng.integers(0, 900, 20).tolist()
    whole = likelihood.estimate(model, context, target, samples=12)
    calls.clear()
    bound = fit * 4 * model.manifest.model.vocab_size
    monkeypatch.setattr(likelihood, "_LOGIT_BYTES", bound)
    made = likelihood.estimate(model, context, target, samples=12)
    assert made.mean == pytest.approx(whole.mean, rel=1e-5) and made.standard_error == pytest.approx(
        whole.standard_error, rel=1e-4
    )
    assert all(4 * np.prod(logits) <= bound for logits, _ in calls)
    assert made.forwards == sum(logits[0] for logits, _ in calls) and (made.forwards > 12) == (fit < 20)


def test_no_call_holds_more_positions_than_the_bound(golden_artifact, golden_backend, calls, monkeypatch):
    """Many samples of a long context: their keys and values would not fit either."""
    model = Model(golden_artifact, golden_backend)
    monkeypatch.setattr(likelihood, "_POSITIONS", 100)
    likelihood.estimate(model, [5] * 30, [6] * 4, samples=16)
    assert {rows for _, rows in calls} == {(2, 34)} and len(calls) == 8
    calls.clear()
    likelihood.estimate(model, [5] * 150, [6] * 4, samples=3)
    assert [rows for _, rows in calls] == [(1, 154)] * 3


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A Dream that claims 131,072 positions, with the demo model's words."""
    from places import DEMO

    folder = tmp_path_factory.mktemp("long")
    size = json.loads((DEMO / "config.json").read_text())["vocab_size"]
    words = json.loads((DEMO / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in words["added_tokens"]}
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    checkpoint = write_checkpoint(
        families.find("dream"),
        folder / "checkpoint",
        model={
            "vocab_size": size,
            "max_position_embeddings": 131072,
            "mask_token_id": ids[config["mask_token"]],
            "eos_token_id": ids[config["eos_token"]],
            "pad_token_id": ids[config["eos_token"]],
            "bos_token_id": ids[config["eos_token"]],
        },
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (DEMO / name).is_file():
            shutil.copy(DEMO / name, checkpoint / name)
    return load(export_quietly(checkpoint, folder / "artifact", head="logits"), threads=1)


def _harness(model, **options):
    return evaluation.Harness(model, GenerationConfig(), batch=2, samples=1, check_greedy=False, **options)


def test_long_texts_go_in_windows_that_are_bounded(long, calls):
    text = "clean hall with mop, then find red keys in attic. " * 600
    count = len(long.tokenizer.encode(text))
    for given, window in ((None, MOST_WINDOW), (50, 50)):
        if given is not None:
            text, count = text[:1000], len(long.tokenizer.encode(text[:1000]))
        harness = _harness(long, max_length=given)
        assert harness.window == window and harness.max_length == (given or 131072)
        calls.clear()
        (total,) = harness.loglikelihood_rolling(_asked((text,)))
        assert max(rows[1] for _, rows in calls) == min(window, count + 1) and total < 0
        assert harness.figures.windows == -(-count // (window - 1)) > 1


def test_rolling_windows_are_printed_and_bounded_by_the_option(demo_artifact, capsys, tmp_path):
    from places import ROOT

    command = [
        "eval",
        str(demo_artifact),
        "--tasks",
        "twin_wikitext",
        "--include-path",
        str(ROOT / "tests/data/tasks"),
        "--limit",
        "1",
        "--mc-samples",
        "1",
    ]
    for given in ([], ["--max-length", "40"]):
        out = tmp_path / "out.json"
        assert cli.main([*command, *given, "--output", str(out)]) == 0
        window = int(given[1]) if given else 256
        assert f"windows of up to {window} tokens (--max-length)" in capsys.readouterr().out
        assert json.loads(out.read_text())["decoding"]["window"] == window
    for wrong, said in (("0", "--max-length is 0"), ("100000", "expected 2 to 256"), ("1", "expected 2 to")):
        assert cli.main([*command, "--max-length", wrong]) == 1 and said in capsys.readouterr().err
    assert (
        cli.main([*command, "--add-bos", "maybe"]) == 1
        and "unknown add_bos 'maybe'" in capsys.readouterr().err
    )


def test_max_length_bounds_prompts(model):
    harness = _harness(model, max_length=100)
    assert len(harness._fitting([5] * 500, 40)) == 60 and harness.figures.truncated == 1
    with pytest.raises(DllmError, match="smaller --gen-length"):
        harness._fitting([5], 100)
    with pytest.raises(DllmError, match="shorter answers, or a larger --max-length"):
        harness._loglikelihood_tokens([(None, [5], [6] * 100)])
    assert harness._config_of({"max_gen_toks": 1024}).gen_length == 50  # half of it is the prompt's


@pytest.fixture
def with_bos(model, demo_artifact, tmp_path):
    """The demo model with a tokenizer that says what is given."""

    def made(**config):
        copy = shutil.copytree(demo_artifact, tmp_path / f"artifact{len(list(tmp_path.iterdir()))}")
        path = copy / "tokenizer" / "tokenizer_config.json"
        held = json.loads(path.read_text()) | config
        path.write_text(json.dumps(held))
        _reseal(copy)
        return load(copy, threads=1)

    return made


def _reseal(artifact):
    """The manifest with the size and hash of a changed file."""
    import hashlib

    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        data = (artifact / name).read_bytes()
        if isinstance(entry, dict):
            entry.update(
                {
                    key: value
                    for key, value in (
                        ("size", len(data)),
                        ("bytes", len(data)),
                        ("sha256", hashlib.sha256(data).hexdigest()),
                    )
                    if key in entry
                }
            )
        else:
            manifest["files"][name] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(manifest))


def test_texts_begin_with_bos_where_the_tokenizer_says_so_or_the_user(with_bos, model):
    bos = model.tokenizer.piece(model.manifest.decoding.eos_token_ids[0])
    told, silent = with_bos(add_bos_token=True, bos_token=bos), with_bos(bos_token=bos)
    first, plain = told.tokenizer.special_id("bos_token"), model.tokenizer.encode("clean hall")
    assert (
        _harness(told).tok_encode("clean hall") == [first, *plain]
        and _harness(silent).tok_encode("clean hall") == plain
    )
    assert (
        _harness(told, add_bos="no").tok_encode("clean hall")
        == plain
        == _harness(told).tok_encode("clean hall", add_special_tokens=False)
    )
    assert _harness(silent, add_bos="yes").tok_encode("clean hall") == [first, *plain]
    assert _harness(told).tok_encode(f"{bos}clean hall")[:2] == [first, plain[0]]  # not twice
    # as the runtime takes plain texts; never before what a chat template wrote
    assert (
        told.encode("clean hall", raw=True) == [first, *plain]
        and silent.encode("clean hall", raw=True) == plain
    )
    chat = [{"role": "user", "content": "clean hall"}]
    assert told.encode(chat) == told.encode("clean hall") == model.encode("clean hall")
    harness = _harness(told)
    assert harness.tok_encode(harness.apply_chat_template(chat)) == model.encode("clean hall")
    # a text without a context stands behind it, a window too, and a prompt that is cut keeps it
    assert (
        _harness(told).prefix_token_id == first
        and len(_harness(told)._fitting([first, *[7] * 400], 96)) == 160
    )
    assert (
        _harness(told)._fitting([first, *[7] * 400], 96)[0] == first
        and _harness(told, add_bos="no")._fitting([first, *[7] * 400], 96)[0] == 7
    )
    assert _harness(told)._encode_pair("clean hall", " with mop") == (
        [first, *plain],
        model.tokenizer.encode("clean hall with mop")[len(plain) :],
    )
    with pytest.raises(DllmError, match="no BOS token"):
        _harness(with_bos(bos_token=None), add_bos="yes")


def test_raw_prompts_of_the_command_and_the_server_begin_with_bos(with_bos, model, capsys):
    import httpx
    from serving import serving

    bos = model.tokenizer.piece(model.manifest.decoding.eos_token_ids[0])
    told = with_bos(add_bos_token=True, bos_token=bos)
    expected = told.generate([told.encode("clean hall with mop", raw=True)], GenerationConfig(gen_length=8))[
        0
    ]
    assert (
        cli.main(["generate", str(told.path), "clean hall with mop", "--raw", "--gen-length", "8", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)[0]["text"] == expected.text
    with serving(told, slots=1) as (url, _):
        answer = httpx.post(
            f"{url}/v1/completions",
            json={"model": "demo", "prompt": "clean hall with mop", "max_tokens": 8},
            timeout=60,
        ).json()
    assert (
        answer["usage"]["prompt_tokens"] == 1 + len(model.tokenizer.encode("clean hall with mop"))
        and answer["choices"][0]["text"] == expected.text
    )


def test_gaps_are_filled_without_an_answer(long, capsys):
    """`generate --infill --gen-length 0` (DreamLM/Dream#73)."""
    mask = long.tokenizer.piece(long.manifest.decoding.mask_token_id)
    for cache in ("none", "prefix", "dual"):
        prompt = f"{mask} hall {mask}{mask} mop"
        words = [
            "generate",
            str(long.path),
            prompt,
            "--raw",
            "--infill",
            "--gen-length",
            "0",
            "--cache",
            cache,
            "--json",
        ]
        assert cli.main(words) == 0
        (made,) = json.loads(capsys.readouterr().out)
        ids = long.tokenizer.encode(prompt)
        result = long.generate([prompt], GenerationConfig(gen_length=0, infill=True, cache=cache), raw=True)[
            0
        ]
        assert (
            made["nfe"] == result.nfe > 0
            and len(result.canvas) == len(ids)
            and long.manifest.decoding.mask_token_id not in result.canvas
        )
        assert all(
            a == b
            for a, b in zip(result.canvas, ids, strict=True)
            if b != long.manifest.decoding.mask_token_id
        )


def test_tokens_beyond_the_tokenizer_are_drawn_and_decoded(long):
    """Ids that only the padded vocabulary of the model has (DreamLM/Dream#54)."""
    unknown = long.tokenizer.max_id + 1
    assert long.text(np.array([unknown, unknown + 7])) == "" and long.piece(unknown) == ""
    results = long.generate(["clean hall with mop"], GenerationConfig(gen_length=32, temperature=3.0, seed=1))
    assert isinstance(results[0].text, str)
