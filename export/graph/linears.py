"""Linear layers in ONNX. The decoder asks for them by name; quantisation schemes build them differently.
Shape letters: T tokens (rows of activations), K inputs, N outputs of a layer; its weight is [N, K]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import onnx_ir as ir
from onnxscript import OpBuilder

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
Initializer = Callable[[str], ir.Value]  # returns the initializer of a stored tensor, by its name


class Linears:
    """Linear layers as the checkpoint has them: one Gemm over its own [N, K] weights. Schemes override what
    they build differently."""

    operators: ClassVar[frozenset[str]] = frozenset()  # nodes of com.microsoft that a graph may contain

    def begin(self, op: OpBuilder, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Start a new graph. shapes: of the weights, by name."""
        self.shapes = shapes

    def linear(
        self, op: OpBuilder, x: ir.Value, name: str, weight: Initializer, bias: ir.Value | None = None
    ) -> ir.Value:
        """x [T, K] -> [T, N], with `bias` [N] added."""
        return op.Gemm(*(value for value in (x, weight(name), bias) if value is not None), transB=1)

    def head(self, op: OpBuilder, x: ir.Value, name: str, weight: Initializer) -> ir.Value:
        """Logits [T, V] of x [T, K], both float32: rounding to 16 bits, for example, would move confidences
        across the threshold."""
        return op.Gemm(x, widened(op, weight(name)), transB=1)

    def gated(self, op: OpBuilder, h: ir.Value, names: tuple[str, str, str], weight: Initializer) -> ir.Value:
        """SwiGLU, h [T, K] -> [T, K]: down(silu(gate(h)) * up(h)). names: those of the three layers."""
        gate = self.linear(op, h, names[0], weight)
        product = op.Mul(op.Mul(gate, op.Sigmoid(gate)), self.linear(op, h, names[1], weight))
        return self.linear(op, product, names[2], weight)


def widened(op: OpBuilder, x: ir.Value) -> ir.Value:
    """A value of known type, cast to float32."""
    return x if x.dtype == ir.DataType.FLOAT else op.Cast(x, to=int(ir.DataType.FLOAT))
