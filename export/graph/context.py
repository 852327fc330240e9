"""What every part of the decoder builds its nodes with, and the names of weights. Shape letters: B batch, T
rows of activations (B * rows of the window)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder

from .linears import Linears
from .lowering import Lowering

EMBEDDING, FINAL_NORM, HEAD = "embedding", "final_norm", "head"
ROPE_COS, ROPE_SIN = "rope_cos", "rope_sin"
OUTPUT = "output"  # of a layer: the residual stream after it

Shapes = dict[str, tuple[int, ...]]  # of weights by name, [out, in]


def layer_name(layer: int, name: str) -> str:
    """The name of a layer's weight, used for initializers and in every parity table."""
    return f"layers.{layer}.{name}"


def split_layer(weight: str) -> tuple[int, str] | None:
    """(3, 'q_proj') for 'layers.3.q_proj'; None for a weight outside the layers."""
    head, _, rest = weight.partition(".")
    if head != "layers":
        return None
    layer, _, leaf = rest.partition(".")
    return int(layer), leaf


def is_layer(name: str) -> bool:
    """Whether a weight belongs to a layer."""
    return split_layer(name) is not None


def is_linear(name: str) -> bool:
    """Whether a weight is that of a linear layer, including the head: their names end in _proj."""
    return name == HEAD or name.endswith("_proj")


@dataclass(frozen=True)
class Rows:
    """The rows that a layer works on: their positions [B, rows], an int64 shape [B, rows], the additive
    attention mask, and its type. fold: how many query heads of a KV head are rows of one head in the mask
    [B, 1, fold * rows, keys] and in attention."""

    positions: ir.Value
    shape: ir.Value
    mask: ir.Value
    mask_type: ir.DataType
    fold: int = 1


@dataclass(frozen=True)
class Context:
    """The graph being built. dtype: of activations and caches; weight: returns the initializer of a weight;
    linears: builds linear layers; table: cos and sin."""

    op: OpBuilder
    lowering: Lowering
    dtype: ir.DataType
    weight: Callable[[str], ir.Value]
    linears: Linears
    table: tuple[ir.Value, ir.Value]
    norm_eps: float

    def linear(self, x: ir.Value, layer: int, name: str, *, bias: bool = False) -> ir.Value:
        """x [T, K] -> [T, N] by a layer's linear weight."""
        added = self.weight(layer_name(layer, name + ".bias")) if bias else None
        return self.linears.linear(self.op, x, layer_name(layer, name), self.weight, added)

    def norm(self, x: ir.Value, weight: str) -> ir.Value:
        """RMSNorm of x over its last axis."""
        return self.lowering.rms_norm(self.op, x, self.weight(weight), self.norm_eps, self.dtype)

    def float32(self, x: ir.Value) -> ir.Value:
        return x if self.dtype == ir.DataType.FLOAT else self.op.Cast(x, to=int(ir.DataType.FLOAT))

    def narrow(self, x: ir.Value) -> ir.Value:
        """A float32 value cast to the activations' dtype."""
        return x if self.dtype == ir.DataType.FLOAT else self.op.Cast(x, to=int(self.dtype))
