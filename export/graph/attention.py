"""Attention as a part of a decoder layer: the names and shapes of its weights, and its nodes.

Shape letters: B batch, T rows of activations, H KV heads, D head_dim, C capacity of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .context import Context, Rows, Shapes, layer_name
from .lowering.heads import Heads

_NORM_OF = {"q_proj": "q_norm", "k_proj": "k_norm"}


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention over all valid keys, with half-split RoPE. rotary_float32: q and k are rotated
    in float32. qk_norm: q and k each pass an RMSNorm over head_dim before they are rotated (Qwen3).
    rotary_dim: how many of a head's first entries are rotated (None: all). folds_groups: with full attention,
    the query heads of a KV head attend as rows of one head, so that no runtime copies keys and values to all
    query heads; the numbers are the same."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rotary_float32: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    rotary_dim: int | None = None
    folds_groups: bool = True

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def fold(self) -> int:
        """How many of them attend as rows of one head, where all rows have the same mask."""
        return self.group if self.folds_groups else 1

    def shapes(self) -> Shapes:
        """The weights of a layer, in the order of use."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: Shapes = {}
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            shapes[name] = (rows, self.hidden_size)
            if self.qkv_bias:
                shapes[name + ".bias"] = (rows,)
            if self.qk_norm and name in _NORM_OF:
                shapes[_NORM_OF[name]] = (self.head_dim,)
        return shapes | {"o_proj": (self.hidden_size, queries)}

    def keys_and_values(self, on: Context, h: ir.Value, layer: int, rows: Rows) -> tuple[ir.Value, ir.Value]:
        """Keys after RoPE, and values, of h [T, hidden]: [B, H, rows, D] each."""
        key = self._rotate(on, self._heads(on, h, layer, "k_proj", self.num_kv_heads, rows), rows)
        return key, self._heads(on, h, layer, "v_proj", self.num_kv_heads, rows)

    def queries(self, on: Context, h: ir.Value, layer: int, rows: Rows) -> ir.Value:
        """Queries of h [T, hidden] after RoPE, scaled by the part of 1 / sqrt(D) that the lowering leaves to
        them: [B, heads, rows, D]."""
        factor, _ = on.lowering.scales(self.head_dim, on.dtype)
        return self._rotate(on, self._heads(on, h, layer, "q_proj", self.num_heads, rows), rows, factor)

    def attend(
        self, on: Context, query: ir.Value, layer: int, rows: Rows, keys: ir.Value, values: ir.Value
    ) -> ir.Value:
        """Attention of the queries to keys and values [B, H, C, D]: [T, hidden]."""
        _, scale = on.lowering.scales(self.head_dim, on.dtype)
        heads = Heads(scale, self.head_dim, self.group // rows.fold, on.dtype, rows.mask_type)
        if rows.fold > 1:
            query = on.op.Reshape(query, [0, self.num_kv_heads, -1, self.head_dim])
        attended = on.lowering.attention(on.op, query, keys, values, rows.mask, heads)
        if rows.fold > 1:
            attended = on.op.Reshape(attended, [0, self.num_heads, -1, self.head_dim])
        flat = on.op.Reshape(
            on.op.Transpose(attended, perm=[0, 2, 1, 3]), [-1, self.num_heads * self.head_dim]
        )
        return on.linear(flat, layer, "o_proj")

    def _heads(self, on: Context, h: ir.Value, layer: int, name: str, heads: int, rows: Rows) -> ir.Value:
        """A projection of h, split into heads: [B, heads, rows, D]."""
        projected = on.linear(h, layer, name, bias=self.qkv_bias)
        shape = on.op.Concat(rows.shape, [heads, self.head_dim], axis=0)
        split = on.op.Reshape(projected, shape)
        if self.qk_norm and name in _NORM_OF:
            split = on.norm(split, layer_name(layer, _NORM_OF[name]))
        return on.op.Transpose(split, perm=[0, 2, 1, 3])

    def _rotate(self, on: Context, x: ir.Value, rows: Rows, factor: float | None = None) -> ir.Value:
        """x [B, heads, rows, D] rotated to its positions, and multiplied by `factor` in float32. With
        rotary_float32, x is cast up and down again; casting only the table would not be the same."""
        cos, sin = on.table
        is_wide = self.rotary_float32
        tables = (cos, sin) if is_wide else (on.narrow(cos), on.narrow(sin))
        turned, rest = on.float32(x) if is_wide else x, None
        if self.rotary_dim not in (None, self.head_dim):
            widths = [self.rotary_dim, self.head_dim - self.rotary_dim]
            turned, rest = on.op.Split(turned, widths, axis=-1, _outputs=2)
        turned = on.lowering.rotate(on.op, turned, *tables, rows.positions)
        if rest is not None:
            turned = on.op.Concat(turned, rest, axis=-1)
        if factor is not None:
            turned, is_wide = on.op.Mul(turned if is_wide else on.float32(turned), factor), True
        return on.narrow(turned) if is_wide else turned
