"""A policy from outside, in one file: the command line, the server's schema, tune and the manifest's tuned
options know it by its declaration."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest
from demo import PROMPT
from outside import OUTSIDE, added, command

import trt_runtime as rt
from trt_runtime.decoding.config import GenerationConfig, configured
from trt_runtime.decoding.policies.base import Policy
from trt_runtime.decoding.policies.options import LOOP_OPTIONS, option
from trt_runtime.decoding.policies.registry import POLICIES, options
from trt_runtime.errors import DllmError

CLI = ("-m", "trt_runtime.cli")


@pytest.fixture
def capped(monkeypatch):
    monkeypatch.syspath_prepend(str(OUTSIDE))
    from outside_policy import Capped

    with added(POLICIES, Capped, "capped"):
        yield Capped
    sys.modules.pop("outside_policy")


def test_it_decodes_and_its_options_are_checked(model, capped):
    few, many = (model.generate([PROMPT], GenerationConfig(policy="capped", cap=cap))[0] for cap in (1, 8))
    assert few.nfe > many.nfe and all(len(step.positions) == 1 for step in few.trace)
    assert max(len(step.positions) for step in many.trace) <= 8
    assert GenerationConfig(policy="capped").cap == 4
    for cap, said in (
        (0, "cap is 0, expected from 1"),
        (2.5, "cap is 2.5, expected int"),
        (True, "cap is True, expected int"),
    ):
        with pytest.raises(DllmError, match=said):
            GenerationConfig(policy="capped", cap=cap).resolved(model.manifest)


def test_options_of_another_policy_are_refused_and_tuned_ones_are_taken(model, capped):
    manifest = model.manifest
    with pytest.raises(DllmError, match="cap needs policy capped, got policy 'threshold'"):
        configured({"cap": 2}, manifest)
    tuned = replace(manifest, decoding=replace(manifest.decoding, tuned={"policy": "capped", "cap": 2}))
    assert configured({}, tuned).cap == 2
    assert configured({"policy": "factor"}, tuned).policy_options == {}


@pytest.mark.parametrize("how", ["an installed package", "a module in the current directory"])
def test_the_command_line_has_it(demo_artifact, how):
    installed = how == "an installed package"
    name = "capped" if installed else "outside_policy:Capped"
    where = {"installed": installed, "cwd": OUTSIDE}
    done = command(*CLI, "generate", demo_artifact, PROMPT, "--policy", name, "--cap", 1, "--json", **where)
    assert done.returncode == 0, done.stderr
    assert all(len(step[3]) == 1 for step in json.loads(done.stdout)[0]["trace"])
    said = command(*CLI, "generate", "--policy", name, "--help", **where).stdout
    assert "most positions that a forward commits; for capped (default 4, from 1)" in " ".join(said.split())
    wrong = command(*CLI, "generate", demo_artifact, PROMPT, "--policy", name, "--cap", 0, **where)
    assert (wrong.returncode, wrong.stderr) == (1, "error: cap is 0, expected from 1.\n")


def test_a_module_that_is_not_there_is_one_line(demo_artifact):
    done = command(*CLI, "generate", demo_artifact, PROMPT, "--policy", "nowhere:Capped")
    assert done.returncode == 1 and done.stderr.startswith(
        "error: the policy 'nowhere:Capped' cannot be imported (No module named"
    )


def test_a_server_has_it_and_imports_nothing_for_a_client(demo_artifact):
    script = (
        "from trt_runtime.model import load; from trt_runtime.serving.requests import ChatRequest, OPTIONS; "
        "import sys\n"
        f"manifest = load({str(demo_artifact)!r}, threads=1).manifest\n"
        "chat = {'messages': [{'role': 'user', 'content': 'x'}]}\n"
        "print(ChatRequest(**chat, policy='capped', cap=2).config(manifest).cap, 'cap' in OPTIONS)\n"
        "for name in ('outside_policy:Capped', 'this:s'):\n"
        "    try:\n        ChatRequest(**chat, policy=name).config(manifest)\n"
        "    except Exception as error:\n        print(type(error).__name__, str(error)[:40])\n"
        "print('this' in sys.modules)"
    )
    said = command("-c", script).stdout.splitlines()
    assert (said[0], said[-1]) == ("2 True", "False")
    assert len(said) == 4 and all(line.startswith("DllmError unknown policy") for line in said[1:-1]), said


def test_tune_tries_it(demo_artifact, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    done = command(*CLI, "tune", demo_artifact, "--data", tmp_path / "data.jsonl", "--count", 1, "--json")
    assert done.returncode == 0, done.stderr
    tried = [trial["options"] for trial in json.loads(done.stdout)["trials"]]
    assert {2, 8} <= {trial["cap"] for trial in tried if trial.get("policy") == "capped"}


def test_names_and_options_are_one_mans_only(capped):
    @dataclass(frozen=True)
    class Other(Policy):
        name: ClassVar[str] = "capped"

        def select(self, stats, is_masked, state):
            return is_masked

    with pytest.raises(DllmError, match="the policy 'capped' is defined twice"):
        POLICIES.register(Other)

    @dataclass(frozen=True)
    class Different(Other):
        name: ClassVar[str] = "different"
        threshold: float = option(0.5, help="another default")

    with pytest.raises(
        DllmError, match=r"declares threshold with the default 0.5, but other policies declare it with 0.9"
    ):
        POLICIES.register(Different)

    @dataclass(frozen=True)
    class Taken(Other):
        name: ClassVar[str] = "taken"
        seed: int = option(1, help="what a generation has")

    with pytest.raises(DllmError, match="declares seed, which is already an option of every generation"):
        POLICIES.register(Taken)
    with pytest.raises(DllmError, match="is not a policy: expected a class that extends Policy"):
        POLICIES.register(int, "int")


def test_the_loop_has_its_own_options():
    assert {item.name for item in fields(GenerationConfig)} == LOOP_OPTIONS
    assert not LOOP_OPTIONS & set(options())
    with pytest.raises(TypeError, match="has no option 'tresholdd'"):
        rt.GenerationConfig(tresholdd=1.0)
