"""A backend from outside, in one file: a row in the table of backends."""

from __future__ import annotations

import json
import sys

import pytest
from demo import PROMPT
from outside import OUTSIDE, added, command

import trt_runtime as rt
from trt_runtime import backends
from trt_runtime.errors import DllmError

CLI = ("-m", "trt_runtime.cli")


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.syspath_prepend(str(OUTSIDE))
    from outside_backend import SPEC

    with added(backends.BACKENDS, SPEC, "counting"):
        yield SPEC
    sys.modules.pop("outside_backend")


def test_it_opens_and_decodes_as_the_one_it_is_made_of(model, demo_artifact, counting):
    with rt.load(demo_artifact, "counting", threads=1) as other:
        assert other.generate([PROMPT])[0].tokens == model.generate([PROMPT])[0].tokens
        counts = dict(other.backend.counts)
    (result,) = model.generate([PROMPT])
    assert counts == {"prefix": result.prefix_passes, "refine": result.refine_steps}
    with pytest.raises(
        DllmError, match="unknown option of the backend 'counting' 'thread': did you mean 'threads'"
    ):
        rt.load(demo_artifact, "counting", thread=1)


@pytest.mark.parametrize(("installed", "name"), [(True, "counting"), (False, "outside_backend:SPEC")])
def test_the_command_line_has_it(demo_artifact, installed, name):
    where = {"installed": installed, "cwd": OUTSIDE}
    done = command(
        *CLI, "generate", demo_artifact, PROMPT, "--backend", name, "--threads", 1, "--json", **where
    )
    assert done.returncode == 0 and json.loads(done.stdout)[0]["nfe"] > 1, done.stderr
    wrong = command(*CLI, "generate", demo_artifact, PROMPT, "--backend", name, "--engines", "x", **where)
    assert wrong.returncode == 1 and "--engines needs --backend tensorrt or tensorrt-rtx, got" in wrong.stderr


def test_forecasts_know_its_layout(demo_artifact):
    done = command(*CLI, "plan", demo_artifact, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert "counting, one session" in json.loads(done.stdout)["memory"]


def test_every_backend_says_where_it_runs(counting):
    spec = backends.BACKENDS.find
    assert [spec(name).is_on_cpu({}) for name in backends.names()] == [
        name not in ("tensorrt", "tensorrt-rtx") for name in backends.names()
    ]
    assert not spec("ort").is_on_cpu({"device": "cuda"}) and spec("ort").is_on_cpu({"device": None})
    assert spec("tensorrt").device_of({}) == "0" and spec("tensorrt").device_of({"device": 1}) == "1"


def test_a_former_name_of_an_option_is_taken(demo_artifact):
    """As Triton repositories of 0.1 have it."""
    with rt.load(demo_artifact, "ort", threads=1, steps_per_look=4) as model:
        assert model.backend.steps_per_sync == model.backend.steps_per_look == 4
