"""A feed-forward of somebody else's, in a family of its own: two linear layers with a squared ReLU between
them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir
from dllm_trt_export.families.base import ConfigReader, Reference
from dllm_trt_export.families.dream import Dream
from dllm_trt_export.graph.context import Context, Shapes, split_layer
from dllm_trt_export.graph.decoder import DecoderConfig
from dllm_trt_export.graph.feed_forward import FeedForward


class SquaredReLU(FeedForward):
    """down(relu(up(h))^2)."""

    def shapes(self) -> Shapes:
        wide = (self.intermediate_size, self.hidden_size)
        return {"rise_proj": wide, "fall_proj": wide[::-1]}

    def build(self, on: Context, h: ir.Value, layer: int) -> ir.Value:
        risen = on.op.Relu(on.linear(h, layer, "rise_proj"))
        return on.linear(on.op.Mul(risen, risen), layer, "fall_proj")


class Squared(Dream):
    """Dream's facts and attention."""

    title = "Squared"

    def decoder(self, config: ConfigReader) -> DecoderConfig:
        made = super().decoder(config)
        return replace(made, feed_forward=SquaredReLU(made.hidden_size, made.feed_forward.intermediate_size))

    def tensor_name(self, weight: str) -> str:
        layer = split_layer(weight)
        own = layer is not None and layer[1] in ("rise_proj", "fall_proj")
        return (
            f"model.layers.{layer[0]}.mlp.{layer[1]}.weight" if layer and own else super().tensor_name(weight)
        )

    def tiny_config(self) -> dict[str, Any]:
        return {**super().tiny_config(), "model_type": "squared"}

    def reference(self, decoder: DecoderConfig) -> Reference:
        return _network(decoder)


def _network(decoder: DecoderConfig) -> Reference:
    """transformers' Qwen2 with this feed-forward in the place of its own."""
    import torch
    from dllm_trt_export.families.base import hf_name
    from dllm_trt_export.families.transformers_network import TransformersNetwork

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rise_proj = torch.nn.Linear(
                decoder.hidden_size, decoder.feed_forward.intermediate_size, bias=False
            )
            self.fall_proj = torch.nn.Linear(
                decoder.feed_forward.intermediate_size, decoder.hidden_size, bias=False
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fall_proj(torch.relu(self.rise_proj(x)) ** 2)

    class Network(TransformersNetwork):
        def __init__(self) -> None:
            super().__init__("Qwen2", decoder, {})
            with torch.device("meta"):
                for layer in self.layers:
                    layer.mlp = Block()

        def weight_name(self, weight: str) -> str:
            layer = split_layer(weight)
            own = layer is not None and layer[1] in ("rise_proj", "fall_proj")
            return f"model.layers.{layer[0]}.mlp.{layer[1]}.weight" if layer and own else hf_name(weight)

    return Network()


FAMILY = Squared()
