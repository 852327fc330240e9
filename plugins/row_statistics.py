"""Row statistics: what the policies need to know about a row of logits, in one pass over it.

Contract, for logits [R, V] float32: `token` int64 [R], the best token that is not the mask, the lowest id on
a tie; `confidence` and `runner_up` float32 [R], the softmax probabilities of that token and of the next best
one that is not the mask; `entropy` float32 [R] of the softmax in nats. The mask token counts in the softmax.
A row with a NaN has NaN statistics. The same as the statistics in export/graph/roles.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

from .compile import CompiledKernel, ahead_of_time

Array = npt.NDArray[Any]
BLOCK = 4096
LEAST = -1e30  # below any logit but finite, so that no difference of two infinities occurs


@triton.jit
def kernel(
    logits,
    token,
    confidence,
    runner_up,
    entropy,
    vocab,
    mask_token_id,
    stride,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program per row. The softmax sums and the best two tokens are carried from block to block."""
    row = tl.program_id(0)
    top = tl.full([], -1e30, tl.float32)  # largest logit so far
    total = tl.full([], 0.0, tl.float32)  # sum of exp(x - top)
    spread = tl.full([], 0.0, tl.float32)  # sum of (x - top) exp(x - top)
    best = tl.full([], -1e30, tl.float32)
    second = tl.full([], -1e30, tl.float32)
    chosen = tl.full([], 0, tl.int64)
    broken = tl.full([], 0, tl.int32)
    for block in range(BLOCKS):
        index = block * BLOCK + tl.arange(0, BLOCK)
        inside = index < vocab
        x = tl.load(logits + row.to(tl.int64) * stride + index, mask=inside, other=-1e30)
        broken += tl.sum((x != x).to(tl.int32))
        x = tl.where(x > -1e30, x, -1e30)  # also -inf
        higher = tl.maximum(top, tl.max(x, 0))
        shrink = tl.exp(top - higher)
        weight = tl.where(inside, tl.exp(x - higher), 0.0)
        spread = shrink * (spread + (top - higher) * total) + tl.sum((x - higher) * weight, 0)
        total = shrink * total + tl.sum(weight, 0)
        top = higher
        allowed = tl.where((index == mask_token_id) | (inside == 0), -1e30, x)
        first = tl.max(allowed, 0)
        where = tl.min(tl.where(allowed == first, index, vocab), 0)
        next_best = tl.max(tl.where(index == where, -1e30, allowed), 0)
        if first > best:
            second = tl.maximum(best, next_best)
            best = first
            chosen = where.to(tl.int64)
        else:
            second = tl.maximum(second, first)
    nothing = tl.where(broken > 0, float("nan"), 0.0)
    tl.store(token + row, chosen)
    tl.store(confidence + row, tl.exp(best - top) / total + nothing)
    tl.store(runner_up + row, tl.exp(second - top) / total + nothing)
    tl.store(entropy + row, tl.log(total) - spread / total + nothing)


def reference(logits: Array, mask_token_id: int) -> tuple[Array, Array, Array, Array]:
    """The contract in NumPy, in float64: token, confidence, runner_up, entropy."""
    wide = logits.astype(np.float64)
    bad = np.isnan(wide).any(-1)
    wide = np.maximum(np.nan_to_num(wide, nan=LEAST, neginf=LEAST), LEAST)
    weights = np.exp(wide - wide.max(-1, keepdims=True))
    probability = weights / weights.sum(-1, keepdims=True)
    entropy = -(probability * np.log(np.maximum(probability, 1e-300))).sum(-1)
    allowed = wide.copy()
    allowed[:, mask_token_id] = LEAST
    token = allowed.argmax(-1)
    rows = np.arange(len(wide))
    allowed[rows, token] = -np.inf
    second = allowed.argmax(-1)
    nothing = np.where(bad, np.nan, 0.0)
    return token, probability[rows, token] + nothing, probability[rows, second] + nothing, entropy + nothing


def launch(logits: Any, mask_token_id: int) -> tuple[Any, Any, Any, Any]:
    """Run the kernel on logits [R, V], a float32 tensor of PyTorch whose rows are contiguous; the outputs are
    on the same device."""
    import torch

    rows, vocab = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    confidence, runner_up, entropy = (
        torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    kernel[(rows,)](
        logits,
        token,
        confidence,
        runner_up,
        entropy,
        vocab,
        mask_token_id,
        logits.stride(0),
        BLOCK=BLOCK,
        BLOCKS=triton.cdiv(vocab, BLOCK),
    )
    return token, confidence, runner_up, entropy


SIGNATURE = {
    "logits": "*fp32",
    "token": "*i64",
    "confidence": "*fp32",
    "runner_up": "*fp32",
    "entropy": "*fp32",
    "vocab": "i32",
    "mask_token_id": "i32",
    "stride": "i32",
    "BLOCK": "constexpr",
    "BLOCKS": "constexpr",
}


def compiled(vocab: int, mask_token_id: int, compute_capability: int) -> CompiledKernel:
    """The kernel compiled for rows of `vocab` contiguous logits. Its only arguments are the five pointers, in
    the order in which TensorRT passes them."""
    constants = {
        "vocab": vocab,
        "mask_token_id": mask_token_id,
        "stride": vocab,
        "BLOCK": BLOCK,
        "BLOCKS": triton.cdiv(vocab, BLOCK),
    }
    name = f"dllm_row_statistics_{vocab}_{mask_token_id}"  # TensorRT identifies kernels by name
    return ahead_of_time(
        kernel, SIGNATURE | dict.fromkeys(constants, "constexpr"), constants, name, compute_capability
    )
