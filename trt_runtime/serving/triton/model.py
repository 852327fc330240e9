"""model.py of a Triton Inference Server model repository: the same worker behind Triton's Python backend,
decoupled.

`dllm-trt triton-repo` copies this file. Input PROMPT (a text); optional OPTIONS (JSON: the fields of
GenerationConfig). Responses: TEXT, what was finished since the last one, FINISHED, and NFE; the last one
carries Triton's final flag.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from trt_runtime.decoding.config import configured
from trt_runtime.model import Update, load
from trt_runtime.serving.metrics import Metrics
from trt_runtime.serving.room import longest_of
from trt_runtime.serving.worker import Event, Job, Worker


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the artifact next to this file, on the backend that config.pbtxt names."""
        parameters = json.loads(args["model_config"])["parameters"]
        settings = json.loads(parameters["dllm"]["string_value"])
        path = f"{args['model_repository']}/{args['model_version']}/artifact"
        self.model = load(path, settings["backend"], **settings["options"])
        longest = longest_of(self.model, settings["slots"], settings["max_length"])
        self.worker = Worker(
            self.model, Metrics(), slots=settings["slots"], max_length=longest, most_queued=1 << 20
        )
        self.worker.start()

    def execute(self, requests: list[Any]) -> None:
        """Queue each request; its responses are sent from the worker's thread as blocks are finished."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, sender)
            except Exception as error:  # of one request: the others go on
                _fail(sender, error)

    def finalize(self) -> None:
        """End the worker; open requests get an error."""
        self.worker.stop()
        self.model.close()

    def _submit(self, request: Any, sender: Any) -> None:
        prompt = _text(pb_utils.get_input_tensor_by_name(request, "PROMPT"))
        options = json.loads(_text(pb_utils.get_input_tensor_by_name(request, "OPTIONS")) or "{}")
        row = self.model.sequence(prompt, configured(options, self.model.manifest))
        sent = ""

        def deliver(event: Event) -> None:
            nonlocal sent
            if isinstance(event, Update):
                text = event.committed or ""
                text = text if event.finished else text.rstrip("\ufffd")
                if event.finished or len(text) > len(sent):
                    _send(sender, text[len(sent) :], event)
                    sent = text
            elif event is not None:
                _fail(sender, event)
            else:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

        job = Job(row, deliver, wants_updates=True)
        self.worker.submit([job])


def _text(tensor: Any) -> str:
    if tensor is None:
        return ""
    value = tensor.as_numpy().reshape(-1)[0]
    return value.decode() if isinstance(value, bytes) else str(value)


def _send(sender: Any, text: str, update: Update) -> None:
    tensors = [
        pb_utils.Tensor("TEXT", np.array([text.encode()], np.object_)),
        pb_utils.Tensor("FINISHED", np.array([update.finished])),
        pb_utils.Tensor("NFE", np.array([update.nfe], np.int32)),
    ]
    sender.send(pb_utils.InferenceResponse(output_tensors=tensors))


def _fail(sender: Any, error: Exception) -> None:
    response = pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
