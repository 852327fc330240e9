"""SDAR with a mixture of experts (`model_type: sdar_moe`): SDAR-30B-A3B-Chat.

SDAR's attention and decoding with Qwen3-MoE's feed-forward in every layer.
"""

from __future__ import annotations

from typing import Any

from ..graph.experts import MixtureOfExperts
from .base import ConfigReader
from .rnd1 import TINY_EXPERTS
from .sdar import Sdar


class SdarMoe(Sdar):
    title = "SDAR-MoE"
    architecture = "Qwen3Moe"
    architectures = ("SDARMoeForCausalLM",)

    def feed_forward(self, config: ConfigReader, hidden: int) -> MixtureOfExperts:
        return self.qwen3_experts(config, hidden)

    def tiny_config(self) -> dict[str, Any]:
        return {**super().tiny_config(), "model_type": "sdar_moe", **TINY_EXPERTS}


FAMILY = SdarMoe()
