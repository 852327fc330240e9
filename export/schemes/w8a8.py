"""w8a8 for ONNX Runtime on a CPU: 8-bit weights with a scale per output, activations rounded to 8 bits with a
scale per token at run time.

    s = max|x| / 127 per token, q = round(x / s) + 128, y = s * (q - 128) @ W8 * scale

With scales per token there is no calibration, and an outlier token does not affect the others. Activations
are unsigned around 128 because processors multiply u8 x s8 fast; s8 x s8 is six times slower than float32 in
ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from trt_runtime.artifact.manifest import ORT_CPU

from ..graph.linears import MICROSOFT, Initializer
from .base import Array, Scheme, StoredPart

_ZERO = 128
_TINY = 1e-20  # the scale of a token that is all zeros


class W8A8(Scheme):
    name = "w8a8"
    title = "8-bit weights, 8-bit activations with a scale a token"
    target = ORT_CPU
    dtypes = ("fp32",)
    operators = frozenset({"MatMulIntegerToFloat"})

    def begin(self, op: OpBuilder, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().begin(op, shapes)
        self._rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        constants = {
            "one": np.float32(1),
            "zero_point": np.uint8(_ZERO),
            "zero_points": np.array([_ZERO], np.uint8),
        }
        self._constants = {name: op.initializer(ir.tensor(value), name) for name, value in constants.items()}

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredPart]:
        rows, columns = shape
        return {"int8": StoredPart("int8", (columns, rows)), "scale": StoredPart("fp32", (rows,))}

    def quantize(self, name: str, shape: tuple[int, int], rows: Iterator[Array]) -> dict[str, Array]:
        """[K, N], the layout of MatMulIntegerToFloat."""
        outputs, inputs = shape
        weights, scale, at = np.empty((inputs, outputs), np.int8), np.empty(outputs, np.float32), 0
        for piece in rows:
            there = slice(at, at := at + len(piece))
            scale[there] = np.maximum(np.abs(piece).max(1) / 127, np.float32(_TINY))
            weights[:, there] = np.rint(piece / scale[there, None]).astype(np.int8).T
        return {"int8": weights, "scale": scale}

    def linear(
        self, op: OpBuilder, x: ir.Value, name: str, weight: Initializer, bias: ir.Value | None = None
    ) -> ir.Value:
        product, scale = self._multiply(op, x, name, weight)
        product = op.Mul(product, scale)
        return product if bias is None else op.Add(product, bias)

    def head(self, op: OpBuilder, x: ir.Value, name: str, weight: Initializer) -> ir.Value:
        return self.linear(op, x, name, weight)

    def gated(self, op: OpBuilder, h: ir.Value, names: tuple[str, str, str], weight: Initializer) -> ir.Value:
        """The scale of up's tokens is applied at the end: rounding a token does not need it."""
        gate = self.linear(op, h, names[0], weight)
        up, scale = self._multiply(op, h, names[1], weight)
        down, own = self._multiply(op, op.Mul(op.Mul(gate, op.Sigmoid(gate)), up), names[2], weight)
        return op.Mul(down, op.Mul(own, scale))

    def _multiply(
        self, op: OpBuilder, x: ir.Value, name: str, weight: Initializer
    ) -> tuple[ir.Value, ir.Value]:
        """x @ W without the tokens' scales [T, N], and these scales [T, 1]."""
        if x not in self._rounded:  # once for all layers that read x
            self._rounded[x] = self._round(op, x)
        rounded, scale = self._rounded[x]
        one, zero_point = self._constants["one"], self._constants["zero_point"]
        product = op.MatMulIntegerToFloat(
            rounded,
            weight(f"{name}.int8"),
            one,
            weight(f"{name}.scale"),
            zero_point,
            _domain=MICROSOFT,
            _version=1,
        )
        return product, scale

    def _round(self, op: OpBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        largest = op.ReduceMax(op.Abs(x), [-1], keepdims=0)
        scale = op.Max(op.Mul(largest, 1 / 127), _TINY)
        zero_points = op.Expand(self._constants["zero_points"], op.Shape(scale))
        return op.QuantizeLinear(x, scale, zero_points, axis=0), op.Unsqueeze(scale, [1])
