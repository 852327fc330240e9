"""Tuning: what is right, what is within the bound, what is chosen, and that what was noted holds where
nothing else is given."""

from __future__ import annotations

import json
import shutil

import demo_prompts
import demo_task
import pytest

from trt_runtime.artifact.manifest import load as load_manifest
from trt_runtime.cli import main as cli
from trt_runtime.decoding.config import GenerationConfig, configured
from trt_runtime.decoding.policies.registry import POLICIES
from trt_runtime.errors import DllmError
from trt_runtime.measure import examples, tune
from trt_runtime.model import Model


@pytest.fixture
def data(tmp_path):
    lines = [
        json.dumps(
            {"prompt": e.prompt, "answers": [json.dumps(plan) for plan in demo_task.spellings(e.plan)]}
        )
        for e in demo_prompts.held_out(6)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "data.jsonl"


@pytest.fixture
def small(monkeypatch):
    """Fewer trials of each kind."""
    monkeypatch.setattr(tune, "_THRESHOLDS", (0.5, 0.9))
    few = {"eb": ({"gamma": 0.05},), "prophet": ({},)}
    for policy in POLICIES.all():
        monkeypatch.setattr(policy, "trials", few.get(policy.name, ()))
    monkeypatch.setattr(tune, "_ROUNDS", 1)


def test_the_choice_is_the_fastest_within_the_bound_and_holds(
    model, data, small, tmp_path, demo_artifact, capsys
):
    artifact = tmp_path / "artifact"
    shutil.copytree(demo_artifact, artifact)
    command = [
        "tune",
        str(artifact),
        "--data",
        str(data),
        "--match",
        "json",
        "--max-drop",
        "0",
        "--threads",
        "1",
        "--write",
        "--output",
        str(tmp_path / "out.json"),
    ]
    assert cli.main(command) == 0
    report, printed = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert (
        report["baseline_right"] >= 5
        and report["right"] >= report["baseline_right"]
        and report["speedup"] > 1.2
    )
    wrong = [trial for trial in report["trials"] if trial["right"] < report["baseline_right"]]
    assert wrong and report["chosen"]["options"] not in [trial["options"] for trial in wrong]
    assert (
        {"policy", "cache", "block_length"} <= set(report["options"])
        and "times the baseline" in printed
        and "recorded in" in printed
    )
    assert {trial["options"]["policy"] for trial in report["trials"]} == {"threshold", "eb", "prophet"}
    held = load_manifest(artifact, check_hashes=True)
    assert held.decoding.tuned == report["options"]
    assert cli.main(["info", str(artifact)]) == 0
    assert (
        f"\ntuned      cache dual, block_length {report['options']['block_length']}, policy "
        in capsys.readouterr().out
    )
    tuned = Model(artifact, model.backend)
    tuned.manifest = held
    prompt = demo_prompts.held_out(1)[0].prompt
    assert (
        tuned.generate([prompt])[0].trace
        == model.generate([prompt], GenerationConfig(**report["options"]))[0].trace
    )
    block = report["options"]["block_length"]  # was not given, and stays
    assert (
        cli.main(["generate", str(artifact), prompt, "--policy", "fixed", "--cache", "none", "--json"]) == 0
    )
    assert (
        json.loads(capsys.readouterr().out)[0]["nfe"]
        == model.generate([prompt], GenerationConfig(policy="fixed", cache="none", block_length=block))[0].nfe
    )


def test_the_baseline_is_kept_where_nothing_within_the_bound_is_faster(
    small, monkeypatch, tmp_path, demo_artifact, capsys
):
    monkeypatch.setattr(tune.Tuner, "is_within", lambda self, trial: False)
    (tmp_path / "prompts.txt").write_text("clean hall with mop\n")
    assert (
        cli.main(["tune", str(demo_artifact), "--data", str(tmp_path / "prompts.txt"), "--threads", "1"]) == 0
    )
    assert (
        "nothing within 1 points is faster than the baseline: 1 of 1 right: --cache dual --policy fixed"
        in capsys.readouterr().out
    )


def test_without_answers_the_baseline_is_right(model, tmp_path, small):
    (tmp_path / "prompts.txt").write_text("clean hall with mop\n\nfind red keys in attic\n")
    report = tune.run(
        model,
        examples.read(tmp_path / "prompts.txt"),
        GenerationConfig(),
        max_drop=100,
        match="exact",
        tell=lambda line: None,
    )
    assert report["baseline_right"] == report["examples"] == 2


@pytest.mark.parametrize(
    ("answer", "right", "match", "expected"),
    [
        ("a ", "a", "exact", True),
        ('{"a":1}', '{"a": 1}', "exact", False),
        ('[{"b": 2, "a":1}]', '[{"a": 1, "b": 2}]', "json", True),
        ('{"a": 1', '{"a": 1}', "json", False),
        ('{"a": 2, "a": 1}', '{"a": 1}', "json", False),
        ("[1]", "[2]", "json", False),
    ],
)
def test_answers_are_compared_as_texts_or_as_json(answer, right, match, expected):
    assert examples.is_right(answer, examples.Example("", (right,)), match) == expected


def test_what_is_given_goes_before_what_was_tuned(golden_artifact):
    manifest = load_manifest(golden_artifact)
    object.__setattr__(
        manifest.decoding,
        "tuned",
        {"policy": "eb", "gamma": 0.3, "cache": "prefix", "refresh_every": 2, "block_length": 16},
    )
    assert configured({}, manifest) == GenerationConfig(
        policy="eb", gamma=0.3, cache="prefix", refresh_every=2, block_length=16
    )
    assert (
        configured({"gamma": 0.1}, manifest).gamma == 0.1
        and configured({"policy": "eb"}, manifest).gamma == 0.3
    )
    other = configured({"policy": "fixed", "block_length": 4}, manifest)
    assert (other.policy, other.gamma, other.cache, other.block_length) == (
        "fixed",
        GenerationConfig().gamma,
        "prefix",
        4,
    )
    assert configured({"threshold": 0.7}, manifest).policy == "threshold"
    assert configured({"cache": "none"}, manifest).refresh_every == 1
    object.__setattr__(manifest.decoding, "tuned", {"magic": 1})
    with pytest.raises(DllmError, match="'magic', which this version does not support"):
        configured({}, manifest)


def test_wrong_use_is_one_line(demo_artifact, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": 5}\n')
    (tmp_path / "broken.jsonl").write_text('{"prompt"\n')
    (tmp_path / "empty.txt").write_text("\n")
    for name, more, said in (
        ("nowhere", [], "cannot be read"),
        ("bad.jsonl", [], "line 1: expected"),
        ("broken.jsonl", [], "not valid JSON"),
        ("empty.txt", [], "contains no prompt"),
        ("bad.jsonl", ["--max-drop", "-1"], "--max-drop is -1"),
        ("bad.jsonl", ["--match", "jsn"], "did you mean 'json'"),
    ):
        assert cli.main(["tune", str(demo_artifact), "--data", str(tmp_path / name), *more]) == 1
        assert said in capsys.readouterr().err
