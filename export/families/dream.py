"""Dream (`model_type: Dream`): Dream-v0 7B Base and Instruct, Dream-Coder, DiffuCoder and fine-tuned
relatives.

A Qwen2.5 network with Qwen2's own tensor names and full attention: biases on q, k and v only, grouped KV
heads, cos and sin cast to the model's dtype. Row i - 1 predicts token i (logit_shift 1), as in the
autoregressive model that it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trt_runtime.artifact.manifest import CATEGORICAL, DecodingFacts

from ..graph.attention import Attention
from ..graph.decoder import DecoderConfig
from ..graph.feed_forward import SwiGLU
from .base import ConfigReader, Family, Reference, decoding_defaults, hf_name, transformers_reference


class Dream(Family):
    title = "Dream"

    def decoder(self, config: ConfigReader) -> DecoderConfig:
        config.require("hidden_act", "silu")
        config.require("mlp_bias", False)
        for key in ("use_sliding_window", "use_mrope", "is_causal"):
            config.require(key, False)
        config.require("full_attn_mask", True)
        config.ignore("attention_dropout", "max_window_layers", "sliding_window")
        hidden, heads = config.positive("hidden_size"), config.positive("num_attention_heads")
        return DecoderConfig(
            hidden_size=hidden,
            num_layers=config.positive("num_hidden_layers"),
            vocab_size=config.positive("vocab_size"),
            max_length=config.positive("max_position_embeddings"),
            norm_eps=config.get("rms_norm_eps", float),
            attention=Attention(
                hidden,
                num_heads=heads,
                num_kv_heads=config.positive("num_key_value_heads", heads),
                head_dim=config.positive("head_dim", hidden // heads),
                rope_theta=config.rope_theta(),
                rotary_float32=False,
                qkv_bias=True,
            ),
            feed_forward=SwiGLU(hidden, config.positive("intermediate_size")),
            tied_head=config.get("tie_word_embeddings", bool, False),
        )

    def decoding(self, config: ConfigReader, generation_config: Mapping[str, Any]) -> DecodingFacts:
        return DecodingFacts(
            mask_token_id=config.token_id("mask_token_id", {}),
            eos_token_ids=config.token_ids("eos_token_id", generation_config),
            pad_token_id=config.token_id("pad_token_id", generation_config),
            logit_shift=1,
            defaults=decoding_defaults(generation_config),
            sampling=CATEGORICAL,
            first_commit=True,
            blocks_without_cache=False,
        )

    def tensor_name(self, weight: str) -> str:
        return hf_name(weight)

    def tiny_config(self) -> dict[str, Any]:
        return {
            "model_type": "Dream",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "intermediate_size": 96,
            "vocab_size": 128,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "mask_token_id": 126,
            "eos_token_id": 125,
            "pad_token_id": 125,
        }

    def reference(self, decoder: DecoderConfig) -> Reference:
        return transformers_reference("Qwen2", decoder)


FAMILY = Dream()
