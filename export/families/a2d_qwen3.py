"""A2D on Qwen3 (`model_type: a2d-qwen3`): Qwen3-0.6B-diffusion-mdlm and its relatives, from dllm's A2D.

A Qwen3 network: q and k pass an RMSNorm over head_dim before RoPE, no biases, head_dim apart from hidden_size
/ heads, usually a tied head, cos and sin cast to the model's dtype. Row i predicts token i (logit_shift 0).
The mask is the added token `<|mask|>`. The official schedule is the policy `linear`.

The same model_type serves checkpoints with full (mdlm) and with block-causal attention (bd3lm). config.json
does not tell them apart, so the export must be told (`--attention`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trt_runtime.artifact.manifest import DecodingFacts

from ..graph.attention import Attention
from ..graph.decoder import DecoderConfig
from ..graph.feed_forward import SwiGLU
from .base import ConfigReader, Family, Reference, decoding_defaults, hf_name, transformers_reference


class A2d(Family):
    """A2D on the body that `architecture` names in transformers. head_dim: the body's default; None:
    hidden_size / heads."""

    mask_token = "<|mask|>"
    attention_is_told = True

    def __init__(
        self,
        architecture: str,
        *,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        head_dim: int | None = None,
    ) -> None:
        self.title = f"A2D on {architecture}"
        self.architecture, self.qk_norm, self.qkv_bias, self.head_dim = (
            architecture,
            qk_norm,
            qkv_bias,
            head_dim,
        )

    def decoder(self, config: ConfigReader) -> DecoderConfig:
        config.require("hidden_act", "silu")
        config.require("attention_bias", self.qkv_bias)
        config.require("mlp_bias", False)
        config.ignore("attention_dropout", "max_window_layers")
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
                head_dim=config.positive("head_dim", self.head_dim or hidden // heads),
                rope_theta=config.rope_theta(),
                rotary_float32=False,
                qkv_bias=self.qkv_bias,
                qk_norm=self.qk_norm,
            ),
            feed_forward=SwiGLU(hidden, config.positive("intermediate_size")),
            tied_head=config.get("tie_word_embeddings", bool, False),
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
            "model_type": f"a2d-{self.architecture.lower()}",
            "hidden_size": 48 if self.head_dim else 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_hidden_layers": 3,
            "intermediate_size": 96,
            "vocab_size": 128,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "mask_token_id": 126,
            "eos_token_id": 125,
            "pad_token_id": 125,
        }

    def reference(self, decoder: DecoderConfig) -> Reference:
        return transformers_reference(self.architecture, decoder)


FAMILY = A2d("Qwen3", qk_norm=True, head_dim=128)
