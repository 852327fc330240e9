"""The kernels as quick plugins of TensorRT (`tensorrt.plugin`, 10.16 and 11.4), compiled ahead of time.

The engine contains the PTX, and needs neither Python nor Triton at run time. TensorRT passes input pointers,
extra int32 arguments, then output pointers: a kernel has the same order. TensorRT-RTX does not support such
plugins. Where they go in a network: tensorrt_networks.py.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trt_runtime.errors import DllmError

from . import attention, experts, head_statistics, row_statistics
from .compile import CompiledKernel

NAMESPACE = "dllm"
_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int32": "int32", "int64": "int64"}
Outputs = list[tuple[tuple[Any, ...], str]]


@dataclass(frozen=True)
class Plugin:
    """A kernel as TensorRT knows it. facts: what it is compiled for, as text.

    inputs: their names. outputs: shapes and types, of the inputs' shapes and the facts. grid: the number of
    programs along two axes. rows: an extra argument of the kernel, if it has one. compiled: the kernel, of
    the facts and the compute capability.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: Callable[[Sequence[Any], str], Outputs]
    grid: Callable[[Sequence[Any], str], tuple[Any, Any]]
    compiled: Callable[[str, int], CompiledKernel]
    rows: Callable[[Sequence[Any], str], Any] | None = None


def _statistics(facts: str, compute_capability: int) -> CompiledKernel:
    vocab, mask_token_id = map(int, facts.split())
    return row_statistics.compiled(vocab, mask_token_id, compute_capability)


STATISTICS = Plugin(
    "row_statistics",
    ("logits",),
    lambda shapes, facts: [((shapes[0][0],), kind) for kind in ("int64", "fp32", "fp32", "fp32")],
    lambda shapes, facts: (shapes[0][0], 1),
    _statistics,
)


def _parsed(sizes: Callable[..., Any], facts: str) -> Any:
    """Sizes, of whole numbers and at last a type."""
    *numbers, dtype = facts.split()
    return sizes(*map(int, numbers), dtype)


def head_sizes(facts: str) -> head_statistics.HeadSizes:
    """The sizes that a plugin of the head is compiled for."""
    parsed: head_statistics.HeadSizes = _parsed(head_statistics.HeadSizes, facts)
    return parsed


def _head(kernel: str, inputs: tuple[str, ...], outputs: Callable[[Any, int], Outputs], axis: int) -> Plugin:
    """One of the kernels of the head. outputs: of the number of rows and of tiles; axis: of the first input's
    shape, that of the rows."""
    return Plugin(
        f"head_{kernel}",
        inputs,
        lambda shapes, facts: outputs(shapes[0][axis], head_sizes(facts).tiles),
        lambda shapes, facts: head_statistics.grids(head_sizes(facts), shapes[0][axis])[kernel],
        lambda facts, compute_capability: head_statistics.compiled(
            kernel, head_sizes(facts), compute_capability
        ),
        lambda shapes, facts: shapes[0][axis],
    )


HEAD = {
    "partial": _head(
        "partial",
        ("hidden", "head"),
        lambda rows, tiles: [((len(head_statistics.PARTS), rows, tiles), "fp32"), ((rows, tiles), "int32")],
        0,
    ),
    "merge": _head(
        "merge",
        ("parts", "chosen"),
        lambda rows, tiles: [((rows,), kind) for kind in ("int64", "fp32", "fp32", "fp32")],
        1,
    ),
}


def attention_sizes(facts: str) -> tuple[attention.AttentionSizes, int]:
    """The sizes that a plugin of attention is compiled for, and the query heads of a KV head."""
    heads, size, capacity, scale, dtype, group = facts.split()
    return attention.AttentionSizes(int(heads), int(size), int(capacity), float(scale), dtype), int(group)


def _attention(
    kernel: str, inputs: tuple[str, ...], outputs: Callable[[Any, attention.AttentionSizes, Any], Outputs]
) -> Plugin:
    """One of the kernels of attention, whose first input is the query [B, N, S, D]. outputs: of its shape,
    and of the number of query rows in all."""

    def rows(shapes: Sequence[Any], facts: str) -> Any:
        group = attention_sizes(facts)[1]
        return shapes[0][2] * group if group > 1 else shapes[0][2]

    def count(shapes: Sequence[Any], facts: str) -> Any:
        return shapes[0][0] * attention_sizes(facts)[0].heads * rows(shapes, facts)

    def grid(shapes: Sequence[Any], facts: str) -> tuple[Any, Any]:
        return attention.grids(attention_sizes(facts)[0], shapes[0][0], rows(shapes, facts))[kernel]

    def compiled(facts: str, compute_capability: int) -> CompiledKernel:
        return attention.compiled(kernel, attention_sizes(facts)[0], compute_capability)

    return Plugin(
        f"attention_{kernel}",
        inputs,
        lambda shapes, facts: outputs(shapes[0], attention_sizes(facts)[0], count(shapes, facts)),
        grid,
        compiled,
        rows,
    )


ATTENTION = {
    "attend": _attention(
        "attend",
        ("query", "key", "value", "kv_len"),
        lambda shape, sizes, count: [
            ((count, sizes.parts, sizes.head_dim), "fp32"),
            ((count, sizes.parts, 2), "fp32"),
        ],
    ),
    "combine": _attention(
        "combine", ("query", "sums", "norms"), lambda shape, sizes, count: [(tuple(shape), sizes.dtype)]
    ),
}


def sizes_of(facts: str) -> experts.Sizes:
    """The sizes that a plugin of experts is compiled for."""
    parsed: experts.Sizes = _parsed(experts.Sizes, facts)
    return parsed


def _experts(
    kernel: str,
    inputs: tuple[str, ...],
    outputs: Callable[[Any, experts.Sizes], Outputs],
    rows: Callable[[Sequence[Any], experts.Sizes], Any],
) -> Plugin:
    """One of the kernels of experts. outputs: of the number of rows."""
    return Plugin(
        f"experts_{kernel}",
        inputs,
        lambda shapes, facts: outputs(rows(shapes, sizes_of(facts)), sizes_of(facts)),
        lambda shapes, facts: experts.grids(sizes_of(facts), rows(shapes, sizes_of(facts)))[kernel],
        lambda facts, compute_capability: experts.compiled(kernel, sizes_of(facts), compute_capability),
        lambda shapes, facts: rows(shapes, sizes_of(facts)),
    )


EXPERTS = {
    "sort_rows": _experts(
        "sort_rows",
        ("weights",),
        lambda rows, sizes: [
            ((sizes.experts,), "int32"),
            ((sizes.experts, rows), "int32"),
            ((rows, sizes.experts), "int32"),
        ],
        lambda shapes, sizes: shapes[0][0],
    ),
    "inner": _experts(
        "inner",
        ("hidden", "gate", "up", "counts", "order"),
        lambda rows, sizes: [((rows * sizes.top_k, sizes.inner), sizes.dtype)],
        lambda shapes, sizes: shapes[0][0],
    ),
    "outer": _experts(
        "outer",
        ("units", "down", "counts"),
        lambda rows, sizes: [((rows * sizes.top_k, sizes.hidden), "fp32")],
        lambda shapes, sizes: shapes[0][0] // sizes.top_k,
    ),
    "combine": _experts(
        "combine",
        ("parts", "weights", "counts", "places"),
        lambda rows, sizes: [((rows, sizes.hidden), sizes.dtype)],
        lambda shapes, sizes: shapes[1][0],
    ),
}


def register(plugin: Plugin, trt: Any) -> Any:
    """The plugin's definition, registered on the first call in a process. `trt` is the package `tensorrt`."""
    library = importlib.import_module(f"{trt.__name__}.plugin")
    known = getattr(getattr(library.op, NAMESPACE, None), plugin.name, None)
    if known is not None:
        return known
    name, count = f"{NAMESPACE}::{plugin.name}", len(plugin.inputs)

    def describe(*given: Any, facts: str, compute_capability: str) -> Any:
        shapes = [item.shape_expr for item in given]
        return tuple(
            library.from_shape_expr(shape, getattr(trt, _TYPES[kind]))
            for shape, kind in plugin.outputs(shapes, facts)
        )

    def implement(*given: Any, **_: Any) -> Any:
        shapes, (facts, capability) = [item.shape_expr for item in given[:count]], given[count : count + 2]
        made = plugin.compiled(facts, int(capability))
        along, across = plugin.grid(shapes, facts)
        launch = library.KernelLaunchParams(
            grid_x=along, grid_y=across, block_x=made.threads, shared_mem=made.shared
        )
        extra = library.SymIntExprs(0 if plugin.rows is None else 1)
        if plugin.rows is not None:
            extra[0] = library.SymInt32(plugin.rows(shapes, facts))
        return made.name, made.ptx, launch, extra

    # the package reads signatures; attributes of type int and float fail in 10.16 with NumPy 2.4, which
    # converts no array to a scalar: hence str
    tensors = dict.fromkeys(plugin.inputs, library.TensorDesc)
    attributes = {"facts": str, "compute_capability": str}
    outputs = tuple[(library.TensorDesc,) * len(plugin.outputs(_UNKNOWN[:count], _FACTS[plugin.name]))]
    _sign(describe, tensors | attributes, outputs)
    _sign(
        implement,
        tensors | attributes | {"outputs": outputs, "tactic": int},
        tuple[str, str, library.KernelLaunchParams, library.SymIntExprs],
    )
    library.register(name)(describe)
    library.aot_impl(name)(implement)
    return getattr(getattr(library.op, NAMESPACE), plugin.name)


ALL = (STATISTICS, *EXPERTS.values(), *HEAD.values(), *ATTENTION.values())
_UNKNOWN = ((1, 1, 1, 1),) * max(len(plugin.inputs) for plugin in ALL)
_FACTS = {
    STATISTICS.name: "1 0",
    **{plugin.name: "1 1 1 1 fp32" for plugin in EXPERTS.values()},
    **{plugin.name: "1 1 0 fp32" for plugin in HEAD.values()},
    **{plugin.name: "1 16 64 1 fp32 1" for plugin in ATTENTION.values()},
}


def _sign(function: Any, arguments: dict[str, Any], result: Any) -> None:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=held) for name, held in arguments.items()],
        return_annotation=result,
    )


def layer(
    network: Any, trt: Any, plugin: Plugin, inputs: Sequence[Any], facts: str, target: int
) -> list[Any]:
    """The outputs of a plugin's layer, added to the network. target: the GPU's compute capability. Raises
    DllmError."""
    definition = register(plugin, trt)
    made = network.add_plugin(definition(*inputs, facts=facts, compute_capability=str(target)), aot=True)
    if made is None:
        raise DllmError(
            f"TensorRT {trt.__version__} rejected the plugin {NAMESPACE}::{plugin.name}: build without it."
        )
    return [made.get_output(i) for i in range(made.num_outputs)]
