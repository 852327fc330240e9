"""A family whose config.json and tensors are spelled as transformers spells Llama, Qwen2 and Qwen3. The file
of such a family says only what differs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from trt_runtime.artifact.manifest import GUMBEL, DecodingFacts
from trt_runtime.errors import DllmError

from ..graph.attention import Attention
from ..graph.decoder import DecoderConfig
from ..graph.experts import MixtureOfExperts, Router
from ..graph.feed_forward import FeedForward, SwiGLU
from .base import ConfigReader, Family, Reference, decoding_defaults, hf_name, transformers_reference

_OF_TRAINED_ROUTERS = ("router_aux_loss_coef", "output_router_logits")


def checked(router: Router, config: ConfigReader) -> Router:
    """The router, if its numbers agree. Raises DllmError."""
    size = router.num_experts // router.num_groups
    if router.num_experts % router.num_groups or router.top_groups > router.num_groups:
        raise DllmError(
            f"{config.where}: {router.num_experts} experts in {router.num_groups} groups, of which "
            f"{router.top_groups} are chosen: expected groups of one size, and no more chosen ones."
        )
    if router.num_groups > 1 and size < 2:
        raise DllmError(f"{config.where}: groups of {size} expert, expected 2 or more.")
    if router.top_k > router.top_groups * size:
        raise DllmError(
            f"{config.where}: {router.top_k} experts for each row, of {router.top_groups * size}: expected "
            f"no more than there are."
        )
    return router


class TransformersFamily(Family):
    """architecture: the body's name in transformers. head_dim: the body's default; None: hidden_size / heads.
    fixed_values: keys of config.json that are implemented at these values only (None: null). ignored_keys:
    those that compute nothing."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    logit_shift: int = 0
    sampling: str = GUMBEL
    fixed_values: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    ignored_keys: tuple[str, ...] = ("attention_dropout", "max_window_layers")

    def decoder(self, config: ConfigReader) -> DecoderConfig:
        config.require("hidden_act", "silu")
        config.require("mlp_bias", False)
        for key, value in self.fixed_values.items():
            config.require(key, *(() if value is None else (value,)))
        config.ignore(*self.ignored_keys)
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
            feed_forward=self.feed_forward(config, hidden),
            other_feed_forwards=self.other_feed_forwards(config, hidden),
            tied_head=config.get("tie_word_embeddings", bool, False),
        )

    def feed_forward(self, config: ConfigReader, hidden: int) -> FeedForward:
        """The feed-forward of the layers."""
        return SwiGLU(hidden, config.positive("intermediate_size"))

    def other_feed_forwards(self, config: ConfigReader, hidden: int) -> dict[int, FeedForward]:
        """That of the layers, by number, that have another one."""
        return {}

    def decoding(self, config: ConfigReader, generation_config: Mapping[str, Any]) -> DecodingFacts:
        return DecodingFacts(
            mask_token_id=config.token_id("mask_token_id", {}),
            eos_token_ids=config.token_ids("eos_token_id", generation_config),
            pad_token_id=config.token_id("pad_token_id", generation_config),
            logit_shift=self.logit_shift,
            defaults=decoding_defaults(generation_config),
            sampling=self.sampling,
        )

    @staticmethod
    def qwen3_experts(config: ConfigReader, hidden: int, norm_topk_prob: bool = False) -> MixtureOfExperts:
        """Qwen3-MoE's experts in every layer: a softmax over all, whose best are renormalised.
        norm_topk_prob: what the configuration class takes where config.json does not say."""
        config.require("decoder_sparse_step", 1)
        config.require("mlp_only_layers", [])
        config.require("norm_topk_prob", True, absent=norm_topk_prob)
        config.ignore("intermediate_size", *_OF_TRAINED_ROUTERS)  # the width is that of dense layers
        router = Router(config.positive("num_experts"), config.positive("num_experts_per_tok"))
        return MixtureOfExperts(hidden, config.positive("moe_intermediate_size"), checked(router, config))

    def tensor_name(self, weight: str) -> str:
        return hf_name(weight)

    def tiny_config(self) -> dict[str, Any]:
        return {
            "hidden_size": 48 if self.head_dim else 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            **({"head_dim": 16} if self.head_dim else {}),
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
