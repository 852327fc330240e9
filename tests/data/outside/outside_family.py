"""A family of somebody else's: a Llama body whose checkpoints hold queries, keys and values in one tensor,
and gate and up in two halves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_trt_export.families.base import (
    ConfigReader,
    Family,
    Piece,
    Reference,
    decoding_defaults,
    transformers_reference,
)
from dllm_trt_export.graph.attention import Attention
from dllm_trt_export.graph.context import split_layer
from dllm_trt_export.graph.decoder import DecoderConfig
from dllm_trt_export.graph.feed_forward import SwiGLU

from trt_runtime.artifact.manifest import DecodingFacts

_HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM, _MLP = 64, 4, 2, 16, 96
_FUSED = {"q_proj": (0, 64), "k_proj": (64, 96), "v_proj": (96, 128)}  # rows of the one tensor


class Toy(Family):
    title = "Toy"

    def decoder(self, config: ConfigReader) -> DecoderConfig:
        for key, value in (
            ("hidden_size", _HIDDEN),
            ("num_attention_heads", _HEADS),
            ("intermediate_size", _MLP),
        ):
            config.require(key, value)
        return DecoderConfig(
            hidden_size=_HIDDEN,
            num_layers=config.positive("num_hidden_layers"),
            vocab_size=config.positive("vocab_size"),
            max_length=config.positive("max_position_embeddings"),
            norm_eps=config.get("rms_norm_eps", float),
            attention=Attention(
                _HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM, rope_theta=config.rope_theta(), rotary_float32=False
            ),
            feed_forward=SwiGLU(_HIDDEN, _MLP),
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
        layer = split_layer(weight)
        return f"toy.{weight}" if layer is None else f"toy.{layer[0]}.{layer[1]}"

    def pieces(self, weight: str) -> tuple[Piece, ...]:
        layer = split_layer(weight)
        if layer and layer[1] in _FUSED:
            return (Piece(f"toy.{layer[0]}.qkv", _FUSED[layer[1]]),)
        if layer and layer[1] in ("gate_proj", "up_proj"):
            return tuple(Piece(f"{self.tensor_name(weight)}.{half}") for half in ("first", "second"))
        return super().pieces(weight)

    def tiny_config(self) -> dict[str, Any]:
        return {
            "model_type": "toy",
            "hidden_size": _HIDDEN,
            "num_attention_heads": _HEADS,
            "intermediate_size": _MLP,
            "num_hidden_layers": 2,
            "vocab_size": 128,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "mask_token_id": 126,
            "eos_token_id": 125,
            "pad_token_id": 125,
        }

    def reference(self, decoder: DecoderConfig) -> Reference:
        return transformers_reference("Llama", decoder)


FAMILY = Toy()
