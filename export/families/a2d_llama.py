"""A2D on Llama (`model_type: a2d-llama`): as a2d_qwen3.py, on a Llama network."""

from __future__ import annotations

from .a2d_qwen3 import A2d

FAMILY = A2d("Llama")
