"""Fast-dLLM v2 (`model_type: Fast_dLLM_Qwen`): Fast_dLLM_v2_1.5B and _7B.

A Qwen2.5 network with biases on q, k and v. Block-causal attention with blocks of `bd_size` at absolute
positions, decoded small block by small block. Row i - 1 predicts token i (logit_shift 1); the first token of
a block comes from the forward that stores the block before it. The mask is the added token `|<MASK>|`, which
config.json does not name.
"""

from __future__ import annotations

from typing import Any, ClassVar

from trt_runtime.artifact.manifest import ABSOLUTE, MULTINOMIAL

from .base import BlockRule
from .transformers_family import TransformersFamily


class FastDllmQwen(TransformersFamily):
    title = "Fast-dLLM v2"
    architecture = "Qwen2"
    qkv_bias = True
    logit_shift = 1
    mask_tokens = ("|<MASK>|",)
    sampling = MULTINOMIAL
    block_causal = BlockRule(
        ABSOLUTE, length_key="bd_size", default_length=32, small_block=8, next_from_store=True
    )
    fixed_values: ClassVar = {"use_sliding_window": False}
    ignored_keys = (*TransformersFamily.ignored_keys, "sliding_window", "conplemenrary_mask")

    def tiny_config(self) -> dict[str, Any]:
        return {"model_type": "Fast_dLLM_Qwen", **super().tiny_config(), "bd_size": 16}


FAMILY = FastDllmQwen()
