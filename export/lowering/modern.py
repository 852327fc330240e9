"""Modern lowering, opset 24: Attention, RotaryEmbedding, RMSNormalization and TensorScatter as single standard ops."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder

OPSET = 24


def rms_norm(op: OpBuilder, x: ir.Value, weight: ir.Value, eps: float, dtype: ir.DataType) -> ir.Value:
    return op.RMSNormalization(x, weight, axis=-1, epsilon=eps, stash_type=1)


def rotate(op: OpBuilder, x: ir.Value, cos: ir.Value, sin: ir.Value, position_ids: ir.Value) -> ir.Value:
    return op.RotaryEmbedding(x, cos, sin, position_ids)


def write_cache(op: OpBuilder, cache: ir.Value, update: ir.Value, write_index: ir.Value) -> ir.Value:
    """In place where the buffers of input and output are one."""
    return op.TensorScatter(cache, update, write_index, axis=-2, mode="linear")


def attention(
    op: OpBuilder, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value, *, head_dim: int, group: int
) -> ir.Value:
    return op.Attention(query, key, value, mask, scale=head_dim**-0.5)
