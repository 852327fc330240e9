"""A graph quantised for the CPU, rewritten in standard operators and float arithmetic, which are
correct on every processor.

ONNX Runtime's own operators for 8-bit and 4-bit products are fast, and wrong on processors where a kernel's
sums overflow (trt_runtime/backends/ort/int8.py). Here each of them is expanded into what it should compute;
run without optimisation, the expanded graph gives the right result on any machine.

Shape letters: T tokens, K inputs, N outputs of a layer, G blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ..graph.linears import MICROSOFT

_TINY = 1e-20  # the scale of numbers that are all zeros


def spelled(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model over the same weights. Raises KeyError for an unknown operator."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph, tensors = copy.graph, {tensor.name: tensor for tensor in copy.graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes += _RULES[node.op_type](node, tensors, graph) if node.domain == MICROSOFT else [node]
    del graph.node[:]
    graph.node.extend(nodes)
    return copy


def _integer(node: NodeProto, tensors: dict[str, TensorProto], graph: onnx.GraphProto) -> list[NodeProto]:
    """MatMulIntegerToFloat: y = (a - zero) @ b * (a_scale * b_scale); a uint8 [T, K], b int8 [K, N]."""
    a, b, a_scale, b_scale, zero = node.input[:5]
    names = _Names(node)
    return [
        helper.make_node("Cast", [a], [names("a")], to=TensorProto.FLOAT),
        helper.make_node("Cast", [zero], [names("zero")], to=TensorProto.FLOAT),
        helper.make_node("Sub", [names("a"), names("zero")], [names("centred")]),
        helper.make_node("Cast", [b], [names("b")], to=TensorProto.FLOAT),
        helper.make_node("MatMul", [names("centred"), names("b")], [names("product")]),
        helper.make_node("Mul", [a_scale, b_scale], [names("scale")]),
        helper.make_node("Mul", [names("product"), names("scale")], [node.output[0]]),
    ]


def _blocks(node: NodeProto, tensors: dict[str, TensorProto], graph: onnx.GraphProto) -> list[NodeProto]:
    """MatMulNBits of accuracy level 4: x [T, K] is rounded to 8 bits in blocks, each with the scale of its
    largest magnitude; the weight is (b - middle) * scale in the same blocks."""
    x, stored, scales = node.input[:3]
    facts = {item.name: item.i for item in node.attribute}
    inputs, block, bits = facts["K"], facts["block_size"], facts["bits"]
    names, number = _Names(node), -(-facts["K"] // facts["block_size"])
    weight = tensors[stored]
    weight.data_type = (
        TensorProto.UINT4 if bits == 4 else TensorProto.UINT8
    )  # the same bytes, the first number in the lower half
    weight.dims[:] = [facts["N"], number * block]
    scale = tensors[scales]
    scale.dims[:] = [facts["N"], number]

    def constant(name: str, value: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), names(name)))
        return names(name)

    whole = np.full((facts["N"], number), 1 << bits - 1, np.uint8)
    graph.initializer.append(
        helper.make_tensor(names("middle"), weight.data_type, whole.shape, whole.reshape(-1).tolist())
        if bits == 4
        else numpy_helper.from_array(whole, names("middle"))
    )
    pads = constant("pads", np.array([0, 0, 0, number * block - inputs], np.int64))
    split = constant("split", np.array([-1, number, block], np.int64))
    joined = constant("joined", np.array([-1, number * block], np.int64))
    share, tiny, last = (
        constant(key, value)
        for key, value in (
            ("share", np.float32(1 / 127)),
            ("tiny", np.float32(_TINY)),
            ("last", np.array([-1], np.int64)),
        )
    )
    return [
        helper.make_node("Pad", [x, pads], [names("padded")]),
        helper.make_node("Reshape", [names("padded"), split], [names("x")]),
        helper.make_node("Abs", [names("x")], [names("magnitude")]),
        helper.make_node("ReduceMax", [names("magnitude"), last], [names("largest")], keepdims=1),
        helper.make_node("Mul", [names("largest"), share], [names("step")]),
        helper.make_node("Max", [names("step"), tiny], [names("own")]),
        helper.make_node("Div", [names("x"), names("own")], [names("ratio")]),
        helper.make_node("Round", [names("ratio")], [names("rounded")]),
        helper.make_node("Mul", [names("rounded"), names("own")], [names("blocks")]),
        helper.make_node("Reshape", [names("blocks"), joined], [names("rows")]),
        helper.make_node(
            "DequantizeLinear", [stored, scales, names("middle")], [names("weight")], axis=1, block_size=block
        ),
        helper.make_node("Transpose", [names("weight")], [names("turned")], perm=[1, 0]),
        helper.make_node("MatMul", [names("rows"), names("turned")], [node.output[0]]),
    ]


def _experts(node: NodeProto, tensors: dict[str, TensorProto], graph: onnx.GraphProto) -> list[NodeProto]:
    """QMoE of 4 bits: every expert in float arithmetic over its dequantised weights, weighted by the
    operator's router_weights [T, E]; activations are rounded to 8 bits in blocks before both products."""
    facts = {item.name: item.i for item in node.attribute}
    names, block = _Names(node), facts["block_size"]
    x, inner, inner_scale, outer, outer_scale, weights = (node.input[i] for i in (0, 2, 3, 5, 6, 14))

    def constant(name: str, value: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), names(name)))
        return names(name)

    def product(name: str, rows: str, stored: str, scale: str) -> list[NodeProto]:
        lead = [] if name == "inner" else [tensors[scale].dims[0]]
        return _of_experts(names, name, (rows, stored, scale), (tensors, graph), (block, lead))

    for key, value in (("share", np.float32(1 / 127)), ("tiny", np.float32(_TINY)), ("last", np.array([-1]))):
        constant(key, value)
    first, axis = constant("first", np.array([0], np.int64)), constant("axis", np.array([2], np.int64))
    count, doubled = tensors[inner_scale].dims[:2]
    pairs = constant("pairs", np.array([count, -1, doubled // 2, 2], np.int64))
    zero, one = constant("zero", np.int64(0)), constant("one", np.int64(1))
    return [
        *product("inner", x, inner, inner_scale),
        helper.make_node("Reshape", [names("inner.product"), pairs], [names("pair")]),
        helper.make_node("Gather", [names("pair"), zero], [names("gate")], axis=3),
        helper.make_node("Gather", [names("pair"), one], [names("up")], axis=3),
        helper.make_node("Sigmoid", [names("gate")], [names("sigmoid")]),
        helper.make_node("Mul", [names("gate"), names("sigmoid")], [names("silu")]),
        helper.make_node("Mul", [names("silu"), names("up")], [names("act")]),
        *product("outer", names("act"), outer, outer_scale),
        helper.make_node("Transpose", [weights], [names("by_expert")], perm=[1, 0]),
        helper.make_node("Unsqueeze", [names("by_expert"), axis], [names("shares")]),
        helper.make_node("Mul", [names("outer.product"), names("shares")], [names("weighted")]),
        helper.make_node("ReduceSum", [names("weighted"), first], [node.output[0]], keepdims=0),
    ]


def _of_experts(
    names: _Names,
    name: str,
    inputs: tuple[str, str, str],
    where: tuple[dict[str, TensorProto], onnx.GraphProto],
    sizes: tuple[int, list[int]],
) -> list[NodeProto]:
    """Rows [..., T, K], rounded to 8 bits in blocks, times the experts' weights [E, N, K]: [E, T, N]. inputs:
    rows, weights, scales; sizes: of a block, and the rows' axes before T."""
    (rows, stored, scale), (tensors, graph), (block, lead) = inputs, where, sizes
    count, outputs, number = tensors[scale].dims
    tensors[stored].data_type = TensorProto.UINT4
    tensors[stored].dims[:] = [count, outputs, number * block]
    middle = [8] * (count * outputs * number)
    graph.initializer.extend(
        [
            helper.make_tensor(names(f"{name}.middle"), TensorProto.UINT4, tensors[scale].dims, middle),
            numpy_helper.from_array(np.array([*lead, -1, number, block], np.int64), names(f"{name}.split")),
            numpy_helper.from_array(np.array([*lead, -1, number * block], np.int64), names(f"{name}.joined")),
        ]
    )

    def own(part: str) -> str:
        return names(f"{name}.{part}")

    share, tiny, last = names("share"), names("tiny"), names("last")
    return [
        helper.make_node("Reshape", [rows, own("split")], [own("x")]),
        helper.make_node("Abs", [own("x")], [own("magnitude")]),
        helper.make_node("ReduceMax", [own("magnitude"), last], [own("largest")], keepdims=1),
        helper.make_node("Mul", [own("largest"), share], [own("step")]),
        helper.make_node("Max", [own("step"), tiny], [own("scale")]),
        helper.make_node("Div", [own("x"), own("scale")], [own("ratio")]),
        helper.make_node("Round", [own("ratio")], [own("rounded")]),
        helper.make_node("Mul", [own("rounded"), own("scale")], [own("blocks")]),
        helper.make_node("Reshape", [own("blocks"), own("joined")], [own("rows")]),
        helper.make_node(
            "DequantizeLinear", [stored, scale, own("middle")], [own("weight")], axis=2, block_size=block
        ),
        helper.make_node("Transpose", [own("weight")], [own("turned")], perm=[0, 2, 1]),
        helper.make_node("MatMul", [own("rows"), own("turned")], [own("product")]),
    ]


class _Names:
    """Names of the values inside the expansion of one node."""

    def __init__(self, node: NodeProto) -> None:
        self.first = node.output[0]

    def __call__(self, name: str) -> str:
        return f"{self.first}.spelled.{name}"


_RULES: dict[str, Callable[[NodeProto, dict[str, TensorProto], onnx.GraphProto], list[NodeProto]]] = {
    "MatMulIntegerToFloat": _integer,
    "MatMulNBits": _blocks,
    "QMoE": _experts,
}
