"""The one dense decoder, built node by node as an ONNX graph: no tracing, no torch, no weights in memory.

Pre-norm, bidirectional attention, half-split RoPE, RMSNorm, SwiGLU. What differs between families is data (DecoderConfig).
Activations are [B*S, hidden] so that each linear layer is one Gemm over the checkpoint's own [out, in] weights.
The last layer needs its queries, MLP and head only on the rows asked for.

Shape letters: B batch, S rows of the window, R rows asked for, C capacity, H KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder

from .linears import Linears
from .lowering import Lowering

MASKED = -30000.0  # finite in fp16, and exp(MASKED) is 0

EMBEDDING, FINAL_NORM, HEAD = "embedding", "final_norm", "head"
ROPE_COS, ROPE_SIN = "rope_cos", "rope_sin"
OUTPUT = "output"  # of a layer: the residual stream after it

Pair = tuple[ir.Value, ir.Value]  # keys and values of a layer
Caches = Pair | tuple[None, None]  # a graph that neither reads nor writes caches has none (legacy, prefix)


@dataclass(frozen=True)
class DecoderConfig:
    """The network. `max_length` positions have rotation tables; `rotary_float32`: q and k are rotated in float32."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_length: int
    norm_eps: float
    rope_theta: float
    rotary_float32: bool
    qkv_bias: bool = False
    tied_head: bool = False


def layer_name(layer: int, name: str) -> str:
    """Name of a weight of a layer: the names of the initializers and of every parity table."""
    return f"layers.{layer}.{name}"


def is_layer(name: str) -> bool:
    """Whether a weight is one of a layer's."""
    return name.startswith("layers.")


def is_linear(name: str) -> bool:
    """Whether a weight is that of a linear layer, the head among them."""
    return name == HEAD or name.endswith("_proj")


def weight_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the decoder that comes from the checkpoint, in the order of use: name -> shape, [out, in]."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        layer: dict[str, tuple[int, ...]] = {"attention_norm": (hidden,)}
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            layer[name] = (rows, hidden)
            if config.qkv_bias:
                layer[name + ".bias"] = (rows,)
        layer |= {"o_proj": (hidden, queries), "mlp_norm": (hidden,)}
        layer |= {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
        shapes |= {layer_name(i, name): shape for name, shape in layer.items()}
    shapes[FINAL_NORM] = (hidden,)
    if not config.tied_head:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


@dataclass(frozen=True)
class Window:
    """The graph's inputs. `write_index` is None in the prefix graph. Shapes: contract.py."""

    input_ids: ir.Value
    position_ids: ir.Value
    write_index: ir.Value | None
    kv_len: ir.Value
    logit_rows: ir.Value


@dataclass(frozen=True)
class _Rows:
    """The rows that a layer works on: their positions [B, rows], an int64 shape [B, rows], and the mask they attend by."""

    positions: ir.Value
    shape: ir.Value
    mask: ir.Value


class Decoder:
    """Builds the decoder into the graph behind `op`. `weight(name)` gives the initializer of a weight; `linears` spells the linear layers."""

    def __init__(
        self,
        op: OpBuilder,
        config: DecoderConfig,
        lowering: Lowering,
        dtype: ir.DataType,
        weight: Callable[[str], ir.Value],
        linears: Linears,
    ) -> None:
        self.op, self.config, self.lowering, self.dtype, self.weight, self.linears = op, config, lowering, dtype, weight, linears
        linears.begin(op, weight_shapes(config))
        self.table = (weight(ROPE_COS), weight(ROPE_SIN))
        self.constants = [
            op.initializer(ir.tensor(value, dtype=dtype), name) for name, value in (("valid", 0.0), ("masked", MASKED))
        ]

    def build(self, window: Window, caches: list[Caches]) -> tuple[ir.Value, list[Pair]]:
        """Logits [B*R, V] (float32) of the rows asked for, and the keys and values to return, a pair a layer."""
        op, returned = self.op, []
        embedding = self.weight(EMBEDDING)
        x = op.Gather(embedding, op.Reshape(window.input_ids, [-1]), axis=0)
        if embedding.dtype != self.dtype:
            x = op.Cast(x, to=int(self.dtype))
        rows = self._rows(window, caches[0][0], window.position_ids)
        write_index = window.write_index
        if write_index is None and caches[0][0] is not None:  # Min is the spelling of a zero per row that TensorRT-RTX 1.7 builds
            write_index = op.Min(window.kv_len, 0)
        for i, cache in enumerate(caches):
            wanted = self._wanted(window, caches[0][0]) if i == self.config.num_layers - 1 else None
            x, pair = self._layer(i, x, rows, wanted, cache, write_index, prefix=window.write_index is None)
            x.name = layer_name(i, OUTPUT)  # verify exposes the residual stream under this name
            returned.append(pair)
        x = self._float32(self._norm(x, FINAL_NORM))
        return self.linears.head(op, x, EMBEDDING if self.config.tied_head else HEAD, self.weight), returned

    def _float32(self, x: ir.Value) -> ir.Value:
        return x if self.dtype == ir.DataType.FLOAT else self.op.Cast(x, to=int(ir.DataType.FLOAT))

    def _layer(
        self,
        i: int,
        x: ir.Value,
        rows: _Rows,
        wanted: tuple[_Rows, Callable[[ir.Value], ir.Value]] | None,
        cache: Caches,
        write_index: ir.Value | None,
        *,
        prefix: bool,
    ) -> tuple[ir.Value, Pair]:
        op, config = self.op, self.config
        h = self._norm(x, layer_name(i, "attention_norm"))
        key = self._rotate(self._heads(h, i, "k_proj", config.num_kv_heads, rows), rows)
        value = self._heads(h, i, "v_proj", config.num_kv_heads, rows)
        if wanted is not None:
            rows, picked = wanted
            h, x = picked(h), picked(x)
        factor, scale = self.lowering.scales(config.head_dim, self.dtype)
        query = self._rotate(self._heads(h, i, "q_proj", config.num_heads, rows), rows, factor)
        (keys, new_key), (values, new_value) = (
            (new, new) if old is None or write_index is None else self.lowering.extend(op, old, new, write_index)
            for old, new in zip(cache, (key, value), strict=True)
        )
        if prefix:
            keys, values = key, value
        attended = self.lowering.attention(
            op,
            query,
            keys,
            values,
            rows.mask,
            scale=scale,
            head_dim=config.head_dim,
            group=config.num_heads // config.num_kv_heads,
        )
        attended = op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), [-1, config.num_heads * config.head_dim])
        x = op.Add(x, self._linear(attended, i, "o_proj"))
        h = self._norm(x, layer_name(i, "mlp_norm"))
        gate, up, down = (layer_name(i, name) for name in ("gate_proj", "up_proj", "down_proj"))
        return op.Add(x, self.linears.gated(op, h, (gate, up, down), self.weight)), (new_key, new_value)

    def _linear(self, x: ir.Value, layer: int, name: str, *, bias: bool = False) -> ir.Value:
        held = self.weight(layer_name(layer, name + ".bias")) if bias else None
        return self.linears.linear(self.op, x, layer_name(layer, name), self.weight, held)

    def _heads(self, h: ir.Value, layer: int, name: str, heads: int, rows: _Rows) -> ir.Value:
        """A projection of h, split into heads: [B, heads, rows, D]."""
        projected = self._linear(h, layer, name, bias=self.config.qkv_bias)
        shape = self.op.Concat(rows.shape, [heads, self.config.head_dim], axis=0)
        return self.op.Transpose(self.op.Reshape(projected, shape), perm=[0, 2, 1, 3])

    def _norm(self, x: ir.Value, weight: str) -> ir.Value:
        return self.lowering.rms_norm(self.op, x, self.weight(weight), self.config.norm_eps, self.dtype)

    def _rotate(self, x: ir.Value, rows: _Rows, factor: float | None = None) -> ir.Value:
        """x [B, heads, rows, D] rotated to its positions, and times `factor` in float32. With rotary_float32 x goes up and comes back; casting only the
        table would not be the same."""
        op, (cos, sin) = self.op, self.table
        is_wide = self.config.rotary_float32
        turned = (
            self.lowering.rotate(op, self._float32(x), cos, sin, rows.positions)
            if is_wide
            else self.lowering.rotate(op, x, self._narrow(cos), self._narrow(sin), rows.positions)
        )
        if factor is not None:
            turned, is_wide = op.Mul(turned if is_wide else self._float32(turned), factor), True
        return self._narrow(turned) if is_wide else turned

    def _narrow(self, x: ir.Value) -> ir.Value:
        return x if self.dtype == ir.DataType.FLOAT else self.op.Cast(x, to=int(self.dtype))

    def _rows(self, window: Window, cache: ir.Value | None, positions: ir.Value) -> _Rows:
        """Rows at `positions`, attending to the window's own keys (prefix) or to the cache (refine) up to kv_len."""
        op = self.op
        length = op.Unsqueeze(window.kv_len, [1])
        if cache is None or window.write_index is None:
            valid = [self.lowering.valid_rows(op, window.input_ids, length)]
        else:
            valid = self.lowering.valid_keys(op, cache, window.input_ids, op.Unsqueeze(window.write_index, [1]), length)
        pieces = [op.Where(piece, self.constants[0], self.constants[1]) for piece in valid]
        masked = op.Concat(*pieces, axis=1) if len(pieces) > 1 else pieces[0]  # [B, keys]; booleans do not concatenate everywhere
        row_axis = op.Cast(op.Mul(positions, 0), to=int(self.dtype))  # [B, rows] of zeros
        mask = op.Add(op.Unsqueeze(masked, [1, 2]), op.Unsqueeze(row_axis, [1, 3]))
        return _Rows(positions, op.Shape(positions), mask)

    def _wanted(self, window: Window, cache: ir.Value | None) -> tuple[_Rows, Callable[[ir.Value], ir.Value]]:
        """The rows asked for, and what picks them."""
        op = self.op
        positions = op.GatherElements(window.position_ids, window.logit_rows, axis=1)
        shape, index = (
            op.Concat(op.Shape(window.input_ids), [self.config.hidden_size], axis=0),
            op.Unsqueeze(window.logit_rows, [2]),
        )

        def picked(x: ir.Value) -> ir.Value:
            """Of x [B*S, K] the rows asked for [B*R, K]. Not by an index into B*S, whose row starts TensorRT computes on the host."""
            return op.Reshape(op.GatherND(op.Reshape(x, shape), index, batch_dims=1), [-1, self.config.hidden_size])

        return self._rows(window, cache, positions), picked
