"""iLLaDA (`model_type: illada`): iLLaDA-8B Base and Instruct. Not LLaDA's code.

A Llama network under transformers' names: grouped KV heads, no biases, a tied head, cos and sin cast to the
model's dtype. It decodes as LLaDA does: row i predicts token i (logit_shift 0), blocks in every cache mode.
The mask is token 5, `<[MASK]>`, which no configuration names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from ..graph.decoder import DecoderConfig
from .base import ConfigReader
from .transformers_family import TransformersFamily


class Illada(TransformersFamily):
    title = "iLLaDA"
    architecture = "Llama"
    mask_tokens = ("<[MASK]>",)
    mask_token_id = 5
    allowed_surplus = (r"lm_head\.weight",)  # a copy of the tied embedding
    fixed_values: ClassVar = {
        "layer_norm_eps": None,  # else LayerNorm with biases
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
    ignored_keys = ("attention_dropout", "resid_pdrop")

    def decoder(self, config: ConfigReader) -> DecoderConfig:
        return replace(super().decoder(config), tied_head=True)

    def tiny_config(self) -> dict[str, Any]:
        changed = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True}
        return {"model_type": "illada", **super().tiny_config(), **changed, "layer_norm_eps": None}


FAMILY = Illada()
