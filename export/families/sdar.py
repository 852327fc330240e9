"""SDAR (`model_type: sdar`): SDAR-1.7B, -4B and -8B-Chat and their variants by block length (-b8 to -b64).

A Qwen3 network: q and k pass an RMSNorm over head_dim before RoPE, no biases, head_dim apart from hidden_size
/ heads. Block-causal attention with blocks at absolute positions, an exact cache, and no logit shift. The
class defaults of the official configuration fit none of the published checkpoints, so every size must be in
config.json. Some published config.json lack `block_size` (which the user then has to know, from the
checkpoint's name: 4 unless it says otherwise) and the mask token (`<|MASK|>` or `<MASK>`).
"""

from __future__ import annotations

from typing import Any, ClassVar

from trt_runtime.artifact.manifest import ABSOLUTE, MULTINOMIAL

from .base import BlockRule
from .transformers_family import TransformersFamily


class Sdar(TransformersFamily):
    title = "SDAR"
    architecture = "Qwen3"
    qk_norm = True
    head_dim = 128
    mask_tokens = ("<|MASK|>", "<MASK>")
    sampling = MULTINOMIAL
    block_causal = BlockRule(
        ABSOLUTE,
        length_key="block_size",
        advice="Its name says it: 8 for -b8, 4 if there is no such part.",
    )
    fixed_values: ClassVar = {"attention_bias": False, "use_sliding_window": False}
    ignored_keys = (
        *TransformersFamily.ignored_keys,
        "sliding_window",
        "attn_implementation",
        "debug",
        "ep_size",
        "fuse_cross_entropy",
        "micro_forward",
        "skip_checkpoint",
        "use_deepep",
    )

    def tiny_config(self) -> dict[str, Any]:
        return {"model_type": "sdar", **super().tiny_config(), "block_size": 4}


FAMILY = Sdar()
