"""Commit on the GPU: choose which masked positions of a block to unmask and write them into the canvas, so that
the host need not synchronise after every refine step.

Contract, for B rows whose windows begin with their block, R columns of statistics:

| tensor | type, shape | |
|---|---|---|
| `ids` | int64 [B, S], in and out | the windows; the block is their first columns |
| `token`, `confidence` | int64, float32 [B, R] | the statistics of the block's positions |
| `plan` | int32 [B, 4] | the rule (FIXED, THRESHOLD, FACTOR), positions of the block (at most R), and for FIXED the schedule: masks and steps |
| `value` | float64 [B] | the threshold or factor |
| `state` | int32 [B, 2], in and out | steps done, and masks left; NOT_FINITE or PROPOSED_MASK instead of the masks left stops the row |
| `committed` | int32 [B, R], in and out | the step in which a position was committed; other entries stay as they are |

A row without masks is left unchanged. Ties go to the lowest position. The rules are those of CommitRule in
trt_runtime/decoding/policies/base.py. The reference is trt_runtime/decoding/device_commit.py, which also runs
on CPUs.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from trt_runtime.decoding import device_commit as steps
from trt_runtime.decoding.device_commit import FACTOR, FIXED, NOT_FINITE, PROPOSED_MASK

from .compile import CompiledKernel, ahead_of_time

reference = steps.commit
CHUNK = 16  # columns that a position is compared with at a time


@triton.jit
def kernel(
    ids,
    token,
    confidence,
    plan,
    value,
    state,
    committed,
    rows,
    columns,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    FIXED: tl.constexpr,
    FACTOR: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    PROPOSED_MASK: tl.constexpr,
):
    """One program per row. `rows` is S, `columns` is R; BLOCK is a power of two, at least R."""
    row = tl.program_id(0)
    rule, limit = tl.load(plan + row * 4), tl.load(plan + row * 4 + 1)
    planned, total = tl.load(plan + row * 4 + 2), tl.load(plan + row * 4 + 3)
    step, left = tl.load(state + row * 2), tl.load(state + row * 2 + 1)
    bound = tl.load(value + row)
    here = tl.arange(0, BLOCK)
    masked = (here < limit) & (tl.load(ids + row * rows + here, mask=here < limit, other=0) == MASK)
    c = tl.load(confidence + row * columns + here, mask=masked, other=0.0)
    rank = tl.zeros([BLOCK], tl.int32)  # number of masked positions that rank before this one
    for first in range(0, BLOCK, CHUNK):
        other = first + tl.arange(0, CHUNK)
        counts = (other < limit) & (tl.load(ids + row * rows + other, mask=other < limit, other=0) == MASK)
        o = tl.load(confidence + row * columns + other, mask=counts, other=0.0)
        before = (o[None, :] > c[:, None]) | ((o[None, :] == c[:, None]) & (other[None, :] < here[:, None]))
        rank += tl.sum((before & counts[None, :]).to(tl.int32), 1)
    quota = tl.where(step < total, planned // total + (step < planned % total).to(tl.int32), 0)
    enough = ((rank + 2).to(tl.float64) * (1.0 - c).to(tl.float64)) < bound
    accepted = tl.max(tl.where(masked & enough, rank + 1, 1), 0)
    count = tl.where(rule == FIXED, tl.maximum(quota, 1), tl.where(rule == FACTOR, accepted, 1))
    sure = (rule != FIXED) & (rule != FACTOR) & (c >= bound.to(tl.float32))
    chosen = masked & ((rank < count) | sure)
    proposed = tl.load(token + row * columns + here, mask=chosen, other=0)
    broken = tl.sum((masked & ((c - c) != 0.0)).to(tl.int32), 0) > 0
    wrong = tl.sum((chosen & (proposed == MASK)).to(tl.int32), 0) > 0
    going = (left >= 0) & (tl.sum(masked.to(tl.int32), 0) > 0)
    written = chosen & going & (broken == 0) & (wrong == 0)
    tl.debug_barrier()  # all positions are compared before any is written
    tl.store(ids + row * rows + here, proposed, mask=written)
    tl.store(committed + row * columns + here, tl.zeros([BLOCK], tl.int32) + step, mask=written)
    after = tl.sum((masked & (written == 0)).to(tl.int32), 0)
    after = tl.where(broken, NOT_FINITE, tl.where(wrong, PROPOSED_MASK, after))
    tl.store(state + row * 2 + 1, tl.where(going, after, tl.minimum(left, 0)))
    tl.store(state + row * 2, step + (going & (after >= 0)).to(tl.int32))


def launch(
    ids: Any,
    token: Any,
    confidence: Any,
    plan: Any,
    value: Any,
    state: Any,
    committed: Any,
    mask_token_id: int,
) -> None:
    """Run the kernel on contiguous PyTorch tensors of the contract's shapes and types."""
    kernel[(len(ids),)](
        ids,
        token,
        confidence,
        plan,
        value,
        state,
        committed,
        ids.shape[1],
        token.shape[1],
        **constants(mask_token_id, token.shape[1]),
        num_warps=1,
    )


def constants(mask_token_id: int, columns: int) -> dict[str, int]:
    """The kernel's compile-time constants, for blocks of up to `columns` positions."""
    block = max(CHUNK, triton.next_power_of_2(columns))
    return {
        "MASK": mask_token_id,
        "BLOCK": block,
        "CHUNK": CHUNK,
        "FIXED": FIXED,
        "FACTOR": FACTOR,
        "NOT_FINITE": NOT_FINITE,
        "PROPOSED_MASK": PROPOSED_MASK,
    }


SIGNATURE = {
    "ids": "*i64",
    "token": "*i64",
    "confidence": "*fp32",
    "plan": "*i32",
    "value": "*fp64",
    "state": "*i32",
    "committed": "*i32",
    "rows": "i32",
    "columns": "i32",
    **dict.fromkeys(constants(0, 1), "constexpr"),
}


def compiled(mask_token_id: int, columns: int, compute_capability: int) -> CompiledKernel:
    """The kernel compiled for blocks of up to `columns` positions. Its arguments are the seven pointers, then the
    two int32 sizes."""
    held = constants(mask_token_id, columns)
    return ahead_of_time(
        kernel, SIGNATURE, held, f"dllm_commit_{mask_token_id}_{held['BLOCK']}", compute_capability, warps=1
    )
