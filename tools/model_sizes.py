"""Sizes of published models, and small ones of their shape for benchmarks: config.json and the dtype of the
weights. Where a published configuration is not public, rope_theta and rms_norm_eps stand for others."""

from __future__ import annotations

from typing import Any

_LLADA = {
    "model_type": "llada",
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "weight_tying": False,
    "include_bias": False,
    "max_sequence_length": 4096,
}
_DREAM = {
    "model_type": "Dream",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
}
_LLADA_8B = _LLADA | {
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
}
_DREAM_7B = _DREAM | {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "mask_token_id": 151666,
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "bos_token_id": 151643,
}
# sizes of the published models; rope_theta and rms_norm_eps of iLLaDA are not public and stand for others
_ILLADA_8B = {
    "model_type": "illada",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 155136,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "mask_token_id": 5,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_A2D_QWEN3_600M = {
    "model_type": "a2d-qwen3",
    "hidden_act": "silu",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "mask_token_id": 151669,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
}
_SDAR = {
    "model_type": "sdar",
    "hidden_act": "silu",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "block_size": 4,
    "mask_token_id": 151669,
    "eos_token_id": 151643,
    "pad_token_id": 151643,
}
_SDAR_1_7B = _SDAR | {
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "intermediate_size": 6144,
}
_SDAR_4B = _SDAR | {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 9728,
}
_SDAR_8B = _SDAR | {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 12288,
}
# the Qwen3 network of 140 M parameters that the benchmarks of block-causal decoding use
_SDAR_140M = _SDAR | {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2304,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "mask_token_id": 31999,
    "eos_token_id": 31998,
    "pad_token_id": 31998,
}
_FAST_DLLM_V2_7B = {
    "model_type": "Fast_dLLM_Qwen",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "bd_size": 32,
    "mask_token_id": 151665,
    "eos_token_id": 151645,
    "pad_token_id": 151645,
}
_FAST_DLLM_V2_1_5B = _FAST_DLLM_V2_7B | {
    "hidden_size": 1536,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_CODA_1_7B = {
    "model_type": "CoDA",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "mask_token_id": 151669,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
}
_OPEN_DCODER_500M = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "mask_token_id": 151665,
    "eos_token_id": 151643,
    "pad_token_id": 151643,
}
PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    "llada-140m": (
        _LLADA
        | {
            "d_model": 768,
            "n_layers": 12,
            "n_heads": 12,
            "n_kv_heads": 12,
            "mlp_hidden_size": 2304,
            "vocab_size": 32000,
            "embedding_size": 32000,
            "mask_token_id": 31999,
            "eos_token_id": 31998,
            "pad_token_id": 31998,
        },
        "fp32",
    ),
    "llada-1.5b": (
        _LLADA_8B
        | {"d_model": 2048, "n_layers": 20, "n_heads": 16, "n_kv_heads": 16, "mlp_hidden_size": 5632},
        "bf16",
    ),
    "llada-8b": (_LLADA_8B, "bf16"),
    "dream-7b": (_DREAM_7B, "bf16"),
    "illada-8b": (_ILLADA_8B, "bf16"),
    "a2d-qwen3-0.6b": (_A2D_QWEN3_600M, "bf16"),
    "sdar-140m": (_SDAR_140M, "fp32"),
    "sdar-1.7b": (_SDAR_1_7B, "bf16"),
    "sdar-4b": (_SDAR_4B, "bf16"),
    "sdar-8b": (_SDAR_8B, "bf16"),
    "fast-dllm-v2-1.5b": (_FAST_DLLM_V2_1_5B, "bf16"),
    "fast-dllm-v2-7b": (_FAST_DLLM_V2_7B, "bf16"),
    "coda-1.7b": (_CODA_1_7B, "bf16"),
    "open-dcoder-0.5b": (_OPEN_DCODER_500M, "bf16"),
    "sdar-8b-2layers": (_SDAR_8B | {"num_hidden_layers": 2, "max_position_embeddings": 4096}, "bf16"),
    "fast-dllm-v2-7b-2layers": (
        _FAST_DLLM_V2_7B | {"num_hidden_layers": 2, "max_position_embeddings": 4096},
        "bf16",
    ),
    "a2d-qwen3-0.6b-2layers": (
        _A2D_QWEN3_600M | {"num_hidden_layers": 2, "max_position_embeddings": 4096},
        "bf16",
    ),
    "llada-8b-2layers": (
        _LLADA_8B | {"n_layers": 2},
        "bf16",
    ),  # full width, and fits 24 GiB together with PyTorch
    "dream-7b-2layers": (_DREAM_7B | {"num_hidden_layers": 2, "max_position_embeddings": 4096}, "bf16"),
}
