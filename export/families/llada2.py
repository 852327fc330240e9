"""LLaDA2 (`model_type: llada2_moe`): LLaDA2.0-mini and -flash, LLaDA2.1.

The first layers are dense, the others have a shared expert and experts chosen by a sigmoid: a bias that the
weights do not see takes part in the choice, and experts are chosen within the best groups of them. q and k
pass an RMSNorm over head_dim before RoPE, which turns the first entries of a head only; one tensor holds the
rows of q, k and v. Block-causal attention with blocks at absolute positions, an exact cache, no logit shift,
and a threshold that confidences must exceed. The mask is the added token `<|mask|>`, which no configuration
names. A key that config.json leaves out has the value of the official configuration class. 2.1 is the same
network; its loop also edits committed tokens (`edit_threshold`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from trt_runtime.artifact.manifest import ABSOLUTE, MULTINOMIAL, DecodingFacts
from trt_runtime.errors import DllmError

from ..graph import decoder
from ..graph.context import split_layer
from ..graph.decoder import DecoderConfig
from ..graph.experts import MixtureOfExperts, Router
from ..graph.feed_forward import FeedForward, SwiGLU
from .base import BlockRule, ConfigReader, Piece, StoredAs
from .transformers_family import TransformersFamily, checked

_LAYER = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q_norm": "attention.query_layernorm.weight",
    "k_norm": "attention.key_layernorm.weight",
    "o_proj": "attention.dense.weight",
    "router": "mlp.gate.weight",
    "router.bias": "mlp.gate.expert_bias",
    **{f"{name}_proj": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    **{f"shared_{name}_proj": f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")},
}
_OUTSIDE = {
    decoder.EMBEDDING: "model.word_embeddings.weight",
    decoder.FINAL_NORM: "model.norm.weight",
    decoder.HEAD: "lm_head.weight",
}


class Llada2(TransformersFamily):
    title = "LLaDA2"
    architecture = "Glm4Moe"
    architectures = ("LLaDA2MoeModelLM",)
    aliases = ("llada2_moe", "llada2_moe_veomni")
    qk_norm = True
    sampling = MULTINOMIAL
    mask_tokens = ("<|mask|>",)
    mask_token_id = 156895
    ends_with_padding = True
    block_causal = BlockRule(ABSOLUTE, default_length=32)
    fixed_values: ClassVar = {
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "use_rmsnorm": True,
        "norm_head": False,
        "norm_softmax": False,
        "using_split_qkv_in_self_attention": False,
        "use_sliding_window": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
    }
    ignored_keys = (
        *TransformersFamily.ignored_keys,
        "embedding_dropout",
        "output_dropout",
        "output_router_logits",
        "sliding_window",
    )

    def decoder(self, config: ConfigReader) -> DecoderConfig:
        config.require("use_bias", False, absent=True)
        factor = config.get("partial_rotary_factor", float, 0.5)
        network = super().decoder(config)
        size = network.attention.head_dim
        rotated = int(size * factor)
        if not 0 < factor <= 1 or rotated % 2:
            raise DllmError(
                f"{config.where}: partial_rotary_factor is {factor:g}, expected above 0 and at most 1, and "
                f"an even part of head_dim {size}."
            )
        config.require("rotary_dim", rotated)
        return replace(network, attention=replace(network.attention, rotary_dim=rotated))

    def feed_forward(self, config: ConfigReader, hidden: int) -> MixtureOfExperts:
        size = config.positive("moe_intermediate_size")
        shared = config.positive("num_shared_experts", 0, least=0)
        router = Router(
            config.positive("num_experts"),
            config.positive("num_experts_per_tok"),
            score="sigmoid",
            scale=config.get("routed_scaling_factor", float, 2.5),
            has_bias=True,
            num_groups=config.positive("n_group", 8),
            top_groups=config.positive("topk_group", 4),
        )
        return MixtureOfExperts(
            hidden,
            size,
            checked(router, config),
            SwiGLU(hidden, size * shared, "shared_") if shared else None,
        )

    def other_feed_forwards(self, config: ConfigReader, hidden: int) -> dict[int, FeedForward]:
        dense = SwiGLU(hidden, config.positive("intermediate_size"))
        first = config.positive("first_k_dense_replace", 0, least=0)
        return {layer: dense for layer in range(min(first, config.positive("num_hidden_layers")))}

    def decoding(self, config: ConfigReader, generation_config: Mapping[str, Any]) -> DecodingFacts:
        return replace(super().decoding(config, generation_config), is_threshold_strict=True)

    def tensor_name(self, weight: str) -> str:
        where = split_layer(weight)
        return f"model.layers.{where[0]}.{_LAYER[where[1]]}" if where else _OUTSIDE[weight]

    def stored_as(self, weight: str, decoder: DecoderConfig) -> StoredAs:
        where = split_layer(weight)
        if where is None or where[1] not in ("q_proj", "k_proj", "v_proj"):
            return super().stored_as(weight, decoder)
        size = decoder.attention.head_dim
        queries, keys = decoder.attention.num_heads * size, decoder.attention.num_kv_heads * size
        starts = {"q_proj": (0, queries), "k_proj": (queries, keys), "v_proj": (queries + keys, keys)}
        start, rows = starts[where[1]]
        tensor = f"model.layers.{where[0]}.attention.query_key_value.weight"
        return StoredAs((Piece(tensor, (start, start + rows)),))

    def tiny_config(self) -> dict[str, Any]:
        return {
            **super().tiny_config(),
            "model_type": "llada2_moe",
            "hidden_size": 48,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "num_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
            "partial_rotary_factor": 0.5,
            "use_bias": False,
        }


FAMILY = Llada2()
