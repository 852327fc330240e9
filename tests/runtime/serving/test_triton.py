"""A Triton model repository, driven as Triton's Python backend drives it, over a stand-in for its module."""

from __future__ import annotations

import importlib.util
import json
import re
import threading

import numpy as np
import pytest
import triton_python_backend_utils as backend_utils

pytest.importorskip("prometheus_client")
from trt_runtime.cli import main as cli
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.model import load

PROMPTS = [
    "clean hall with mop",
    "take red cups from kitchen to garage, then hand blue pens to Mia, and clean hall with mop",
]


class Request:
    """A request and what was sent in answer to it. Nothing may come after the final flag."""

    def __init__(self, prompt, **options):
        texts = {"PROMPT": prompt} | ({"OPTIONS": json.dumps(options)} if options else {})
        self.inputs = {
            name: backend_utils.Tensor(name, np.array([text.encode()], np.object_))
            for name, text in texts.items()
        }
        self.responses, self.error, self.done = [], None, threading.Event()

    def get_response_sender(self):
        return self

    def send(self, response=None, flags=0):
        assert not self.done.is_set()
        if response is not None:
            self.error = response.error
            self.responses.append(response.tensors)
        if flags == backend_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.done.set()

    @property
    def text(self):
        return "".join(tensors["TEXT"][0].decode() for tensors in self.responses)


@pytest.fixture(scope="module")
def repository(demo_artifact, tmp_path_factory):
    out = tmp_path_factory.mktemp("triton")
    assert (
        cli.main(
            [
                "triton-repo",
                str(demo_artifact),
                str(out),
                "--name",
                "demo",
                "--max-length",
                "192",
                "--threads",
                "1",
            ]
        )
        == 0
    )
    return out / "demo"


@pytest.fixture(scope="module")
def served(repository):
    """The model as Triton opens it: parameters from config.pbtxt, the module by its path."""
    config = (repository / "config.pbtxt").read_text()
    settings = json.loads(re.search(r'string_value: (".*") }', config)[1])
    spec = importlib.util.spec_from_file_location("triton_repository_model", repository / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_repository": str(repository),
            "model_version": "1",
            "model_config": json.dumps({"parameters": {"dllm": {"string_value": settings}}}),
        }
    )
    yield model
    model.finalize()


def test_requests_are_answered_block_by_block(served, demo_artifact):
    oracle, requests = load(demo_artifact, "ort", threads=1), [Request(prompt) for prompt in PROMPTS * 3]
    served.execute(requests)
    for request in requests:
        assert request.done.wait(30)
    for request, prompt in zip(requests, PROMPTS * 3, strict=True):
        (expected,) = oracle.generate([prompt], GenerationConfig())
        assert request.text == expected.text and request.error is None
        assert [bool(tensors["FINISHED"][0]) for tensors in request.responses] == [False] * (
            len(request.responses) - 1
        ) + [True]
        assert request.responses[-1]["NFE"][0] == expected.nfe
    assert len(requests[1].responses) > 3


def test_options_are_honoured_and_bad_requests_answered(served, demo_artifact):
    slow, wrong, unknown = (
        Request(PROMPTS[0], policy="fixed", gen_length=16),
        Request(""),
        Request(PROMPTS[0], speed=9),
    )
    served.execute([slow, wrong, unknown])
    for request in (slow, wrong, unknown):
        assert request.done.wait(30)
    (expected,) = load(demo_artifact, "ort", threads=1).generate(
        [PROMPTS[0]], GenerationConfig(policy="fixed", gen_length=16)
    )
    assert (
        slow.text == expected.text
        and "the prompt is empty" in wrong.error.text
        and "speed" in unknown.error.text
    )


def test_the_configuration_says_what_triton_needs(repository):
    config = (repository / "config.pbtxt").read_text()
    assert (
        'name: "demo"' in config
        and 'backend: "python"' in config
        and "decoupled: true" in config
        and "KIND_CPU" in config
    )
    assert config.count("{") == config.count("}") and config.count("[") == config.count("]")
    assert (repository / "1" / "artifact" / "manifest.json").is_file()


def test_bad_use_is_one_line(demo_artifact, repository, tmp_path, capsys):
    for command in (
        [str(demo_artifact), str(repository.parent), "--name", "demo"],
        [str(tmp_path), str(tmp_path)],
        [str(demo_artifact), str(tmp_path), "--name", "a b"],
        [str(demo_artifact), str(tmp_path), "--name", ""],
        [str(demo_artifact), str(tmp_path), "--slots", "0"],
    ):
        assert cli.main(["triton-repo", *command]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and "already exists" in lines[0] and not list(tmp_path.iterdir())
