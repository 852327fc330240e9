"""The range of activations in decoding: the largest magnitude of every input of every linear layer, over
masked canvases.

The canvases are those of decoding (export/quantize/gate.py): blocks before the current one filled, the
current one partly masked, everything after it masked. Clean text would not do: it has no mask tokens, whose
activations are unlike any other's. Shape letters: K inputs, N outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from trt_runtime.artifact import contract
from trt_runtime.backends.ort import OrtBackend

from .. import pipeline
from ..graph.decoder import is_layer, is_linear, weight_shapes
from ..graph.linears import Initializer, Linears
from ..pipeline import Source
from ..schemes.base import Array, Calibration
from ..weights import plan as weights
from ..weights.sources import FromCheckpoint
from . import gate as quality
from .gate import Canvas


class Observing(Linears):
    """Unquantised layers that also return the largest magnitudes of their inputs, [K] each."""

    def begin(self, op: OpBuilder, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().begin(op, shapes)
        self.seen: dict[ir.Value, ir.Value] = {}
        self.layers: dict[str, ir.Value] = {}

    def linear(
        self, op: OpBuilder, x: ir.Value, name: str, weight: Initializer, bias: ir.Value | None = None
    ) -> ir.Value:
        if x not in self.seen:
            self.seen[x] = op.ReduceMax(op.Abs(x), [0], keepdims=0)
        self.layers[name] = self.seen[x]
        return super().linear(op, x, name, weight, bias)


def observe(artifact: Path, source: Source, canvases: Iterable[Canvas]) -> Calibration:
    """Run canvases through an fp32 artifact of `source`."""
    observing, shapes = Observing(), weight_shapes(source.decoder)
    planned = weights.plan(source.decoder, source.family, source.checkpoint, "fp32")
    graph = pipeline.graph_of("refine", source, "fp32", "statistics", contract.MODERN, planned, observing)
    names = dict[str, str]()
    for name, value in observing.layers.items():
        if value not in graph.graph.outputs:
            value.name, value.dtype, value.shape = (
                f"largest.{name}",
                ir.DataType.FLOAT,
                ir.Shape([shapes[name][1]]),
            )
            graph.graph.outputs.append(value)
        names[name] = str(value.name)
    backend = OrtBackend(
        artifact,
        model_bytes=ir.to_proto(graph).SerializeToString(),
        threads=quality.threads_of(_size(source)),
    )
    asked, largest = sorted(set(names.values())), dict[str, Array]()
    for canvas in canvases:
        cache = backend.new_cache(1, len(canvas.ids))
        outputs = backend.run(
            cache, slice(0, 1), quality.window_of(canvas, np.arange(len(canvas.ids))), asked
        )
        largest = {name: np.maximum(largest.get(name, 0.0), outputs[name]) for name in asked}
    backend.close()
    return Calibration({name: largest[output] for name, output in names.items()}, columns(source))


def columns(source: Source) -> dict[str, Array]:
    """The largest magnitude of each column of every layer's weight, [K] each."""
    maxima, shapes = {}, weight_shapes(source.decoder)
    for name in filter(is_linear, shapes):
        if is_layer(name):
            stored = FromCheckpoint.of(source.checkpoint, source.family.stored_as(name, source.decoder))
            maxima[name] = np.max([np.abs(piece).max(0) for piece in stored.rows(shapes[name][1])], axis=0)
    return maxima


def _size(source: Source) -> int:
    return pipeline.facts_of_source(source, "fp32").parameters
