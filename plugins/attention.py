"""Attention of a window over the caches in place: keys and values are read where they are, up to each row's
valid length, so that no runtime copies whole caches or computes masked keys. The keys are split among
programs, because a window of one block gives a GPU too few of them.

Contract, for B rows of the batch, H KV heads, S query rows of a KV head (the query heads that share it, one
after another), head size D and capacity C: `query` [B, H, S, D], `key` and `value` [B, H, C, D], all float16,
bfloat16 or float32; `kv_len` int64 [B]. The result [B, H, S, D], of the same type, is the sum over the keys
below kv_len[b] of softmax(scale * query . key) * value. Scores and sums are float32; the weights are rounded
to the inputs' type before they multiply the values. Without a valid key the result is 0. A NaN makes its own
row NaN.

Two kernels run one after another:

1. `attend`: a tile of query rows over a part of the keys, with its largest score and its sum;
2. `combine`: per query row, the parts put together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

from .compile import CompiledKernel, ahead_of_time, dtype_of

Array = npt.NDArray[Any]
ROWS = 32  # query rows of a tile
KEYS = 32  # keys that are scored at a time
PART = 256  # least keys of a part
MOST_PARTS = 4
WARPS, STAGES = 4, 2


class AttentionSizes(NamedTuple):
    """H, D and C of the contract, the scale, and the type of the inputs (fp32, fp16, bf16)."""

    heads: int
    head_dim: int
    capacity: int
    scale: float
    dtype: str

    @property
    def parts(self) -> int:
        """How many programs share the keys."""
        return max(1, min(MOST_PARTS, self.capacity // PART))

    @property
    def steps(self) -> int:
        """How many times a program scores KEYS keys, at most."""
        return triton.cdiv(triton.cdiv(self.capacity, KEYS), self.parts)


@triton.jit
def attend(
    query,
    key,
    value,
    kv_len,
    rows,
    sums,
    norms,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    CAPACITY: tl.constexpr,
    SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """sums [B * H * S, PARTS, D]: the weighted values of a part, not divided; norms [B * H * S, PARTS, 2]:
    its largest score, and the sum of its weights."""
    tiles = (rows + ROWS - 1) // ROWS
    head = (tl.program_id(0) // tiles).to(tl.int64)
    part = tl.program_id(1)
    length = tl.load(kv_len + head // HEADS)
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    has, inside = row < rows, d < SIZE
    place = head * rows + row
    q = tl.load(query + place[:, None] * SIZE + d[None, :], mask=has[:, None] & inside[None, :], other=0.0)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, PADDED], tl.float32)
    for step in range(STEPS):
        first = (part * STEPS + step) * KEYS
        c = first + tl.arange(0, KEYS)
        valid = (c < length) & (c < CAPACITY)
        at = (head * CAPACITY + c) * SIZE
        k = tl.load(key + at[None, :] + d[:, None], mask=valid[None, :] & inside[:, None], other=0.0)
        v = tl.load(value + at[:, None] + d[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * SCALE
        scores = tl.where(valid[None, :], scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(valid[None, :], tl.exp(scores - higher[:, None]), 0.0)
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        weighted = weighted * shrink[:, None]
        weighted = tl.dot(weights.to(v.dtype), v, weighted, input_precision="ieee")
        top = higher
    out = place * PARTS + part
    tl.store(sums + out[:, None] * SIZE + d[None, :], weighted, mask=has[:, None] & inside[None, :])
    tl.store(norms + 2 * out, top, mask=has)
    tl.store(norms + 2 * out + 1, total, mask=has)


@triton.jit
def combine(
    query,  # not read: it gives the result its shape
    sums,
    norms,
    rows,
    out,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    MANY: tl.constexpr,
):
    """out [B * H * S, D]: one program per query row."""
    row = tl.program_id(0).to(tl.int64)
    part, d = tl.arange(0, MANY), tl.arange(0, PADDED)
    has, inside = part < PARTS, d < SIZE
    tops = tl.load(norms + 2 * (row * PARTS + part), mask=has, other=-1e30)
    totals = tl.load(norms + 2 * (row * PARTS + part) + 1, mask=has, other=0.0)
    shrink = tl.exp(tops - tl.max(tops, 0))
    total = tl.sum(totals * shrink, 0)
    each = tl.load(
        sums + (row * PARTS + part)[:, None] * SIZE + d[None, :],
        mask=has[:, None] & inside[None, :],
        other=0.0,
    )
    whole = tl.sum(each * shrink[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + row * SIZE + d, whole.to(out.dtype.element_ty), mask=inside)


def reference(query: Array, key: Array, value: Array, kv_len: Array, scale: float) -> Array:
    """The contract in NumPy, in float64 (but for the rounding of the weights)."""
    q, k, v = (array.astype(np.float64) for array in (query, key, value))
    valid = np.arange(key.shape[2]) < kv_len[:, None]
    scores = np.where(valid[:, None, None], scale * q @ k.swapaxes(2, 3), -np.inf)
    top = np.max(scores, -1, keepdims=True, initial=-1e30)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return (weights @ np.where(valid[:, None, :, None], v, 0)) / np.where(total == 0, 1, total)


def _constants(sizes: AttentionSizes) -> dict[str, dict[str, Any]]:
    """The compile-time constants of both kernels."""
    padded = max(16, triton.next_power_of_2(sizes.head_dim))
    size = {"SIZE": sizes.head_dim, "PADDED": padded, "PARTS": sizes.parts}
    attending = {"CAPACITY": sizes.capacity, "SCALE": sizes.scale, "STEPS": sizes.steps}
    return {
        "attend": {"HEADS": sizes.heads, **size, **attending, "ROWS": ROWS, "KEYS": KEYS},
        "combine": {**size, "MANY": triton.next_power_of_2(sizes.parts)},
    }


def grids(sizes: AttentionSizes, batch: Any, rows: Any) -> dict[str, tuple[Any, Any]]:
    """The number of programs of both kernels along two axes, for `rows` query rows of a KV head."""
    return {
        "attend": (batch * sizes.heads * ((rows + (ROWS - 1)) // ROWS), sizes.parts),
        "combine": (batch * sizes.heads * rows, 1),
    }


def launch(query: Any, key: Any, value: Any, kv_len: Any, scale: float) -> Any:
    """Run the kernels on contiguous PyTorch tensors of the contract's shapes and types. Returns the result on
    the same device."""
    import torch

    (batch, heads, rows, size), capacity = query.shape, key.shape[2]
    sizes = AttentionSizes(heads, size, capacity, scale, dtype_of(query))
    constants, programs = _constants(sizes), grids(sizes, batch, rows)
    count, options = batch * heads * rows, {"device": query.device, "dtype": torch.float32}
    sums = torch.empty(count, sizes.parts, size, **options)
    norms, out = torch.empty(count, sizes.parts, 2, **options), torch.empty_like(query)
    attend[programs["attend"]](
        query,
        key,
        value,
        kv_len,
        rows,
        sums,
        norms,
        **constants["attend"],
        num_warps=WARPS,
        num_stages=STAGES,
    )
    combine[programs["combine"]](query, sums, norms, rows, out, **constants["combine"])
    return out


KERNELS = {"attend": attend, "combine": combine}


def _signature(kernel: str, dtype: str) -> dict[str, str]:
    """The types of a kernel's arguments."""
    values, parts = f"*{dtype}", {"sums": "*fp32", "norms": "*fp32"}
    if kernel == "attend":
        inputs = dict.fromkeys(("query", "key", "value"), values)
        return {**inputs, "kv_len": "*i64", "rows": "i32", **parts}
    return {"query": values, **parts, "rows": "i32", "out": values}


def compiled(kernel: str, sizes: AttentionSizes, compute_capability: int) -> CompiledKernel:
    """One of the two kernels compiled. Its arguments are those of the function above: the inputs' pointers,
    the int32 number of query rows of a KV head, the outputs' pointers."""
    constants = _constants(sizes)[kernel]
    signature = _signature(kernel, sizes.dtype) | dict.fromkeys(constants, "constexpr")
    scale = f"{sizes.scale:.9g}".replace(".", "p").replace("-", "m")
    name = "_".join(map(str, ("dllm_attention", kernel, *sizes[:3], scale, sizes.dtype)))
    return ahead_of_time(
        KERNELS[kernel], signature, constants, name, compute_capability, WARPS, stages=STAGES
    )
