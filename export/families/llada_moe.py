"""LLaDA-MoE (`architectures: LLaDAMoEModelLM`): LLaDA-MoE-7B-A1B Base and Instruct. Its `model_type` is
`llada`, as that of the dense model, which is another network.

Experts are chosen by a softmax over all of them, in float32, and their weights are left as they are (they sum
to less than 1). q and k pass an RMSNorm over head_dim before RoPE, no biases, untied head, cos and sin cast
to the model's dtype. Row i predicts token i (logit_shift 0), and it decodes as LLaDA does. The mask is the
added token `<|mask|>`, which no configuration names. `norm_topk_prob`, the router's groups, its score
function and its scaling factor are read by nobody in the official code.
"""

from __future__ import annotations

from typing import Any, ClassVar

from trt_runtime.errors import DllmError

from ..graph.decoder import DecoderConfig
from ..graph.experts import MixtureOfExperts, Router
from ..graph.feed_forward import FeedForward, SwiGLU
from .base import ConfigReader
from .transformers_family import TransformersFamily, checked


class LladaMoe(TransformersFamily):
    title = "LLaDA-MoE"
    architecture = "Qwen3Moe"
    architectures = ("LLaDAMoEModelLM",)
    aliases = ("lladamoe",)
    qk_norm = True
    mask_tokens = ("<|mask|>",)
    mask_token_id = 156895
    fixed_values: ClassVar = {
        "attention_bias": False,
        "clip_qkv": None,
        "moe_router_enable_expert_bias": False,
        "qk_layernorm": True,
        "shared_expert_intermediate_size": None,
        "tie_word_embeddings": False,
    }
    told_by = ("llada", "num_experts")
    ignored_keys = (
        *TransformersFamily.ignored_keys,
        "moe_router_score_function",
        "norm_topk_prob",
        "routed_scaling_factor",
        "router_num_group",
        "router_topk_group",
        "router_aux_loss_coef",
        "output_router_logits",
    )

    def decoder(self, config: ConfigReader) -> DecoderConfig:
        config.require("partial_rotary_factor", 1, absent=-1)
        return super().decoder(config)

    def feed_forward(self, config: ConfigReader, hidden: int) -> MixtureOfExperts:
        count, chosen = config.positive("num_experts"), config.positive("num_experts_per_tok")
        router = checked(Router(count, chosen, is_normalised=False), config)
        return MixtureOfExperts(hidden, config.positive("expert_intermediate_size"), router)

    def other_feed_forwards(self, config: ConfigReader, hidden: int) -> dict[int, FeedForward]:
        layers = config.positive("num_hidden_layers")
        kinds = config.get("moe_layer_freq", list, [1] * layers)
        if len(kinds) != layers or any(kind not in (0, 1) for kind in kinds):
            raise DllmError(
                f"{config.where}: moe_layer_freq is {kinds}, expected a 0 or 1 for each of {layers} layers."
            )
        config.ignore("dense_intermediate_size")
        dense = [layer for layer, kind in enumerate(kinds) if not kind]
        return {layer: SwiGLU(hidden, config.positive("dense_intermediate_size")) for layer in dense}

    def tiny_config(self) -> dict[str, Any]:
        config = super().tiny_config()
        del config["intermediate_size"]
        return {
            **config,
            "model_type": "llada",
            "architectures": ["LLaDAMoEModelLM"],
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "expert_intermediate_size": 24,
            "dense_intermediate_size": 80,
            "moe_layer_freq": [0, 1, 1],
            "qk_layernorm": True,
            "partial_rotary_factor": 1,
        }


FAMILY = LladaMoe()
