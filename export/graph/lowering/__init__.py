"""Lowerings: how attention, rotary embedding, norm and cache writes are expressed in ONNX. Same inputs, same
meaning, same statistics.

modern: opset 24, a single op for each (TensorRT 10.16+, TensorRT-RTX, ONNX Runtime 1.24+). The default.
legacy: opset 17, decomposed (older runtimes; Python 3.10, whose newest ONNX Runtime is 1.23).
"""

from __future__ import annotations

from typing import Protocol

import onnx_ir as ir
from onnxscript import OpBuilder

from trt_runtime.artifact import contract
from trt_runtime.errors import unknown

from . import legacy, modern
from .heads import Heads


class Lowering(Protocol):
    """What a lowering module provides. Shape letters as in contract.py; N query heads."""

    OPSET: int

    def size(self, op: OpBuilder, x: ir.Value, axis: int) -> ir.Value:
        """The length of an axis, a scalar."""

    def rms_norm(
        self, op: OpBuilder, x: ir.Value, weight: ir.Value, eps: float, dtype: ir.DataType
    ) -> ir.Value:
        """`weight * cast(x / rms(x))` over the last axis, the mean taken in float32."""

    def rotate(
        self, op: OpBuilder, x: ir.Value, cos: ir.Value, sin: ir.Value, position_ids: ir.Value
    ) -> ir.Value:
        """Half-split rotation of x [B, N, S, D] by the rows `position_ids` [B, S] of two tables [max_length,
        D/2]."""

    def extend(
        self, op: OpBuilder, cache: ir.Value, new: ir.Value, write_index: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """`cache` [B, H, C, D] and the window's rows `new` [B, H, S, D] as one tensor [B, H, keys, D] to
        attend to, and the tensor that the graph returns: the cache with `new` written at row `write_index`
        [B], or `new` itself."""

    def valid_rows(self, op: OpBuilder, window: ir.Value, kv_len: ir.Value, axis: int = 1) -> ir.Value:
        """Which rows of a window [B, S] are not padding: the first kv_len [B, 1] of each, whatever their
        positions. With a window [B, 1, S], axis 2 and lengths [B, rows, 1]: those that each row sees."""

    def valid_keys(
        self, op: OpBuilder, cache: ir.Value, window: ir.Value, write_index: ir.Value, kv_len: ir.Value
    ) -> list[ir.Value]:
        """Which rows of the keys from `extend` a window [B, S] attends to, as consecutive pieces [B, keys].
        write_index and kv_len are [B, 1]; or [B, 1, 1] and [B, rows, 1], and the pieces [B, rows, keys]."""

    def scales(self, head_dim: int, dtype: ir.DataType) -> tuple[float | None, float]:
        """How 1 / sqrt(D) is applied: the factor for queries in float32 before they are rounded to `dtype`
        (None: no factor), and the scale left to `attention`."""

    def attention(
        self,
        op: OpBuilder,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        mask: ir.Value,
        heads: Heads,
    ) -> ir.Value:
        """softmax(query key^T * scale + mask) value: [B, N, S, D]. `mask` is additive [B, 1, S, keys], in
        softmax_type; N = group * H."""

    def softmax_type(self, dtype: ir.DataType) -> ir.DataType:
        """The type in which softmax is computed in a graph of `dtype` whose rows have masks of their own."""


LOWERINGS: dict[str, Lowering] = {contract.MODERN: modern, contract.LEGACY: legacy}


def find(name: str) -> Lowering:
    """A lowering by its name. Raises DllmError for an unknown one."""
    if name not in LOWERINGS:
        raise unknown("lowering", name, LOWERINGS)
    return LOWERINGS[name]
