"""Dream (`model_type: Dream`): Dream-v0 7B Base and Instruct, Dream-Coder, DiffuCoder and fine-tuned
relatives.

A Qwen2.5 network with Qwen2's own tensor names and full attention: biases on q, k and v only, grouped KV
heads, cos and sin cast to the model's dtype. Row i - 1 predicts token i (logit_shift 1), as in the
autoregressive model that it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from trt_runtime.artifact.manifest import CATEGORICAL, DecodingFacts

from .base import ConfigReader
from .transformers_family import TransformersFamily


class Dream(TransformersFamily):
    title = "Dream"
    architecture = "Qwen2"
    qkv_bias = True
    logit_shift = 1
    sampling = CATEGORICAL
    fixed_values: ClassVar = {
        "use_sliding_window": False,
        "use_mrope": False,
        "is_causal": False,
        "full_attn_mask": True,
    }
    ignored_keys = (*TransformersFamily.ignored_keys, "sliding_window")

    def decoding(self, config: ConfigReader, generation_config: Mapping[str, Any]) -> DecodingFacts:
        facts = super().decoding(config, generation_config)
        return replace(facts, first_commit=True, blocks_without_cache=False)

    def tiny_config(self) -> dict[str, Any]:
        return {"model_type": "Dream", **super().tiny_config(), "use_sliding_window": False}


FAMILY = Dream()
