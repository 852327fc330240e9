"""A2D on Qwen2 (`model_type: a2d-qwen2`): as a2d_qwen3.py, on a Qwen2 network with biases on q, k and v."""

from __future__ import annotations

from .a2d_qwen3 import A2d

FAMILY = A2d("Qwen2", qkv_bias=True)
