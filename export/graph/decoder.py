"""The decoder, built node by node as an ONNX graph: no tracing, no torch, no weights in memory.

Pre-norm, with RMSNorm; attention and feed-forward are parts (attention.py, feed_forward.py) that a family
puts into its DecoderConfig. Activations are [B*S, hidden] so that each linear layer is one Gemm over the
checkpoint's own [out, in] weights. The last layer needs its queries, MLP and head only on the rows asked for.

Shape letters: B batch, S rows of the window, R rows asked for, C capacity, H KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
from onnxscript import OpBuilder

from .attention import Attention
from .context import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    OUTPUT,
    ROPE_COS,
    ROPE_SIN,
    Context,
    Rows,
    Shapes,
    is_layer,
    is_linear,
    layer_name,
    split_layer,
)
from .feed_forward import FeedForward
from .linears import Linears
from .lowering import Lowering

__all__ = [
    "EMBEDDING",
    "FINAL_NORM",
    "HEAD",
    "OUTPUT",
    "ROPE_COS",
    "ROPE_SIN",
    "Decoder",
    "DecoderConfig",
    "GraphInputs",
    "is_layer",
    "is_linear",
    "layer_name",
    "stored_dtype",
    "weight_shapes",
]

MASKED = -30000.0  # finite in fp16, and exp(MASKED) is 0

Pair = tuple[ir.Value, ir.Value]  # keys and values of a layer
Caches = Pair | tuple[None, None]  # a graph that neither reads nor writes caches has none (legacy, prefix)


@dataclass(frozen=True)
class DecoderConfig:
    """The network: what differs between families, as data and as parts. max_length: number of positions in
    the rotation tables. is_block_causal: each row of a window sees keys up to a row_len of its own.
    other_feed_forwards: of the layers, by number, that have another one."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    max_length: int
    norm_eps: float
    attention: Attention
    feed_forward: FeedForward
    tied_head: bool = False
    is_block_causal: bool = False
    other_feed_forwards: Mapping[int, FeedForward] = field(default_factory=dict)

    def feed_forward_of(self, layer: int) -> FeedForward:
        """The feed-forward of a layer."""
        return self.other_feed_forwards.get(layer, self.feed_forward)

    @property
    def rotary_dim(self) -> int:
        """How many of a head's entries are rotated."""
        return self.attention.rotary_dim or self.attention.head_dim


def stored_dtype(config: DecoderConfig, weight: str, dtype: str) -> str:
    """The dtype in which a weight of an artifact of `dtype` is stored."""
    where = split_layer(weight)
    return "fp32" if where and where[1] in config.feed_forward_of(where[0]).float32 else dtype


def weight_shapes(config: DecoderConfig) -> Shapes:
    """Every weight of the decoder that comes from the checkpoint, in the order of use: name -> shape, [out,
    in]."""
    norm = (config.hidden_size,)
    shapes: Shapes = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for i in range(config.num_layers):
        layer = {
            "attention_norm": norm,
            **config.attention.shapes(),
            "mlp_norm": norm,
            **config.feed_forward_of(i).shapes(),
        }
        shapes |= {layer_name(i, name): shape for name, shape in layer.items()}
    shapes[FINAL_NORM] = norm
    if not config.tied_head:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


@dataclass(frozen=True)
class GraphInputs:
    """The graph's inputs. `write_index` is None in the prefix graph; of `kv_len` and `row_len`, the attention
    takes one. Shapes: contract.py."""

    input_ids: ir.Value
    position_ids: ir.Value
    write_index: ir.Value | None
    kv_len: ir.Value | None
    row_len: ir.Value | None
    logit_rows: ir.Value


class Decoder:
    """Builds the decoder into the graph that `op` builds. weight: returns the initializer of a weight;
    linears: builds the linear layers."""

    def __init__(
        self,
        op: OpBuilder,
        config: DecoderConfig,
        lowering: Lowering,
        dtype: ir.DataType,
        weight: Callable[[str], ir.Value],
        linears: Linears,
    ) -> None:
        self.op, self.config, self.lowering, self.dtype, self.weight, self.linears = (
            op,
            config,
            lowering,
            dtype,
            weight,
            linears,
        )
        linears.begin(op, weight_shapes(config))
        self.on = Context(
            op, lowering, dtype, weight, linears, (weight(ROPE_COS), weight(ROPE_SIN)), config.norm_eps
        )
        self.mask_type = lowering.softmax_type(dtype) if config.is_block_causal else dtype
        self.constants = [
            op.initializer(ir.tensor(value, dtype=self.mask_type), name)
            for name, value in (("valid", 0.0), ("masked", MASKED))
        ]

    def build(self, window: GraphInputs, caches: list[Caches]) -> tuple[ir.Value, list[Pair]]:
        """Logits [B*R, V] (float32) of the requested rows, and the keys and values to return, a pair per
        layer."""
        op, returned = self.op, []
        embedding = self.weight(EMBEDDING)
        x = op.Gather(embedding, op.Reshape(window.input_ids, [-1]), axis=0)
        if embedding.dtype != self.dtype:
            x = op.Cast(x, to=int(self.dtype))
        rows = self._rows(window, caches[0][0], window.position_ids, window.row_len)
        write_index = window.write_index
        if (
            write_index is None and caches[0][0] is not None
        ):  # TensorRT-RTX 1.7 builds this form of one zero per row
            lengths = (
                op.ReduceMin(window.row_len, [1], keepdims=0) if window.kv_len is None else window.kv_len
            )
            write_index = op.Min(lengths, 0)
        for i, cache in enumerate(caches):
            wanted = self._wanted(window, caches[0][0]) if i == self.config.num_layers - 1 else None
            x, pair = self._layer(i, x, rows, wanted, cache, write_index, prefix=window.write_index is None)
            x.name = layer_name(i, OUTPUT)  # verify exposes the residual stream under this name
            returned.append(pair)
        x = self.on.float32(self.on.norm(x, FINAL_NORM))
        return self.linears.head(op, x, EMBEDDING if self.config.tied_head else HEAD, self.weight), returned

    def _layer(
        self,
        i: int,
        x: ir.Value,
        rows: Rows,
        wanted: tuple[Rows, Callable[[ir.Value], ir.Value]] | None,
        cache: Caches,
        write_index: ir.Value | None,
        *,
        prefix: bool,
    ) -> tuple[ir.Value, Pair]:
        on, attention = self.on, self.config.attention
        h = on.norm(x, layer_name(i, "attention_norm"))
        key, value = attention.keys_and_values(on, h, i, rows)
        if wanted is not None:
            rows, picked = wanted
            h, x = picked(h), picked(x)
        query = attention.queries(on, h, i, rows)
        (keys, new_key), (values, new_value) = (
            (new, new)
            if old is None or write_index is None
            else self.lowering.extend(self.op, old, new, write_index)
            for old, new in zip(cache, (key, value), strict=True)
        )
        if prefix:
            keys, values = key, value
        x = self.op.Add(x, attention.attend(on, query, i, rows, keys, values))
        h = on.norm(x, layer_name(i, "mlp_norm"))
        return self.op.Add(x, self.config.feed_forward_of(i).build(on, h, i)), (new_key, new_value)

    def _rows(
        self,
        window: GraphInputs,
        cache: ir.Value | None,
        positions: ir.Value,
        row_len: ir.Value | None,
    ) -> Rows:
        """Rows at `positions` [B, rows], attending to the window's own keys (prefix) or to the cache (refine)
        up to kv_len, or each up to its own row_len [B, rows]."""
        if row_len is not None:
            return self._rows_of_blocks(window, cache, positions, row_len)
        op = self.op
        assert window.kv_len is not None
        length = op.Unsqueeze(window.kv_len, [1])
        if cache is None or window.write_index is None:
            valid = [self.lowering.valid_rows(op, window.input_ids, length)]
        else:
            valid = self.lowering.valid_keys(
                op, cache, window.input_ids, op.Unsqueeze(window.write_index, [1]), length
            )
        pieces = [op.Where(piece, self.constants[0], self.constants[1]) for piece in valid]
        masked = (
            op.Concat(*pieces, axis=1) if len(pieces) > 1 else pieces[0]
        )  # [B, keys]; booleans do not concatenate everywhere
        row_axis = op.Cast(op.Mul(positions, 0), to=int(self.dtype))  # [B, rows] of zeros
        fold = self.config.attention.fold  # the mask is that of every row, so heads may be rows
        if fold > 1:
            row_axis = op.Concat(*[row_axis] * fold, axis=1)
        mask = op.Add(op.Unsqueeze(masked, [1, 2]), op.Unsqueeze(row_axis, [1, 3]))
        return Rows(positions, op.Shape(positions), mask, self.mask_type, fold)

    def _rows_of_blocks(
        self, window: GraphInputs, cache: ir.Value | None, positions: ir.Value, row_len: ir.Value
    ) -> Rows:
        """As _rows, with a mask for each row: pieces are [B, rows, keys]."""
        op, length = self.op, self.op.Unsqueeze(row_len, [2])
        if cache is None or window.write_index is None:
            ids = op.Unsqueeze(window.input_ids, [1])
            valid = [self.lowering.valid_rows(op, ids, length, axis=2)]
        else:
            written = op.Unsqueeze(window.write_index, [1, 2])
            valid = self.lowering.valid_keys(op, cache, window.input_ids, written, length)
        pieces = [op.Where(piece, self.constants[0], self.constants[1]) for piece in valid]
        masked = op.Concat(*pieces, axis=2) if len(pieces) > 1 else pieces[0]
        return Rows(positions, op.Shape(positions), op.Unsqueeze(masked, [1]), self.mask_type)

    def _wanted(
        self, window: GraphInputs, cache: ir.Value | None
    ) -> tuple[Rows, Callable[[ir.Value], ir.Value]]:
        """The requested rows, and the function that selects them."""
        op = self.op
        positions = op.GatherElements(window.position_ids, window.logit_rows, axis=1)
        shape, index = (
            op.Concat(op.Shape(window.input_ids), [self.config.hidden_size], axis=0),
            op.Unsqueeze(window.logit_rows, [2]),
        )

        def picked(x: ir.Value) -> ir.Value:
            """The requested rows [B*R, K] of x [B*S, K]. Not by an index into B*S: TensorRT computes such row
            offsets on the host."""
            return op.Reshape(
                op.GatherND(op.Reshape(x, shape), index, batch_dims=1), [-1, self.config.hidden_size]
            )

        row_len = window.row_len
        if row_len is not None:
            row_len = op.GatherElements(row_len, window.logit_rows, axis=1)
        return self._rows(window, cache, positions, row_len), picked
