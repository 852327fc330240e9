"""Layers of TensorRT-RTX that replace a plugin."""

from __future__ import annotations


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
