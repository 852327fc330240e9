"""The prefix graph and the refine graph: the decoder, the statistics, and the contract's names around
them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder, OpBuilder

from trt_runtime.artifact import contract

from . import lowering as lowerings
from .decoder import Decoder, DecoderConfig, GraphInputs
from .linears import MICROSOFT, Linears

IR_DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_SPEC_DTYPES = {"int64": ir.DataType.INT64, "float32": ir.DataType.FLOAT,
                "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}  # fmt: skip


def dims_of(config: DecoderConfig, dtype: str, lowering: str = contract.MODERN) -> contract.Dims:
    sizes = (config.num_layers, config.attention.num_kv_heads, config.attention.head_dim, config.vocab_size)
    attention = contract.BLOCK_CAUSAL if config.is_block_causal else contract.FULL
    return contract.Dims(*sizes, contract.DTYPES[dtype], lowering, attention)


def build(
    role: str,
    config: DecoderConfig,
    *,
    dtype: str,
    head: str,
    mask_token_id: int,
    weights: Mapping[str, ir.TensorProtocol],
    lowering: str = contract.MODERN,
    linears: Linears | None = None,
) -> ir.Model:
    """The graph of a role ('prefix' or 'refine'), with `weights` (usually ir.ExternalTensor) as its
    initializers; only their types and shapes are read.

    dtype: one of contract.DTYPES; head: one of contract.HEADS; lowering: one of lowering.LOWERINGS; linears:
    a scheme of quantised layers, or None.
    """
    spelled = lowerings.find(lowering)
    linears = linears or Linears()
    opsets = {"": spelled.OPSET} | ({MICROSOFT: 1} if linears.operators else {})
    graph = ir.Graph([], [], nodes=[], opset_imports=opsets, name=role)
    builder = GraphBuilder(graph)
    dims = dims_of(config, dtype, lowering)
    inputs = {
        spec.name: builder.input(spec.name, _SPEC_DTYPES[spec.dtype], list(spec.axes))
        for spec in contract.inputs(role, dims)
    }
    registered: dict[str, ir.Value] = {}

    def weight(name: str) -> ir.Value:
        if name not in registered:
            registered[name] = builder.initializer(weights[name], name)
        return registered[name]

    names = contract.cache_names("cache", dims)
    caches = [
        (inputs.get(key), inputs.get(value)) for key, value in zip(names[::2], names[1::2], strict=True)
    ]
    given: dict[str, Any] = {item.name: inputs.get(item.name) for item in fields(GraphInputs)}
    window = GraphInputs(**given)
    logits, returned = Decoder(builder.op, config, spelled, IR_DTYPES[dtype], weight, linears).build(
        window, caches
    )
    values = _statistics(builder.op, logits, window.logit_rows, mask_token_id, config.vocab_size)
    tensors = [tensor for pair in returned for tensor in pair]
    values |= dict(zip(contract.returned_names(dims), tensors, strict=True))
    for spec in contract.outputs(role, dims, head):
        value = values[spec.name]
        value.name, value.shape, value.dtype = spec.name, ir.Shape(spec.axes), _SPEC_DTYPES[spec.dtype]
        builder.add_output(value, spec.name)
    # also if it is not an output: verify exposes it under this name
    values[contract.LOGITS].name = contract.LOGITS
    for node in graph:
        node.metadata_props.clear()
    return ir.Model(graph, ir_version=11 if spelled.OPSET >= 23 else 8, producer_name="dllm-trt")


def _statistics(
    op: OpBuilder, logits: ir.Value, logit_rows: ir.Value, mask_token_id: int, vocab_size: int
) -> dict[str, ir.Value]:
    """Token, confidence, runner-up and entropy of the softmax of logits [B*R, V] (float32).

    The mask token is never proposed, but keeps its share of the softmax. The best three tokens suffice: the
    proposal is the first of them that is not the mask, the runner-up the next.
    """
    shape = op.Shape(logit_rows)
    best, ids = op.TopK(logits, [3], axis=-1, largest=1, sorted=1, _outputs=2)
    top, second, third = op.Split(best, [1, 1, 1], axis=-1, _outputs=3)
    top_id, second_id, _ = op.Split(ids, [1, 1, 1], axis=-1, _outputs=3)
    top_is_mask, second_is_mask = op.Equal(top_id, mask_token_id), op.Equal(second_id, mask_token_id)
    shifted = op.Sub(logits, top)
    weights = op.Exp(shifted)
    total = op.ReduceSum(weights, [-1], keepdims=1)
    proposed = op.Where(top_is_mask, second, top)
    runner_up = op.Where(op.Or(top_is_mask, second_is_mask), third, second)
    entropy = op.Sub(op.Log(total), op.Div(op.ReduceSum(op.Mul(weights, shifted), [-1], keepdims=1), total))
    return {
        "token": op.Reshape(op.Where(top_is_mask, second_id, top_id), shape),
        "confidence": op.Reshape(op.Div(op.Exp(op.Sub(proposed, top)), total), shape),
        "runner_up": op.Reshape(op.Div(op.Exp(op.Sub(runner_up, top)), total), shape),
        "entropy": op.Reshape(entropy, shape),
        contract.LOGITS: op.Reshape(logits, op.Concat(shape, [vocab_size], axis=0)),
    }
