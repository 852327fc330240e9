"""--json: every command prints one strict JSON value and nothing else."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
from demo import PROMPT
from messages import is_one_line
from places import DEMO, ROOT

from export import cli as exporter
from trt_runtime.cli import main as cli
from trt_runtime.cli import parser as cli_parser
from trt_runtime.decoding.policies.registry import POLICIES


def _strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_every_report_is_json_and_nothing_else(demo_artifact, tmp_path, capsys):
    prompts, data = tmp_path / "prompts.txt", tmp_path / "data.txt"
    prompts.write_text(f"{PROMPT}\n")
    data.write_text("clean hall with mop\n")
    artifact = shutil.copytree(demo_artifact, tmp_path / "artifact")
    commands = {
        "info": ([artifact], "model"),
        "plan": ([artifact], "forecasts"),
        "doctor": ([], "findings"),
        "generate": ([artifact, PROMPT], None),
        "replay": ([artifact, DEMO / "cases.json"], "mismatches"),
        "replay --record": ([artifact, "--record", tmp_path / "new.json", "--count", "2"], "recorded"),
        "bench": (
            [artifact, "--prompts", prompts, "--repeats", "1", "--variants", "dual", "--gen-length", "16"],
            "rows",
        ),
        "verify": ([artifact], "passed"),
        "verify --layers": ([artifact, "--layers"], "layers"),
    }
    for name, (words, key) in commands.items():
        status = cli.main([name.split(" ", maxsplit=1)[0], *map(str, words), "--json"])
        printed = capsys.readouterr()
        value = _strict(printed.out)
        assert status == 0 or name == "doctor", (name, printed.err)
        assert key is None or key in value or key == "forecasts", name
    assert exporter.main(["--model", "llada", "--out", str(tmp_path / "b"), "--verify", "yes", "--json"]) == 0
    printed = capsys.readouterr()
    made = _strict(printed.out)
    assert made["parameters"] > 1e6 and made["verified"]["passed"] and "verifying" in printed.err
    assert (
        exporter.main(["--model", "llada", "--out", str(tmp_path / "c"), "--verify", "no", "--json", "-q"])
        == 0
    )
    assert capsys.readouterr().err == ""


def test_tune_reports_json(demo_artifact, tmp_path, capsys, monkeypatch):
    from trt_runtime.measure import tune

    monkeypatch.setattr(tune, "_THRESHOLDS", (0.9,))
    for policy in POLICIES.all():
        monkeypatch.setattr(policy, "trials", ())
    monkeypatch.setattr(tune, "_ROUNDS", 1)
    (tmp_path / "data.txt").write_text("clean hall with mop\n")
    words = ["tune", str(demo_artifact), "--data", str(tmp_path / "data.txt"), "--json"]
    assert cli.main(words) == 0
    printed = capsys.readouterr()
    assert _strict(printed.out)["trials"] and "% right" in printed.err
    assert cli.main([*words, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_build_reports_json(tmp_path, capsys, monkeypatch):
    from trt_runtime.backends.tensorrt import store

    def built(artifact, out, config, note):
        out.mkdir()
        print("what a library says on standard output")
        (out / f"x{store.SUFFIX}").write_bytes(b"123")
        return out

    monkeypatch.setattr(store, "build", built)
    assert cli.main(["build", "x", "--out", str(tmp_path / "engines"), "--json"]) == 0
    assert _strict(capsys.readouterr().out)["engines"] == [
        {"file": str(tmp_path / "engines" / f"x{store.SUFFIX}"), "bytes": 3}
    ]


def test_json_is_strict_and_an_error_prints_none(demo_artifact, capsys):
    held = {"a": math.nan, "b": [np.float32(1), math.inf], "c": ROOT, "d": {1: True}, "e": np.int64(3)}
    assert _strict(cli_parser.as_json(held)) == {
        "a": None,
        "b": [1.0, None],
        "c": str(ROOT),
        "d": {"1": True},
        "e": 3,
    }
    assert cli.main(["info", str(demo_artifact / "none"), "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and is_one_line(printed.err)
