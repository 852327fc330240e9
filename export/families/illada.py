"""iLLaDA (`model_type: illada`): iLLaDA-8B Base and Instruct. Not LLaDA's code.

A Llama network under transformers' names: grouped KV heads, no biases, a tied head, cos and sin cast to the
model's dtype. It decodes as LLaDA does: row i predicts token i (logit_shift 0), blocks in every cache mode.
The mask is token 5, `<[MASK]>`, which no configuration names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trt_runtime.artifact.manifest import DecodingFacts

from ..graph.attention import Attention
from ..graph.decoder import DecoderConfig
from ..graph.feed_forward import SwiGLU
from .base import ConfigReader, Family, Reference, decoding_defaults, hf_name, transformers_reference


class Illada(Family):
    title = "iLLaDA"
    mask_token = "<[MASK]>"
    mask_token_id = 5
    allowed_surplus = (r"lm_head\.weight",)  # a copy of the tied embedding

    def decoder(self, config: ConfigReader) -> DecoderConfig:
        config.require("hidden_act", "silu")
        config.require("layer_norm_eps")  # else LayerNorm with biases
        for key in ("attention_bias", "mlp_bias"):
            config.require(key, False)
        config.require("tie_word_embeddings", True)
        config.ignore("attention_dropout", "resid_pdrop")
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
                head_dim=hidden // heads,
                rope_theta=config.rope_theta(),
                rotary_float32=False,
            ),
            feed_forward=SwiGLU(hidden, config.positive("intermediate_size")),
            tied_head=True,
        )

    def decoding(self, config: ConfigReader, generation_config: Mapping[str, Any]) -> DecodingFacts:
        return DecodingFacts(
            mask_token_id=config.token_id("mask_token_id", {}),
            eos_token_ids=config.token_ids("eos_token_id", generation_config),
            pad_token_id=config.token_id("pad_token_id", generation_config),
            logit_shift=0,
            defaults=decoding_defaults(generation_config),
        )

    def tensor_name(self, weight: str) -> str:
        return hf_name(weight)

    def tiny_config(self) -> dict[str, Any]:
        return {
            "model_type": "illada",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "intermediate_size": 96,
            "vocab_size": 128,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "layer_norm_eps": None,
            "mask_token_id": 126,
            "eos_token_id": 125,
            "pad_token_id": 125,
        }

    def reference(self, decoder: DecoderConfig) -> Reference:
        return transformers_reference("Llama", decoder)


FAMILY = Illada()
