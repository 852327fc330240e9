"""RND1 (`model_type: rnd1`): RND1-Base-0910 (30B-A3B).

A Qwen3-MoE network with full attention: experts in every layer, chosen by a softmax over all of them, whose
best are renormalised; q and k pass an RMSNorm over head_dim before RoPE. Row i - 1 predicts token i
(logit_shift 1), and it decodes as Dream does. The official code never fills the last position of its canvas,
which holds the padding token. Its configuration class replaces config.json by constants of its own, so a
config.json with other values than the network's belongs to no published checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from trt_runtime.artifact.manifest import DecodingFacts

from ..graph.decoder import DecoderConfig
from ..graph.experts import MixtureOfExperts
from .base import ConfigReader
from .dream import Dream


class Rnd1(Dream):
    title = "RND1"
    architecture = "Qwen3Moe"
    architectures = ("RND1LM",)
    qkv_bias = False
    qk_norm = True
    head_dim = 128
    mask_token_id = 151669
    fixed_values: ClassVar = {
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    }
    ignored_keys = (*Dream.ignored_keys, "num_diffusion_steps", "moe_backend")

    def decoder(self, config: ConfigReader) -> DecoderConfig:
        if config.config.get("rope_scaling") is False:  # as the published checkpoint spells it
            config.ignore("rope_scaling")
        return super().decoder(config)

    def feed_forward(self, config: ConfigReader, hidden: int) -> MixtureOfExperts:
        return self.qwen3_experts(config, hidden, norm_topk_prob=True)  # a constant of its class

    def decoding(self, config: ConfigReader, generation_config: Mapping[str, Any]) -> DecodingFacts:
        facts = super().decoding(config, generation_config)
        return replace(facts, closing_token_id=facts.pad_token_id)

    def tiny_config(self) -> dict[str, Any]:
        return {**super().tiny_config(), "model_type": "rnd1", "head_dim": 16, **TINY_EXPERTS}


TINY_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
FAMILY = Rnd1()
