"""LLaDA (`model_type: llada`): LLaDA-8B Base, Instruct, 1.5 and fine-tuned relatives.

A Llama network with OLMo's names: plain MHA (or GQA by n_kv_heads), no biases, untied head, RoPE in full
precision, mask token 126336. Row i predicts token i (logit_shift 0). The upstream class defaults resemble
GPT-2 and are wrong for every published checkpoint, so only mlp_ratio and n_kv_heads fall back to them,
computed as upstream does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trt_runtime.artifact.manifest import DecodingFacts

from ..graph import decoder
from ..graph.attention import Attention
from ..graph.context import split_layer
from ..graph.decoder import DecoderConfig
from ..graph.feed_forward import SwiGLU
from .base import ConfigReader, Family, Reference, decoding_defaults, transformers_reference

_LAYER = {
    "attention_norm": "attn_norm",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "attn_out",
    "mlp_norm": "ff_norm",
    "gate_proj": "ff_proj",
    "up_proj": "up_proj",
    "down_proj": "ff_out",
}
_OUTSIDE = {decoder.EMBEDDING: "wte", decoder.FINAL_NORM: "ln_f", decoder.HEAD: "ff_out"}


class Llada(Family):
    title = "LLaDA"

    def decoder(self, config: ConfigReader) -> DecoderConfig:
        config.require("block_type", "llama", absent="sequential")
        config.require("activation_type", "silu", absent="swiglu")
        config.require("layer_norm_type", "rms", absent="default")
        config.require("rope", True, absent=False)
        config.require("block_group_size", 1)
        config.require("layer_norm_with_affine", True)
        for key in (
            "alibi",
            "include_bias",
            "include_qkv_bias",
            "bias_for_layer_norm",
            "scale_logits",
            "input_emb_norm",
            "attention_layer_norm",
            "multi_query_attention",
            "clip_qkv",
        ):
            config.require(key, False)
        config.ignore(
            "alibi_bias_max",
            "attention_dropout",
            "residual_dropout",
            "embedding_dropout",
            "flash_attention",
            "init_cutoff_factor",
            "init_device",
            "init_fn",
            "init_std",
            "precision",
            "vocab_size",
            "attention_layer_norm_with_affine",
        )
        config.require(
            "tie_word_embeddings", config.get("weight_tying", bool, True)
        )  # transformers' name for it, which may be added
        hidden, heads = config.positive("d_model"), config.positive("n_heads")
        vocab = config.positive("vocab_size")
        return DecoderConfig(
            hidden_size=hidden,
            num_layers=config.positive("n_layers"),
            vocab_size=config.positive("embedding_size", vocab),
            max_length=config.positive("max_sequence_length"),
            norm_eps=config.get("rms_norm_eps", float),
            attention=Attention(
                hidden,
                num_heads=heads,
                num_kv_heads=config.positive("n_kv_heads", heads),
                head_dim=hidden // heads,
                rope_theta=config.rope_theta(),
                rotary_float32=config.get("rope_full_precision", bool, True),
            ),
            feed_forward=SwiGLU(
                hidden, config.positive("mlp_hidden_size", config.positive("mlp_ratio", 4) * hidden)
            ),
            tied_head=config.get("weight_tying", bool, True),
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
        where = split_layer(weight)
        leaf = f"blocks.{where[0]}.{_LAYER[where[1]]}" if where else _OUTSIDE[weight]
        return f"model.transformer.{leaf}.weight"

    def tiny_config(self) -> dict[str, Any]:
        return {
            "model_type": "llada",
            "d_model": 64,
            "n_heads": 4,
            "n_kv_heads": 4,
            "n_layers": 3,
            "mlp_hidden_size": 96,
            "vocab_size": 120,
            "embedding_size": 128,
            "max_sequence_length": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_full_precision": True,
            "weight_tying": False,
            "block_type": "llama",
            "activation_type": "silu",
            "layer_norm_type": "rms",
            "rope": True,
            "mask_token_id": 126,
            "eos_token_id": 125,
            "pad_token_id": 125,
        }

    def reference(self, decoder: DecoderConfig) -> Reference:
        return transformers_reference("Llama", decoder)


FAMILY = Llada()
