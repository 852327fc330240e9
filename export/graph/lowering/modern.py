"""Modern lowering, opset 24: Attention, RotaryEmbedding, RMSNormalization and TensorScatter as single
standard ops."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder

from .heads import Heads

OPSET = 24
_EXACT_SCALE = 1 / 16  # of 16-bit attention; its root is a power of two


def size(op: OpBuilder, x: ir.Value, axis: int) -> ir.Value:
    return op.Squeeze(op.Shape(x, start=axis, end=axis + 1))


def rms_norm(op: OpBuilder, x: ir.Value, weight: ir.Value, eps: float, dtype: ir.DataType) -> ir.Value:
    return op.RMSNormalization(x, weight, axis=-1, epsilon=eps, stash_type=1)


def rotate(op: OpBuilder, x: ir.Value, cos: ir.Value, sin: ir.Value, position_ids: ir.Value) -> ir.Value:
    return op.RotaryEmbedding(x, cos, sin, position_ids)


def extend(op: OpBuilder, cache: ir.Value, new: ir.Value, write_index: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The cache, written in place if the buffers of input and output are the same."""
    written = op.TensorScatter(cache, new, write_index, axis=-2, mode="linear")
    return written, written


def valid_rows(op: OpBuilder, window: ir.Value, kv_len: ir.Value, axis: int = 1) -> ir.Value:
    """By a running count: TensorRT-RTX 1.7 fails on a Range over a dynamic size next to a cache write ("uses
    before defs")."""
    return op.LessOrEqual(op.CumSum(op.Add(op.Mul(window, 0), 1), axis), kv_len)


def valid_keys(
    op: OpBuilder, cache: ir.Value, window: ir.Value, write_index: ir.Value, kv_len: ir.Value
) -> list[ir.Value]:
    return [op.Less(op.Range(0, size(op, cache, 2), 1), kv_len)]


def scales(head_dim: int, dtype: ir.DataType) -> tuple[float | None, float]:
    """TensorRT multiplies q and k by the root of the scale, rounded to their type: in bf16, 128^-0.5 comes
    out 0.29 % too low. The root of 1/16 is exact; the rest is multiplied in float32. A scale of 1 would not
    do: TensorRT then sums fp16 attention in fp16."""
    exact = head_dim**-0.5
    return (None, exact) if dtype == ir.DataType.FLOAT else (exact / _EXACT_SCALE, _EXACT_SCALE)


def attention(
    op: OpBuilder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value,
    heads: Heads,
) -> ir.Value:
    return op.Attention(query, key, value, mask, scale=heads.scale)


def softmax_type(dtype: ir.DataType) -> ir.DataType:
    return dtype
