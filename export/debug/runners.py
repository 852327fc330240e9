"""Runners for Polygraphy's Comparator: any backend of ours (ONNX Runtime, TensorRT, the PyTorch reference)
beside its own runners. Needs the `debug` extra.

    from polygraphy.comparator import Comparator Comparator.run([BackendRunner(backend, "refine"),
    BackendRunner(reference, "refine")], data_loader=feeds(calls, "refine", "fp32"))

A feed holds every input of a graph of the contract, caches too; what a runner gives are all of its outputs.
Feeds are copied on the way in and out: one goes to all runners.
"""

from __future__ import annotations

import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from trt_runtime.artifact import contract
from trt_runtime.decoding.backend import Backend

from . import kit
from .record import Array, RecordedCall, allowed, decode, replayed

_KINDS = {"int64": np.int64, "float32": np.float32, "float16": np.float16}


class BackendRunner(BaseRunner):  # type: ignore[misc]
    """A backend that is open, in a role. want_logits: whether logits are among the outputs."""

    def __init__(
        self, backend: Backend, role: str, name: str | None = None, *, want_logits: bool = False
    ) -> None:
        super().__init__(name=name or backend.name, prefix=f"dllm-trt-{backend.name}")
        self.backend, self.role, self.want_logits = backend, role, want_logits

    def activate_impl(self) -> None:
        """The backend is open already."""

    def deactivate_impl(self) -> None:
        """It stays open: its owner closes it."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, element types and shapes (-1 where free); bf16 caches come in float32."""
        metadata = TensorMetadata()
        for spec in contract.inputs(self.role, self.backend.manifest.dims):
            metadata.add(
                spec.name,
                _KINDS.get(spec.dtype, np.float32),
                [axis if isinstance(axis, int) else -1 for axis in spec.axes],
            )
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> OrderedDict[str, Array]:
        """One call over a cache of its own."""
        begin = time.perf_counter()
        outputs = replayed(
            self.backend,
            self.role,
            {name: np.array(value) for name, value in feed_dict.items()},
            want_logits=self.want_logits,
        )
        self.inference_time = (
            time.perf_counter() - begin
        )  # with the caches' way in and out: a time for debugging, not for a table
        return OrderedDict(outputs)


def feeds(calls: Iterable[RecordedCall], role: str, dtype: str) -> list[dict[str, Array]]:
    """What runners of a role are given: the calls' inputs, caches in the dtype of the graph (of bf16 in
    float32)."""
    kind = np.float16 if dtype == "fp16" else np.float32
    return [
        {
            name: value.astype(kind) if name.startswith("cache_") else value
            for name, value in call.inputs.items()
        }
        for call in calls
        if call.role == role
    ]


def differences(
    runners: list[BaseRunner], given: list[dict[str, Array]]
) -> Iterator[tuple[str, str, int, dict[str, float]]]:
    """Run the runners over the same feeds, and compare each with the first one: its name, the first one's,
    the number of the feed, and the largest difference of each output. Tokens are compared by whether they
    differ."""
    with G_LOGGER.verbosity(G_LOGGER.ERROR):  # it tells of every tensor on standard output
        results = Comparator.run(runners, data_loader=given)
    first, *others = results.items()
    for name, outputs in others:
        for number, (mine, theirs) in enumerate(zip(outputs, first[1], strict=True)):
            pairs = ((key, np.asarray(mine[key]), np.asarray(theirs[key])) for key in theirs if key in mine)
            yield (
                name,
                first[0],
                number,
                {
                    key: float((a != b).mean())
                    if key == "token"
                    else float(np.abs(a.astype(np.float64) - b).max())
                    for key, a, b in pairs
                },
            )


def stage(artifact: Path, engine: Backend, reference: Backend) -> tuple[bool, dict[str, Any], str]:
    """Recorded calls of a decoding, both graphs, on three runners: the PyTorch reference, the artifact as our
    backend runs it, and the artifact's graphs as Polygraphy's own OnnxrtRunner runs them. Whether all outputs
    agree as far as they must, what was measured, and the first that does not."""
    manifest, dtype = engine.manifest, engine.manifest.model.dtype
    calls = decode(engine, kit.prompts(manifest), kit.decoding(manifest), 3)
    worst: dict[str, tuple[float, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        kit.write_graphs(artifact, manifest, calls[0].capacity, Path(temporary), link=False)
        for role in contract.ROLES:
            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            session = onnxruntime.InferenceSession(
                str(Path(temporary) / f"{role}.onnx"), options, providers=["CPUExecutionProvider"]
            )
            want_logits = manifest.head == contract.LOGITS
            runners = [
                BackendRunner(reference, role, "PyTorch", want_logits=want_logits),
                BackendRunner(engine, role, "dllm-trt", want_logits=want_logits),
                OnnxrtRunner(session, name="OnnxrtRunner"),
            ]
            limits = allowed([call for call in calls if call.role == role], dtype)
            for name, _, number, difference in differences(runners, feeds(calls, role, dtype)):
                for key, value in difference.items():
                    if key != "token" and value / limits[key] >= worst.get(name, (-1.0, ""))[0]:
                        worst[name] = (value / limits[key], f"{key} of {role} call {number}")
    measured: dict[str, Any] = {
        "calls": len(calls),
        **{f"{name}, share of what is allowed": value for name, (value, _) in worst.items()},
    }
    failed = [
        f"{name}: {where} is {value:.3g} times as far from PyTorch as it may be"
        for name, (value, where) in worst.items()
        if not value <= 1
    ]
    return not failed, measured, failed[0] if failed else ""
