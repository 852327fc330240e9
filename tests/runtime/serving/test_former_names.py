"""What release 0.1 wrote and imported still works: a Triton model repository, and the former names of modules
and options."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading

import numpy as np
import pytest
import triton_python_backend_utils as backend_utils
from demo import PROMPT
from places import ROOT

pytest.importorskip("prometheus_client")
from trt_runtime.model import load


class Request:
    """One request to Triton's Python backend, and its responses."""

    def __init__(self, prompt):
        self.inputs = {"PROMPT": backend_utils.Tensor("PROMPT", np.array([prompt.encode()], np.object_))}
        self.text, self.error, self.done = "", None, threading.Event()

    def get_response_sender(self):
        return self

    def send(self, response=None, flags=0):
        if response is not None:
            self.error = response.error
            self.text += response.tensors["TEXT"][0].decode() if "TEXT" in response.tensors else ""
        if flags == backend_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.done.set()


def test_a_model_repository_of_0_1_is_served(demo_artifact, tmp_path):
    """Its model.py imports trt_runtime.config, trt_runtime.server.metrics, .room and .worker; its settings
    say steps_per_look."""
    version = tmp_path / "demo" / "1"
    shutil.copytree(demo_artifact, version / "artifact")
    shutil.copyfile(ROOT / "tests" / "data" / "triton-0.1" / "model.py", version / "model.py")
    spec = importlib.util.spec_from_file_location("triton_model_of_0_1", version / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = {
        "backend": "ort",
        "options": {"threads": 1, "steps_per_look": 2},
        "slots": 2,
        "max_length": 192,
    }
    config = {"parameters": {"dllm": {"string_value": json.dumps(settings)}}}
    served = module.TritonPythonModel()
    served.initialize(
        {"model_config": json.dumps(config), "model_repository": str(tmp_path / "demo"), "model_version": "1"}
    )
    try:
        assert served.model.backend.steps_per_sync == 2
        request = Request(PROMPT)
        served.execute([request])
        assert request.done.wait(60) and request.error is None
    finally:
        served.finalize()
    with load(demo_artifact, threads=1) as model:
        assert request.text == model.generate([PROMPT])[0].text


def test_former_modules_have_the_same_objects():
    import trt_runtime.config
    import trt_runtime.server.metrics
    import trt_runtime.server.room
    import trt_runtime.server.worker
    from trt_runtime.decoding import config
    from trt_runtime.model import Result, Update
    from trt_runtime.result import Result as ResultNow
    from trt_runtime.serving import metrics, room, worker

    assert trt_runtime.config.GenerationConfig is config.GenerationConfig
    assert trt_runtime.config.configured is config.configured
    assert trt_runtime.server.metrics.Metrics is metrics.Metrics
    assert trt_runtime.server.room.longest_of is room.longest_of
    assert trt_runtime.server.worker.Job is worker.Job and trt_runtime.server.worker.Worker is worker.Worker
    assert Result is ResultNow and Update.__module__ == "trt_runtime.result"
