"""Legacy lowering, opset 17: everything decomposed, for runtimes without the modern ops.

No graph writes a cache: the window's keys and values are appended to the cache's rows, of which the window's
own are masked, and returned. The runtime writes them into the cache.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder

from .heads import Heads

OPSET = 17
_FLOAT = ir.DataType.FLOAT


def size(op: OpBuilder, x: ir.Value, axis: int) -> ir.Value:
    """Not by Shape's start and end attributes: the parser of TensorRT 8.6 accepts and ignores them."""
    return op.Gather(op.Shape(x), axis, axis=0)


def rms_norm(op: OpBuilder, x: ir.Value, weight: ir.Value, eps: float, dtype: ir.DataType) -> ir.Value:
    wide = x if dtype == _FLOAT else op.Cast(x, to=int(_FLOAT))
    mean = op.ReduceMean(op.Mul(wide, wide), axes=[-1], keepdims=1)
    normed = op.Div(wide, op.Sqrt(op.Add(mean, eps)))
    return op.Mul(normed if dtype == _FLOAT else op.Cast(normed, to=int(dtype)), weight)


def rotate(op: OpBuilder, x: ir.Value, cos: ir.Value, sin: ir.Value, position_ids: ir.Value) -> ir.Value:
    cos, sin = (op.Unsqueeze(op.Gather(table, position_ids, axis=0), [1]) for table in (cos, sin))
    first, second = op.Split(x, axis=-1, _outputs=2)
    turned = op.Sub(op.Mul(first, cos), op.Mul(second, sin)), op.Add(op.Mul(second, cos), op.Mul(first, sin))
    return op.Concat(*turned, axis=-1)


def extend(op: OpBuilder, cache: ir.Value, new: ir.Value, write_index: ir.Value) -> tuple[ir.Value, ir.Value]:
    return op.Concat(cache, new, axis=2), new


def valid_rows(op: OpBuilder, window: ir.Value, kv_len: ir.Value, axis: int = 1) -> ir.Value:
    return op.Less(op.Range(0, size(op, window, axis), 1), kv_len)


def valid_keys(
    op: OpBuilder, cache: ir.Value, window: ir.Value, write_index: ir.Value, kv_len: ir.Value
) -> list[ir.Value]:
    size_of_window = size(op, window, 1)
    slots = op.Range(0, size(op, cache, 2), 1)  # [C]
    written = op.Add(
        write_index, op.Range(0, size_of_window, 1)
    )  # [B, S]: the rows of the cache that the window will occupy
    is_other = op.Or(
        op.Less(slots, write_index), op.GreaterOrEqual(slots, op.Add(write_index, size_of_window))
    )
    return [op.And(op.Less(slots, kv_len), is_other), op.Less(written, kv_len)]


def scales(head_dim: int, dtype: ir.DataType) -> tuple[float | None, float]:
    """In 16 bits, all of it in float32 before the queries are rounded, because the factor is not a 16-bit
    number."""
    exact = head_dim**-0.5
    return (None, exact) if dtype == _FLOAT else (exact, 1.0)


def attention(
    op: OpBuilder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value,
    heads: Heads,
) -> ir.Value:
    if heads.group > 1:
        key, value = (_repeat(op, tensor, heads.head_dim, heads.group) for tensor in (key, value))
    scaled = query if heads.scale == 1 else op.Mul(query, heads.scale)
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    if heads.softmax_type == heads.dtype:
        return op.MatMul(op.Softmax(op.Add(scores, mask), axis=-1), value)
    weights = op.Softmax(op.Add(op.Cast(scores, to=int(heads.softmax_type)), mask), axis=-1)
    return op.MatMul(op.Cast(weights, to=int(heads.dtype)), value)


def softmax_type(dtype: ir.DataType) -> ir.DataType:
    """float32: with a 16-bit mask for each row, TensorRT-RTX 1.7 sums fp16 attention in fp16."""
    return _FLOAT


def _repeat(op: OpBuilder, x: ir.Value, head_dim: int, group: int) -> ir.Value:
    """x [B, H, C, D] with each head repeated `group` times: [B, H * group, C, D]."""
    batch, heads, rows = (op.Gather(op.Shape(x), [i], axis=0) for i in range(3))
    wide = op.Expand(op.Unsqueeze(x, [2]), op.Concat(batch, heads, [group], rows, [head_dim], axis=0))
    return op.Reshape(wide, op.Concat(batch, op.Mul(heads, group), rows, [head_dim], axis=0))
