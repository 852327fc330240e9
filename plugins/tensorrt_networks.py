"""Kernels in the place of layers of a parsed TensorRT network, so that the artifact stays standard ONNX. The
names, shapes and order of the network's outputs do not change; the builder drops layers that nothing uses any
more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from trt_runtime.artifact.contract import LOGITS, STATISTICS
from trt_runtime.artifact.manifest import ExpertFacts
from trt_runtime.errors import DllmError

from . import tensorrt_plugins as plugins
from .attention import AttentionSizes
from .experts import Sizes
from .head_statistics import HeadSizes

# logits [rows, V] and the mask's id -> token, confidence, runner_up, entropy [rows]
Statistics = Callable[[Any, int], list[Any]]
# hidden [rows, K] and head [V, K] of the contract of head_statistics.py -> the same
Head = Callable[[HeadSizes, list[Any]], list[Any]]
# query, key, value and kv_len of the contract of attention.py, and the query heads of a KV head -> the result
Attention = Callable[[AttentionSizes, list[Any], int], Any]
# hidden, gate, up, down and weights of the contract of experts.py -> the result [rows, K]
Experts = Callable[[Sizes, list[Any]], Any]


def statistics_layer(network: Any, trt: Any, target: int) -> Statistics:
    """Statistics of a plugin added to the network. target: the GPU's compute capability."""

    def make(logits: Any, mask_token_id: int) -> list[Any]:
        facts = f"{logits.shape[1]} {mask_token_id}"
        return plugins.layer(network, trt, plugins.STATISTICS, [logits], facts, target)

    return make


def head_layers(network: Any, trt: Any, target: int) -> Head:
    """The head with its statistics, of two plugins added to the network."""

    def make(sizes: HeadSizes, tensors: list[Any]) -> list[Any]:
        facts = " ".join(map(str, sizes))
        parts = plugins.layer(network, trt, plugins.HEAD["partial"], tensors, facts, target)
        return plugins.layer(network, trt, plugins.HEAD["merge"], parts, facts, target)

    return make


def attention_layers(network: Any, trt: Any, target: int) -> Attention:
    """Attention of two plugins added to the network."""

    def make(sizes: AttentionSizes, tensors: list[Any], group: int) -> Any:
        facts = " ".join(map(str, (*sizes, group)))
        parts = plugins.layer(network, trt, plugins.ATTENTION["attend"], tensors, facts, target)
        query = tensors[0]
        return plugins.layer(network, trt, plugins.ATTENTION["combine"], [query, *parts], facts, target)[0]

    return make


def experts_layers(network: Any, trt: Any, target: int) -> Experts:
    """Experts of plugins added to the network, four for a layer of the model."""

    def make(sizes: Sizes, tensors: list[Any]) -> Any:
        hidden, gate, up, down, weights = tensors
        facts = " ".join(map(str, sizes))

        def add(kernel: str, *inputs: Any) -> list[Any]:
            return plugins.layer(network, trt, plugins.EXPERTS[kernel], inputs, facts, target)

        counts, order, places = add("sort_rows", weights)
        (units,) = add("inner", hidden, gate, up, counts, order)
        (parts,) = add("outer", units, down, counts)
        (out,) = add("combine", parts, weights, counts, places)
        return out

    return make


def replace_statistics(network: Any, trt: Any, mask_token_id: int, make: Statistics) -> None:
    """Replace the layers that compute the statistics. Each output [B, R] comes from a reshape, whose input
    becomes the new [B*R] tensor. Raises DllmError for a network of another form."""
    reshapes = _reshapes(network, trt)
    _put(reshapes, make(_logits(reshapes, trt), mask_token_id))


def replace_head(network: Any, trt: Any, mask_token_id: int, make: Head) -> None:
    """Replace the head's product as well: the logits [rows, V] are then not computed. Raises DllmError for a
    network of another form, and where the logits are an output."""
    if LOGITS in {network.get_output(i).name for i in range(network.num_outputs)}:
        raise DllmError(
            "the logits are an output: build without --head-plugin, or export with --head statistics."
        )
    reshapes, maker = _reshapes(network, trt), _makers(network)
    logits = _logits(reshapes, trt)
    product = maker[logits.name]
    if product.type != trt.LayerType.MATRIX_MULTIPLY:
        raise DllmError(
            f"the logits come from a {product.type}, expected a product: build without --head-plugin."
        )
    hidden, head = (_before_casts(maker, product.get_input(i), trt) for i in range(2))
    names = {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16"}
    sizes = HeadSizes(
        logits.shape[1], hidden.shape[1], mask_token_id, names.get(hidden.dtype, str(hidden.dtype))
    )
    if tuple(head.shape) != sizes[:2] or head.dtype != hidden.dtype or hidden.dtype not in names:
        raise DllmError(
            f"the head is {head.dtype} {tuple(head.shape)} of {hidden.dtype} {tuple(hidden.shape)}, expected "
            "[vocabulary, width] of the same type as what it multiplies: build without --head-plugin."
        )
    _put(reshapes, make(sizes, [hidden, head]))


def _before_casts(maker: dict[str, Any], tensor: Any, trt: Any) -> Any:
    """The tensor that casts make wider."""
    while _is_cast(layer := maker.get(tensor.name), trt):
        tensor = layer.get_input(0)
    return tensor


def _is_cast(layer: Any, trt: Any) -> bool:
    return layer is not None and layer.type in (trt.LayerType.IDENTITY, trt.LayerType.CAST)


def _reshapes(network: Any, trt: Any) -> dict[str, Any]:
    """The layers that give logits and statistics their shape."""
    maker = _makers(network)
    reshapes = {}
    for name in (LOGITS, *STATISTICS):
        # of head 'logits', an output: the parser may put a cast or an identity after the layer that the
        # graph names
        layer = maker.get(name)
        while _is_cast(layer, trt):
            layer = maker.get(layer.get_input(0).name)
        if layer is None or layer.type != trt.LayerType.SHUFFLE:
            raise DllmError(f"the network has no reshape that produces '{name}': export the artifact again.")
        reshapes[name] = layer
    return reshapes


def _logits(reshapes: dict[str, Any], trt: Any) -> Any:
    """The logits [rows, V] in float32."""
    logits = reshapes[LOGITS].get_input(0)
    if len(logits.shape) != 2 or logits.shape[1] < 1 or logits.dtype != trt.float32:
        raise DllmError(
            f"the logits are {logits.dtype} {tuple(logits.shape)}, expected float32 [rows, vocabulary]: "
            "build without --plugins."
        )
    return logits


def _put(reshapes: dict[str, Any], statistics: list[Any]) -> None:
    """Put new statistics in the place of the old ones."""
    for name, made in zip(STATISTICS, statistics, strict=True):
        if made.dtype != reshapes[name].get_input(0).dtype:
            raise DllmError(
                f"the plugin's '{name}' is {made.dtype}, expected {reshapes[name].get_input(0).dtype}."
            )
        reshapes[name].set_input(0, made)


def replace_attention(network: Any, trt: Any, scale: float, dtype: str, layers: int, make: Attention) -> int:
    """Replace the attention of each layer of the model over a cache that the network writes; returns the
    number of layers. scale: of the scores, as the graph has it; dtype: of the caches. Raises DllmError for a
    network of another form."""
    maker, users = _makers(network), _users(network)
    inputs = {item.name: item for item in map(network.get_input, range(network.num_inputs))}
    attentions = [layer for layer in _layers(network) if layer.type == trt.LayerType.ATTENTION_INPUT]
    if "kv_len" not in inputs or len(attentions) != layers:
        raise DllmError(
            f"the network has {len(attentions)} attention layers, expected {layers}, and the inputs "
            f"{', '.join(sorted(inputs))}, expected kv_len among them: build without --attention-plugin."
        )
    for layer in attentions:
        query, key = (_before_scale(maker, layer.get_input(i), trt) for i in range(2))
        value = layer.get_input(2)
        for cache in (key, value):
            if getattr(maker.get(cache.name), "type", None) != trt.LayerType.KV_CACHE_UPDATE:
                raise DllmError(
                    f"'{cache.name}' is no cache of the network: build without --attention-plugin."
                )
        _, heads, capacity, size = key.shape
        sizes = AttentionSizes(heads, size, capacity, scale, dtype)
        made = make(sizes, [query, key, value, inputs["kv_len"]], query.shape[1] // heads)
        ((after, _),) = users[layer.get_output(0).name]
        for user, number in users[after.get_output(0).name]:
            user.set_input(number, made)
    return len(attentions)


def _before_scale(maker: dict[str, Any], tensor: Any, trt: Any) -> Any:
    """The tensor that the parser multiplies by the root of the scale."""
    layer = maker.get(tensor.name)
    if layer is None or layer.type != trt.LayerType.ELEMENTWISE:
        return tensor
    wide = [item for i in range(2) if (item := layer.get_input(i)).shape[-1] == tensor.shape[-1]]
    return wide[0] if len(wide) == 1 else tensor


def replace_experts(network: Any, trt: Any, facts: ExpertFacts, dtype: str, make: Experts) -> int:
    """Replace the dense experts of each layer of the model; returns the number of layers. dtype: of the
    weights (fp32, fp16, bf16). Raises DllmError for a network of another form."""
    maker, users = _makers(network), _users(network)
    named = {layer.name: layer for layer in _layers(network)}
    prefixes = [
        found[1] for name in named if (found := re.fullmatch(r"(layers\.\d+\.)experts_gate_proj", name))
    ]
    if len(prefixes) != facts.num_layers:
        raise DllmError(
            f"the network has {len(prefixes)} layers of dense experts, the manifest says {facts.num_layers}: "
            "export the artifact again."
        )
    for prefix in prefixes:
        weights, products = [], []
        for name in ("gate", "up", "down"):
            held = named[f"{prefix}experts_{name}_proj"].get_output(0)
            using = [layer for layer, _ in users[held.name]]
            if [layer.type for layer in using] != [trt.LayerType.MATRIX_MULTIPLY]:
                raise DllmError(
                    f"{prefix}experts_{name}_proj is not the weight of one matrix product: build without "
                    "--experts-plugin."
                )
            weights.append(held)
            products.append(using[0])
        chosen = _output(maker[f"{prefix}expert_weights"], f"{prefix}expert_weights")
        sizes = Sizes(facts.num_experts, facts.intermediate_size, weights[0].shape[1], facts.top_k, dtype)
        made = make(sizes, [products[0].get_input(0), *weights, chosen])
        for layer, number in users[products[2].get_output(0).name]:
            layer.set_input(number, made)
    return len(prefixes)


def _layers(network: Any) -> Iterator[Any]:
    return map(network.get_layer, range(network.num_layers))


def _makers(network: Any) -> dict[str, Any]:
    """The layer that computes each tensor."""
    return {layer.get_output(k).name: layer for layer in _layers(network) for k in range(layer.num_outputs)}


def _users(network: Any) -> dict[str, list[tuple[Any, int]]]:
    """The layers that read each tensor, and as which input."""
    users: dict[str, list[tuple[Any, int]]] = {}
    for layer in _layers(network):
        for k in range(layer.num_inputs):
            if (tensor := layer.get_input(k)) is not None:
                users.setdefault(tensor.name, []).append((layer, k))
    return users


def _output(layer: Any, name: str) -> Any:
    return next(layer.get_output(k) for k in range(layer.num_outputs) if layer.get_output(k).name == name)
