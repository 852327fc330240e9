"""Runners for Polygraphy's Comparator: any of our backends (ONNX Runtime, TensorRT, the PyTorch reference)
next to its own runners. Needs the `debug` extra.

    from polygraphy.comparator import Comparator

    runners = [BackendRunner(backend, "refine"), BackendRunner(reference, "refine")]
    Comparator.run(runners, data_loader=feeds(calls, "refine", "fp32"))

A feed has every input of a graph of the contract, including the caches; a runner returns all of its outputs.
Feeds are copied in and out, because one feed goes to all runners.
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
    """An open backend in one role. want_logits: whether logits are among the outputs."""

    def __init__(
        self, backend: Backend, role: str, name: str | None = None, *, want_logits: bool = False
    ) -> None:
        super().__init__(name=name or backend.name, prefix=f"dllm-trt-{backend.name}")
        self.backend, self.role, self.want_logits = backend, role, want_logits

    def activate_impl(self) -> None:
        """The backend is open already."""

    def deactivate_impl(self) -> None:
        """Its owner closes it."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, element types and shapes (-1 if dynamic); bf16 caches are float32."""
        metadata = TensorMetadata()
        for spec in contract.inputs(self.role, self.backend.manifest.dims):
            metadata.add(
                spec.name,
                _KINDS.get(spec.dtype, np.float32),
                [axis if isinstance(axis, int) else -1 for axis in spec.axes],
            )
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> OrderedDict[str, Array]:
        """One call in a cache of its own."""
        begin = time.perf_counter()
        outputs = replayed(
            self.backend,
            self.role,
            {name: np.array(value) for name, value in feed_dict.items()},
            want_logits=self.want_logits,
        )
        self.inference_time = (
            time.perf_counter() - begin
        )  # includes copying the caches in and out: for debugging, not a measurement
        return OrderedDict(outputs)


def feeds(calls: Iterable[RecordedCall], role: str, dtype: str) -> list[dict[str, Array]]:
    """The inputs for runners of a role: the calls' inputs, with caches in the dtype of the graph (float32 for
    bf16)."""
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
    """Run the runners over the same feeds, and compare each with the first one. Yields its name, the first
    one's name, the number of the feed, and the largest difference of each output; tokens are compared for
    equality."""
    with G_LOGGER.verbosity(G_LOGGER.ERROR):  # it prints every tensor
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
    """Compare recorded calls of a decoding, for both graphs, on three runners: the PyTorch reference, our
    backend, and Polygraphy's own OnnxrtRunner. Returns whether all outputs agree within tolerance, what was
    measured, and the first difference."""
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
        f"{name}: {where} differs from PyTorch by {value:.3g} times the tolerance"
        for name, (value, where) in worst.items()
        if not value <= 1
    ]
    return not failed, measured, failed[0] if failed else ""
