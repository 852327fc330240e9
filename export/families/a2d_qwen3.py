"""A2D on Qwen3 (`model_type: a2d-qwen3`): Qwen3-0.6B-diffusion-mdlm and -bd3lm and their relatives, from
dllm's A2D.

A Qwen3 network: q and k pass an RMSNorm over head_dim before RoPE, no biases, head_dim apart from hidden_size
/ heads, usually a tied head, cos and sin cast to the model's dtype. Row i predicts token i (logit_shift 0).
The mask is the added token `<|mask|>`. The official schedule is the policy `linear`.

The same model_type serves checkpoints with full (mdlm) and with block-causal attention (bd3lm), whose blocks
of 32 are counted from the end of the prompt. config.json does not tell them apart, so the export must be told
(`--attention`).
"""

from __future__ import annotations

from typing import Any

from trt_runtime.artifact.manifest import PROMPT_END

from ..graph.decoder import DecoderConfig
from .base import BlockRule, ConfigReader
from .transformers_family import TransformersFamily


class A2d(TransformersFamily):
    """A2D on the body that `architecture` names in transformers."""

    mask_tokens = ("<|mask|>",)
    attention_is_told = True
    block_causal = BlockRule(PROMPT_END, default_length=32)

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
        config.require("attention_bias", self.qkv_bias)
        return super().decoder(config)

    def tiny_config(self) -> dict[str, Any]:
        return {"model_type": f"a2d-{self.architecture.lower()}", **super().tiny_config(), "head_dim": 16}


FAMILY = A2d("Qwen3", qk_norm=True, head_dim=128)
