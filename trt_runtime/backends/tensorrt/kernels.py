"""The kernels of plugins/ that an engine is built with: compiled, named with their hashes, and put into the
parsed network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trt_runtime.artifact.manifest import Manifest
from trt_runtime.backends import cuda
from trt_runtime.backends.tensorrt.build_config import DENSE_ROWS, BuildConfig, EnginePlan
from trt_runtime.backends.tensorrt.builder import Edit
from trt_runtime.errors import DllmError
from trt_runtime.optional import import_optional
from trt_runtime.system import commands

# changes a parsed network of an engine; called with the network and the package
Put = Callable[[EnginePlan, Any, Any], None]


def kernels_of(
    artifact: Path, manifest: Manifest, config: BuildConfig, gpu: cuda.Facts | None
) -> tuple[Callable[[EnginePlan], Edit | None], dict[str, Any], dict[str, str]]:
    """The function that puts kernels into the parsed network of an engine, facts about all kernels with
    their hashes, and the files of those that the runtime launches. TensorRT-RTX does not support plugins: its
    engines have the commit kernel only."""
    if not config.plugins or gpu is None:
        return lambda plan: None, {}, {}
    mask, target = manifest.decoding.mask_token_id, gpu.compute_capability
    commit = _module("commit", "--plugins").compiled(mask, config.block_length, target)
    facts: dict[str, Any] = {
        "commit": {
            "file": "commit.ptx",
            "threads": commit.threads,
            "shared": commit.shared,
            "columns": config.block_length,
            **_described(commit),
        }
    }
    files = {"commit.ptx": commit.ptx}
    if config.backend != "tensorrt":
        return lambda plan: None, facts, files
    put: list[Put] = []
    for named, each in _of_engines(artifact, manifest, config, target):
        facts |= {name: _described(compiled) for name, compiled in named.items()}
        put.append(each)

    def edit_of(plan: EnginePlan) -> Edit:
        def edit(network: Any, trt: Any) -> None:
            for each in put:
                each(plan, network, trt)

        return edit

    return edit_of, facts, files


def _of_engines(
    artifact: Path, manifest: Manifest, config: BuildConfig, target: int
) -> Iterator[tuple[dict[str, Any], Put]]:
    """The compiled kernels of each part of the network, and how they are put into it."""
    tool = _module("tensorrt_networks", "--plugins")
    mask, model = manifest.decoding.mask_token_id, manifest.model
    if config.head_plugin:
        head = _module("head_statistics", "--head-plugin")
        sizes = head.HeadSizes(model.vocab_size, model.hidden_size, mask, model.dtype)
        yield (
            _compiled(head, "head", sizes, target),
            lambda plan, network, trt: tool.replace_head(
                network, trt, mask, tool.head_layers(network, trt, target)
            ),
        )
    else:
        statistics = _module("row_statistics", "--plugins").compiled(model.vocab_size, mask, target)
        yield (
            {"row_statistics": statistics},
            lambda plan, network, trt: tool.replace_statistics(
                network, trt, mask, tool.statistics_layer(network, trt, target)
            ),
        )
    if config.attention_plugin:
        scale = attention_scale(artifact / manifest.graphs["refine"].file)
        attention, shape = _module("attention", "--attention-plugin"), (model.num_kv_heads, model.head_dim)
        sizes = attention.AttentionSizes(*shape, config.capacity, scale, model.dtype)

        def attend(plan: EnginePlan, network: Any, trt: Any) -> None:
            if config.replaces_attention(plan):
                make = tool.attention_layers(network, trt, target)
                tool.replace_attention(network, trt, scale, model.dtype, model.num_layers, make)

        yield _compiled(attention, "attention", sizes, target), attend
    if config.experts_plugin and (experts := model.experts) is not None:
        kernels = _module("experts", "--experts-plugin")
        sizes = kernels.Sizes(
            experts.num_experts, experts.intermediate_size, model.hidden_size, experts.top_k, model.dtype
        )

        def mix(plan: EnginePlan, network: Any, trt: Any) -> None:
            if plan.rows > DENSE_ROWS:
                layers = tool.experts_layers(network, trt, target)
                tool.replace_experts(network, trt, experts, model.dtype, layers)

        yield _compiled(kernels, "experts", sizes, target), mix


def attention_scale(graph: Path) -> float:
    """The scale of the attention nodes of a graph. Raises DllmError if it has none, or they differ."""
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph.node
    scales = {
        onnx.helper.get_attribute_value(attribute)
        for node in nodes
        if node.op_type == "Attention"
        for attribute in node.attribute
        if attribute.name == "scale"
    }
    if len(scales) != 1:
        raise DllmError(
            f"{graph}: its attention has {len(scales)} scales, expected one: export the artifact again."
        )
    return float(scales.pop())


def _module(name: str, option: str) -> Any:
    return import_optional(f"plugins.{name}", option, commands.install("kernels"))


def _compiled(module: Any, prefix: str, sizes: Any, target: int) -> dict[str, Any]:
    """All kernels of a module, by name."""
    return {f"{prefix}_{name}": module.compiled(name, sizes, target) for name in module.KERNELS}


def _described(compiled: Any) -> dict[str, str]:
    """A kernel's entry, and its hash."""
    return {"entry": compiled.name, "sha256": hashlib.sha256(compiled.ptx.encode()).hexdigest()}
