"""Open-dCoder (`model_type: qwen2`): Open-dCoder-0.5B and other models of Open-dLLM, which decode as Dream
does.

A Qwen2.5 network with full attention, whose row i - 1 predicts token i. The checkpoints' config.json is that
of an autoregressive Qwen2.5, which has no mask token: one that nothing names is refused, and the export says
what it assumes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from .dream import Dream


class OpenDcoder(Dream):
    title = "Open-dCoder"
    fixed_values: ClassVar = {"use_sliding_window": False, "use_mrope": False, "is_causal": False}
    note = (
        "model_type 'qwen2' is exported as a masked-diffusion model with full attention (Open-dCoder): an "
        "autoregressive Qwen2 has the same model_type, and would decode to nonsense"
    )

    def tiny_config(self) -> dict[str, Any]:
        return {**super().tiny_config(), "model_type": "qwen2"}


FAMILY = OpenDcoder()
