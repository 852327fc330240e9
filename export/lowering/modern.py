"""Modern lowering, opset 24: Attention, RotaryEmbedding, RMSNormalization and TensorScatter as single standard ops.

TensorRT 10.16+ and TensorRT-RTX have importers for each; ONNX Runtime has kernels. Shape letters as in contract.py.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder

OPSET = 24
_FLOAT = int(ir.DataType.FLOAT)


def rms_norm(op: OpBuilder, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
    """`weight * cast(x / rms(x))` over the last axis, the mean taken in float32."""
    return op.RMSNormalization(x, weight, axis=-1, epsilon=eps, stash_type=1)


def rotate(
    op: OpBuilder, x: ir.Value, table: tuple[ir.Value, ir.Value], position_ids: ir.Value, *, dtype: ir.DataType, in_float32: bool
) -> ir.Value:
    """Half-split rotation of x [B, H, S, D] by the rows `position_ids` [B, S] of the cos and sin tables [max_length, D/2].

    `in_float32`: x is cast up for the rotation and back (casting only the table would not be the same).
    """
    cos, sin = table
    if dtype == ir.DataType.FLOAT:
        return op.RotaryEmbedding(x, cos, sin, position_ids)
    if in_float32:
        rotated = op.RotaryEmbedding(op.Cast(x, to=_FLOAT), cos, sin, position_ids)
        return op.Cast(rotated, to=int(dtype))
    return op.RotaryEmbedding(x, op.Cast(cos, to=int(dtype)), op.Cast(sin, to=int(dtype)), position_ids)


def write_cache(op: OpBuilder, cache: ir.Value, update: ir.Value, write_index: ir.Value) -> ir.Value:
    """`cache` [B, H, C, D] with `update` [B, H, S, D] written at row `write_index` [B]; in place where the buffers are one."""
    return op.TensorScatter(cache, update, write_index, axis=-2, mode="linear")


def attention(
    op: OpBuilder, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value, head_dim: int
) -> ir.Value:
    """softmax(query key^T / sqrt(D) + mask) value, bidirectional: [B, heads, S, D]. `mask` is additive [B, 1, S, keys]."""
    return op.Attention(query, key, value, mask, scale=head_dim**-0.5)
