"""What a graph may not contain: the rules that keep one graph correct on ONNX Runtime and on TensorRT.

Each rule has a reason measured on a real parser: see docs/explanation/architecture.md. A graph that breaks
one would build and compute something else, so the export fails instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx_ir as ir

from trt_runtime.artifact import contract
from trt_runtime.errors import DllmError

from . import lowering as lowerings
from .linears import MICROSOFT

# ops that TensorRT cannot build, or whose output shapes it cannot bound
_FORBIDDEN_OPS = {
    "NonZero",
    "MatMulInteger",
    "DynamicQuantizeLinear",
    "Slice",
    "Loop",
    "If",
    "Scan",
    "ReduceLogSumExp",
}
# (op, attribute): the values that all targets interpret alike; the parser ignores or misreads others
_ATTRIBUTES: dict[tuple[str, str], set[Any]] = {
    ("Attention", "is_causal"): {0},
    ("Attention", "softcap"): {0.0},
    ("Attention", "softmax_precision"): set(),
    ("Attention", "qk_matmul_output_mode"): set(),
    ("Attention", "left_window_size"): set(),
    ("Attention", "right_window_size"): set(),
    ("RMSNormalization", "stash_type"): {1},
    ("RMSNormalization", "axis"): {-1},
    ("RotaryEmbedding", "interleaved"): {0},
    ("RotaryEmbedding", "rotary_embedding_dim"): {0},
    ("TensorScatter", "axis"): {-2},
    ("TensorScatter", "mode"): {"linear"},
}
_ATTENTION_INPUTS = (
    4  # query, key, value, mask: TensorRT silently ignores nonpad_kv_seqlen and refuses a past
)


def check(
    model: ir.Model, role: str, dims: contract.Dims, head: str, operators: frozenset[str] = frozenset()
) -> None:
    """Raise DllmError that lists every violation of the rules in a graph. operators: those of com.microsoft
    that it may contain."""
    if breaches := list(find(model, role, dims, head, operators)):
        raise DllmError(
            f"the {role} graph breaks {len(breaches)} rules of the contract: " + "; ".join(breaches)
        )


def find(
    model: ir.Model, role: str, dims: contract.Dims, head: str, operators: frozenset[str] = frozenset()
) -> Iterator[str]:
    """One sentence per violation."""
    graph = model.graph
    opset = lowerings.find(dims.lowering).OPSET
    if dict(graph.opset_imports) != {"": opset} | ({MICROSOFT: 1} if operators else {}):
        yield f"opset imports are {dict(graph.opset_imports)}, expected the standard opset {opset} alone"
    yield from _check_signature("input", graph.inputs, contract.inputs(role, dims))
    yield from _check_signature("output", graph.outputs, contract.outputs(role, dims, head))
    for value in graph.inputs:
        if not value.uses():
            yield f"input {value.name} is consumed by no node"
    for initializer in graph.initializers.values():
        if not initializer.uses():
            yield f"initializer {initializer.name} is consumed by no node"
        tensor = initializer.const_value
        if isinstance(tensor, ir.ExternalTensor) and (
            "/" in str(tensor.location) or ".." in str(tensor.location)
        ):
            yield f"initializer {initializer.name} lies in {tensor.location!s}, expected a bare file name"
    for node in graph:
        yield from _check_node(node, graph, operators)


def _check_signature(
    side: str, values: Iterable[ir.Value], specs: list[contract.TensorSpec]
) -> Iterator[str]:
    got = [
        (v.name, str(v.dtype).lower(), tuple(d if isinstance(d, int) else d.value for d in v.shape or ()))
        for v in values
    ]
    names = {"float32": "float"}
    expected = [(spec.name, names.get(spec.dtype, spec.dtype), spec.axes) for spec in specs]
    for mine, wanted in zip(got, expected, strict=False):
        if mine != wanted:
            yield f"{side} {mine}, the contract says {wanted}"
    if len(got) != len(expected):
        yield f"{len(got)} {side}s, the contract says {len(expected)}"


def _check_node(node: ir.Node, graph: ir.Graph, operators: frozenset[str]) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx") and not (node.domain == MICROSOFT and node.op_type in operators):
        yield f"{node.name}: {node.domain}.{node.op_type} is not a standard op, TensorRT cannot load it"
    if node.op_type in _FORBIDDEN_OPS:
        yield f"{node.name}: the op {node.op_type} does not build on every target"
    for name, attribute in node.attributes.items():
        allowed = _ATTRIBUTES.get((node.op_type, name))
        if allowed is not None and attribute.value not in allowed:
            yield (
                f"{node.name}: {node.op_type}.{name} is {attribute.value!r}, allowed: "
                f"{sorted(allowed) or 'not set'}"
            )
    if node.op_type == "Attention":
        yield from _check_attention(node)
    if (
        node.op_type == "Shape"
        and node.attributes
        and graph.opset_imports[""] == lowerings.find(contract.LEGACY).OPSET
    ):
        yield f"{node.name}: Shape has {sorted(node.attributes)}, which TensorRT 8.6 silently ignores"
    if node.op_type == "TensorScatter":
        if node.inputs[0] not in graph.inputs:
            yield f"{node.name}: the cache it writes is not a graph input"
        if node.outputs[0] not in graph.outputs:
            yield f"{node.name}: the written cache is not a graph output"


def _check_attention(node: ir.Node) -> Iterator[str]:
    used = [value for value in node.inputs if value is not None]
    if len(used) != len(node.inputs) or len(used) > _ATTENTION_INPUTS:
        yield (
            f"{node.name}: Attention has {len(node.inputs)} inputs, allowed are query, key, value and "
            f"mask (nonpad and past are not)"
        )
    if len([output for output in node.outputs if output.name]) != 1:
        yield f"{node.name}: Attention has {len(node.outputs)} outputs, allowed is one"
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        yield f"{node.name}: its mask is boolean, expected an additive mask"
