"""Parts of both demo networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Linear(nn.Linear):
    """A bias-free linear layer with float32 master weights, which multiplies in bfloat16 where the processor
    does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not _HAS_BF16:
            return F.linear(x, self.weight)
        return F.linear(x.bfloat16(), self.weight.bfloat16()).float()


def heads_of(h: Tensor, count: int, *projections: nn.Module) -> list[Tensor]:
    """Projections of h [B, L, D], split into heads: [B, count, L, D / count] each."""
    return [projection(h).unflatten(-1, (count, -1)).transpose(1, 2) for projection in projections]


def rotations(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim] of half-split RoPE."""
    angles = torch.outer(torch.arange(length), theta ** (-torch.arange(0, head_dim, 2) / head_dim))
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat([-x2, x1], -1) * sin
