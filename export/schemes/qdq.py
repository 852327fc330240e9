"""Schemes for TensorRT: QuantizeLinear and DequantizeLinear around the layers' own Gemm, which the builder
fuses. The head is not quantised.

fp8: weights and activations in float8 (e4m3) with one scale each; GPUs from SM89.
int8-sq: SmoothQuant (arXiv 2211.10438): large channels of the activations are scaled down and the weights up,
by dividing the norm (or up_proj) before the layer; then 8-bit weights with a scale per output, 8-bit
activations with one scale.
int4: 4-bit weights in blocks of 64, activations not quantised.

Scales of activations are static: they come from calibration canvases. They have the dtype of the activations,
and weights are rounded with the scale as it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from trt_runtime.artifact.manifest import TENSORRT
from trt_runtime.errors import DllmError

from ..graph.context import split_layer
from ..graph.decoder import layer_name
from ..graph.experts import DOWN, GATE, ROUTER, UP
from ..graph.linears import Initializer
from . import blocks, portable
from .base import Array, Scheme, StoredPart

_SCALES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
_TINY = 6.2e-5  # the smallest normal fp16 number: smaller scales would lose digits
_FP8_LARGEST, _INT8_LARGEST = 448.0, 127.0
# the paper's alpha of the smoothing: weights have a scale per output and activations only one, so activations
# need more of it than half
_STRENGTH = 0.75
# what computes the inputs of layers, and so can divide them (a norm's weight, or the rows of an up_proj), and
# the layers that read them
_READERS = {
    "attention_norm": ("q_proj", "k_proj", "v_proj"),
    "mlp_norm": ("gate_proj", "up_proj", "shared_gate_proj", "shared_up_proj", GATE, UP),
    "up_proj": ("down_proj",),
    "shared_up_proj": ("shared_down_proj",),
    UP: (DOWN,),
}
_SOURCE = {reader: source for source, readers in _READERS.items() for reader in readers}
_SOURCE[ROUTER] = "mlp_norm"  # it is not quantised, but reads what is divided


class _QDQ(Scheme):
    target = TENSORRT
    dtypes = ("fp16", "bf16", "fp32")
    covers_head = False

    def scale(self, value: Array | float) -> Array:
        """A scale as it is stored."""
        return np.maximum(np.asarray(value, np.float32), np.float32(_TINY)).astype(_SCALES[self.dtype])


class Int4Blocks(_QDQ):
    name = "int4"
    title = "4-bit weights in blocks of 64"
    block = 64

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredPart]:
        rows, columns = shape
        if columns % self.block:
            raise DllmError(
                f"{name}: {columns} inputs, but --quantize int4 for TensorRT needs a multiple of "
                f"{self.block}: use fp8."
            )
        return {
            "int4": StoredPart("int4", shape),
            "scale": StoredPart(self.dtype, (rows, columns // self.block)),
        }

    def quantize(self, name: str, shape: tuple[int, int], rows: Iterator[Array]) -> dict[str, Array]:
        whole, scales = blocks.rounded(rows, shape, self.block, 4, self.scale)
        return {"int4": blocks.packed(whole), "scale": self.scale(scales)}

    def linear(
        self, op: OpBuilder, x: ir.Value, name: str, weight: Initializer, bias: ir.Value | None = None
    ) -> ir.Value:
        dequantised = op.DequantizeLinear(
            weight(f"{name}.int4"), weight(f"{name}.scale"), axis=1, block_size=self.block
        )
        return op.Gemm(*(value for value in (x, dequantised, bias) if value is not None), transB=1)


class _Static(_QDQ):
    """Activations with one scale per layer, from calibration."""

    is_calibrated = True
    stored: str  # the type of weights and rounded activations
    zero: Array
    largest: float
    per_output: bool  # whether weights have a scale per output

    def smoothed(self, name: str) -> Array:
        """The largest magnitude of each input of a layer [K], after `factors`."""
        _, columns = self.factors(name)
        largest = self.calibration.inputs[name]
        return largest if columns is None else largest / columns

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredPart]:
        scale = StoredPart(self.dtype, (shape[0],) if self.per_output else ())
        return {
            self.stored: StoredPart(self.stored, shape),
            "scale": scale,
            "input_scale": StoredPart(self.dtype, ()),
        }

    def quantize(self, name: str, shape: tuple[int, int], rows: Iterator[Array]) -> dict[str, Array]:
        whole = np.concatenate(list(rows))
        largest = np.abs(whole).max(1) if self.per_output else np.abs(whole).max()
        scale = self.scale(largest / self.largest)
        whole /= scale.astype(np.float32).reshape(-1, 1)
        kind = self.zero.dtype
        stored = np.clip(np.rint(whole) if kind == np.int8 else whole, -self.largest, self.largest).astype(
            kind
        )
        return {
            self.stored: stored,
            "scale": scale,
            "input_scale": self.scale(self.smoothed(name).max() / self.largest),
        }

    def begin(self, op: OpBuilder, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().begin(op, shapes)
        self._zero = op.initializer(ir.tensor(self.zero), "quantized_zero")
        self._rounded: dict[tuple[ir.Value, str], ir.Value] = {}

    def linear(
        self, op: OpBuilder, x: ir.Value, name: str, weight: Initializer, bias: ir.Value | None = None
    ) -> ir.Value:
        own = weight(f"{name}.input_scale")
        x = op.DequantizeLinear(op.QuantizeLinear(x, own, self._zero), own, self._zero)
        axis = {"axis": 0} if self.per_output else {}
        dequantised = op.DequantizeLinear(weight(f"{name}.{self.stored}"), weight(f"{name}.scale"), **axis)
        return op.Gemm(*(value for value in (x, dequantised, bias) if value is not None), transB=1)


class Fp8(_Static):
    name = "fp8"
    title = "8-bit floating point weights and activations"
    stored, zero, largest, per_output = "fp8", np.array(0, ml_dtypes.float8_e4m3fn), _FP8_LARGEST, False


class SmoothQuant(_Static):
    name = "int8-sq"
    title = "8-bit weights and activations, smoothed"
    stored, zero, largest, per_output = "int8", np.array(0, np.int8), _INT8_LARGEST, True

    def factors(self, name: str) -> tuple[Array | None, Array | None]:
        where = split_layer(name)
        if where is None:
            return None, None
        layer, leaf = where
        columns = self._divisor(layer, _SOURCE.get(leaf))
        rows = self._divisor(layer, leaf)
        return None if rows is None else 1 / rows, columns

    def _divisor(self, layer: int, leaf: str | None) -> Array | None:
        """The divisor of a norm's or an up_proj's outputs [K]: max|X|^a / max|W|^(1 - a), over all layers
        that read them."""
        names = [layer_name(layer, name) for name in _READERS.get(leaf or "", ())]
        readers = [name for name in names if name in self.calibration.inputs]
        if not readers:
            return None
        given = self.calibration.inputs[readers[0]]
        weights = np.max([self.calibration.weights[name] for name in readers], axis=0)
        least = np.float32(1e-5)
        return portable.power(np.maximum(given, least), _STRENGTH) / portable.power(
            np.maximum(weights, least), 1 - _STRENGTH
        )
