"""CoDA (`model_type: CoDA`): CoDA-v0 1.7B Base and Instruct. It decodes as Dream does.

A Qwen3 network with full attention: q and k pass an RMSNorm over head_dim before RoPE, no biases. Row i - 1
predicts token i. The head is the checkpoint's own: config.json leaves out `tie_word_embeddings`, for which
newer versions of transformers assume a tied head. The official network builds a causal mask and does not use
it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from .dream import Dream


class Coda(Dream):
    title = "CoDA"
    architecture = "Qwen3"
    qkv_bias = False
    qk_norm = True
    head_dim = 128
    fixed_values: ClassVar = {"attention_bias": False, "use_sliding_window": False}
    ignored_keys = (
        *Dream.ignored_keys,
        # of training
        "block_masking_probability",
        "mask_block_sizes",
        "mask_prob",
        "masking_schedule",
        "prefix_probability",
        "sampling_eps",
        "truncate_probability",
        "attention_kernel",
    )

    def tiny_config(self) -> dict[str, Any]:
        return {**super().tiny_config(), "model_type": "CoDA", "head_dim": 16, "hidden_size": 64}


FAMILY = Coda()
