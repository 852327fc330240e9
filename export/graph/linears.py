"""Linear layers in ONNX. The decoder asks for them by name; quantisation schemes build them differently.
Shape letters: T tokens (rows of activations), K inputs, N outputs of a layer; its weight is [N, K]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar

import onnx_ir as ir
from onnxscript import OpBuilder

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
Initializer = Callable[[str], ir.Value]  # returns the initializer of a stored tensor, by its name


class Linears:
    """Linear layers as the checkpoint has them: one Gemm over its own [N, K] weights. Schemes override what
    they build differently."""

    operators: ClassVar[frozenset[str]] = frozenset()  # nodes of com.microsoft that a graph may contain
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})  # of the weights, by name

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

    def experts(
        self,
        op: OpBuilder,
        h: ir.Value,
        weights: ir.Value,
        names: tuple[str, str, str],
        weight: Initializer,
        sizes: tuple[int, int],
    ) -> ir.Value:
        """The weighted sum of E experts of I inner units, dense: h [T, K], weights [T, E] -> [T, K]. names:
        those of the three wide layers, [E * I, K] twice and [K, E * I]; sizes: (E, I). The last Gemm sums
        over the experts."""
        count, size = sizes
        gate = self.linear(op, h, names[0], weight)
        product = op.Mul(op.Mul(gate, op.Sigmoid(gate)), self.linear(op, h, names[1], weight))
        shares = op.Mul(op.Reshape(product, [-1, count, size]), op.Unsqueeze(weights, [2]))
        return self.linear(op, op.Reshape(shares, [-1, count * size]), names[2], weight)

    def fused_experts(
        self,
        op: OpBuilder,
        h: ir.Value,
        routed: tuple[ir.Value, ir.Value],
        names: tuple[str, str],
        weight: Initializer,
        sizes: tuple[int, int, int],
    ) -> ir.Value:
        """The same by an operator that computes the chosen experts only. routed: the logarithms of the
        weights [T, E], and the weights. names: those of the inner layers [E, 2 I, K] (gate and up, row by
        row in turn) and the outer ones [E, K, I]; sizes: (E, I, experts of a row)."""
        raise NotImplementedError(f"{type(self).__name__} has no such operator")


class FusedLinears(Linears):
    """As Linears, with experts by ONNX Runtime's operator, which is not of the standard."""

    operators = frozenset({"MoE"})

    def fused_experts(
        self,
        op: OpBuilder,
        h: ir.Value,
        routed: tuple[ir.Value, ir.Value],
        names: tuple[str, str],
        weight: Initializer,
        sizes: tuple[int, int, int],
    ) -> ir.Value:
        """The operator takes a softmax of what it is given over its k best, so the logarithms give the
        weights but for their sum."""
        logarithms, weights = routed
        mixed = op.MoE(
            h,
            logarithms,
            weight(names[0]),
            None,
            weight(names[1]),
            k=sizes[2],
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
            normalize_routing_weights=0,
            _domain=MICROSOFT,
            _version=1,
        )
        return op.Mul(mixed, op.ReduceSum(weights, [-1], keepdims=1))


def widened(op: OpBuilder, x: ir.Value) -> ir.Value:
    """A value of known type, cast to float32."""
    return x if x.dtype == ir.DataType.FLOAT else op.Cast(x, to=int(ir.DataType.FLOAT))
