"""transformers' own decoders with a mixture of experts as references: Qwen3-MoE (a softmax router) and
GLM-4-MoE (a sigmoid router with groups and a shared expert). Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..graph import experts
from ..graph.context import layer_name
from ..graph.decoder import DecoderConfig
from ..graph.experts import MixtureOfExperts
from .base import hf_name
from .transformers_network import TransformersNetwork


class ExpertsNetwork(TransformersNetwork):
    """A Reference (base.py) whose layers have experts, but for those in `other_feed_forwards`."""

    def __init__(self, architecture: str, decoder: DecoderConfig, config: Mapping[str, Any]) -> None:
        part = decoder.feed_forward
        assert isinstance(part, MixtureOfExperts)
        dense = next((other.intermediate_size for other in decoder.other_feed_forwards.values()), 1)
        sizes = {
            "intermediate_size": dense,
            "moe_intermediate_size": part.intermediate_size,
            "num_experts_per_tok": part.router.top_k,
            "norm_topk_prob": part.router.is_normalised and part.router.top_k > 1,
        }
        own: dict[str, dict[str, Any]] = {
            "Qwen3Moe": {
                "num_experts": part.num_experts,
                "mlp_only_layers": sorted(decoder.other_feed_forwards),
                "decoder_sparse_step": 1,
            },
            "Glm4Moe": {
                "n_routed_experts": part.num_experts,
                "n_shared_experts": (
                    part.shared.intermediate_size // part.intermediate_size if part.shared else 0
                ),
                "routed_scaling_factor": part.router.scale,
                "n_group": part.router.num_groups,
                "topk_group": part.router.top_groups,
                "first_k_dense_replace": len(decoder.other_feed_forwards),
                "use_qk_norm": True,
            },
        }
        super().__init__(architecture, decoder, {**sizes, **own[architecture], **config})

    @property
    def routers(self) -> dict[int, Any]:
        """The routers by layer; their output is logits [T, E], weights and experts [T, k]."""
        layers = range(self.decoder.num_layers)
        mixed = [i for i in layers if isinstance(self.decoder.feed_forward_of(i), MixtureOfExperts)]
        return {layer: self.layers[layer].mlp.gate for layer in mixed}

    def weight_name(self, weight: str) -> str:
        name = hf_name(weight.replace(".shared_", "."))
        if weight.endswith(experts.ROUTER_BIAS):
            return name.replace(".bias", ".e_score_correction_bias")
        return name.replace(".mlp.", ".mlp.shared_experts.") if ".shared_" in weight else name

    def load(self, state: Mapping[str, Any], dtype: Any, joined: Mapping[str, Any] | None = None) -> None:
        """Load tensors by name and shape; transformers joins those of the experts. Raises DllmError."""
        joined = dict(joined or {})
        left = dict(state)
        for layer in range(self.decoder.num_layers):
            part = self.decoder.feed_forward_of(layer)
            if not isinstance(part, MixtureOfExperts):
                continue
            gate, up, down = (
                left.pop(layer_name(layer, name)) for name in (experts.GATE, experts.UP, experts.DOWN)
            )
            count, hidden = part.num_experts, self.decoder.hidden_size
            inner = torch.cat([side.view(count, -1, hidden) for side in (gate, up)], 1)
            outer = down.view(hidden, count, -1).transpose(0, 1).contiguous()
            where = f"model.layers.{layer}.mlp"
            joined[f"{where}.experts.gate_up_proj"] = inner.to(dtype)
            joined[f"{where}.experts.down_proj"] = outer.to(dtype)
            if self.architecture == "Glm4Moe" and part.shared is None:  # it has one of no units
                for name, shape in (("gate", (0, hidden)), ("up", (0, hidden)), ("down", (hidden, 0))):
                    joined[f"{where}.shared_experts.{name}_proj.weight"] = torch.empty(shape, dtype=dtype)
        super().load(left, dtype, joined)
