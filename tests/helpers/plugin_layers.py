"""Layers of TensorRT-RTX that replace a plugin, and which layers a network needs."""

from __future__ import annotations

from trt_runtime.backends.tensorrt import builder, store
from trt_runtime.backends.tensorrt.store import BuildConfig


def ordinary_layers(network):
    """A replacement for the plugin: layers with outputs of its types and shapes."""
    import tensorrt_rtx as rtx

    def make(logits, mask_token_id):
        best = network.add_topk(logits, rtx.TopKOperation.MAX, 1, 1 << 1)
        flat = []
        for i in (1, 0):
            shuffle = network.add_shuffle(best.get_output(i))
            shuffle.reshape_dims = (-1,)
            flat.append(shuffle.get_output(0))
        others = [
            network.add_unary(flat[1], kind).get_output(0)
            for kind in (rtx.UnaryOperation.EXP, rtx.UnaryOperation.ABS, rtx.UnaryOperation.NEG)
        ]
        return [network.add_cast(flat[0], rtx.int64).get_output(0), *others]

    return make


def ordinary_experts(network):
    """A replacement for the plugins of experts: layers that read each of their inputs, with an output of
    their type and shape."""
    import tensorrt_rtx as rtx

    none, transposed = rtx.MatrixOperation.NONE, rtx.MatrixOperation.TRANSPOSE

    def product(left, right):
        return network.add_matrix_multiply(left, none, right, transposed).get_output(0)

    def make(sizes, tensors):
        hidden, gate, up, down, weights = tensors
        added = network.add_elementwise(
            product(hidden, gate), product(hidden, up), rtx.ElementWiseOperation.SUM
        ).get_output(0)
        share = network.add_reduce(weights, rtx.ReduceOperation.SUM, 1 << 1, True).get_output(0)
        narrow = network.add_cast(share, hidden.dtype).get_output(0)
        return network.add_elementwise(
            product(added, down), narrow, rtx.ElementWiseOperation.PROD
        ).get_output(0)

    return make


def needed_layers(network) -> set[str]:
    """The names of the layers that the network's outputs depend on."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    makers = {layer.get_output(k).name: layer for layer in layers for k in range(layer.num_outputs)}
    waiting, needed = [network.get_output(i).name for i in range(network.num_outputs)], set()
    while waiting:
        layer = makers.get(waiting.pop())
        if layer is not None and layer.name not in needed:
            needed.add(layer.name)
            inputs = (layer.get_input(k) for k in range(layer.num_inputs))
            waiting += [tensor.name for tensor in inputs if tensor is not None]
    return needed


def built(artifact, manifest, edit, layout="shared", max_batch=2):
    """The refine engine of TensorRT-RTX, whose parsed network `edit` changes."""
    import tensorrt_rtx_bindings as rtx

    config = BuildConfig("tensorrt-rtx", layout, ("sm89",), max_batch, max_length=64, block_length=8)
    plan = store.plans(config, manifest.decoding)[-1]
    assert plan.role == "refine"
    job = builder.BuildJob(
        plan.name, artifact / "refine.onnx", plan.role, plan.profiles, 64, ("sm89",), edit=edit
    )
    return builder.serialised(job, manifest, "tensorrt-rtx", rtx)[0]


def outputs_of(network):
    """Name, shape and type of every output."""
    held = [network.get_output(i) for i in range(network.num_outputs)]
    return [(tensor.name, tuple(tensor.shape), tensor.dtype) for tensor in held]
