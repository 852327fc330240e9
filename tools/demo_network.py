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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat([-x2, x1], -1) * sin
