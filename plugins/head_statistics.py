"""The head and the row statistics in one pass over the head's weights: logits are never written, and the
weights stay as they are stored, so that the float32 copy of the head is not needed.

Contract, for R rows of K values and a vocabulary of V: `hidden` [R, K] and `head` [V, K], both float16,
bfloat16 or float32. The outputs are those of row_statistics.py for the logits hidden @ head.T: token,
confidence, runner_up and entropy, [R] each. Products of 16-bit numbers are exact in float32, and are summed
in float32, as the head of export/graph/roles.py does with its float32 copies. Ties take the lowest id; a row
with a NaN logit has NaN statistics.

Two kernels run one after another:

1. `partial`: a tile of rows times a tile of the vocabulary, and what the statistics need of it;
2. `merge`: per row, the tiles put together.

The rows of a call are the first axis of the grid, so that the programs that read the same weights run next to
each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

from . import row_statistics
from .compile import CompiledKernel, ahead_of_time, dtype_of

Array = npt.NDArray[Any]
ROWS = 32  # of a tile: a refine step's block
COLUMNS = 128  # of the vocabulary in a tile
WARPS, STAGES = 4, 3
PARTS = ("top", "total", "spread", "best", "second", "broken")  # float32 [R, tiles] each; `chosen` is int32


class HeadSizes(NamedTuple):
    """V and K of the contract, the mask's id, and the type of both inputs (fp32, fp16, bf16)."""

    vocab: int
    hidden: int
    mask_token_id: int
    dtype: str

    @property
    def tiles(self) -> int:
        """Tiles of the vocabulary."""
        return triton.cdiv(self.vocab, COLUMNS)

    @property
    def depth(self) -> int:
        """Columns of K that are multiplied at a time."""
        return 16 if self.dtype == "fp32" else 32


@triton.jit
def partial(
    hidden,
    head,
    rows,
    parts,
    chosen,
    VOCAB: tl.constexpr,
    HIDDEN: tl.constexpr,
    MASK: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """parts [6, R, TILES], chosen [R, TILES]: of a tile's logits, the largest; the sum of exp(x - largest);
    the sum of (x - largest) exp(x - largest); the best and the second best that are not the mask; how many
    are NaN; and the id of the best."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    has, inside = row < rows, column < VOCAB
    wide_row, wide_column = row.to(tl.int64), column.to(tl.int64)
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, HIDDEN, DEPTH):
        k = start + tl.arange(0, DEPTH)
        h = tl.load(
            hidden + wide_row[:, None] * HIDDEN + k[None, :],
            mask=has[:, None] & (k < HIDDEN)[None, :],
            other=0.0,
        )
        w = tl.load(
            head + wide_column[None, :] * HIDDEN + k[:, None],
            mask=(k < HIDDEN)[:, None] & inside[None, :],
            other=0.0,
        )
        x = tl.dot(h, w, x, input_precision="ieee")
    broken = tl.sum((x != x).to(tl.float32), 1)
    x = tl.where((x > -1e30) & inside[None, :], x, -1e30)  # also NaN and -inf
    top = tl.max(x, 1)
    weight = tl.where(inside[None, :], tl.exp(x - top[:, None]), 0.0)
    total = tl.sum(weight, 1)
    spread = tl.sum((x - top[:, None]) * weight, 1)
    allowed = tl.where((column == MASK)[None, :], -1e30, x)
    best = tl.max(allowed, 1)
    where = tl.min(tl.where(allowed == best[:, None], column[None, :], VOCAB), 1)
    second = tl.max(tl.where(column[None, :] == where[:, None], -1e30, allowed), 1)
    size = rows.to(tl.int64) * TILES
    place = wide_row * TILES + tile
    tl.store(parts + place, top, mask=has)
    tl.store(parts + size + place, total, mask=has)
    tl.store(parts + 2 * size + place, spread, mask=has)
    tl.store(parts + 3 * size + place, best, mask=has)
    tl.store(parts + 4 * size + place, second, mask=has)
    tl.store(parts + 5 * size + place, broken, mask=has)
    tl.store(chosen + place, where, mask=has)


@triton.jit
def merge(
    parts,
    chosen,
    rows,
    token,
    confidence,
    runner_up,
    entropy,
    TILES: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One program per row: the tiles put together. Of equal best ones, the first tile's, whose ids are
    lower."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, PADDED)
    inside = tile < TILES
    size = rows.to(tl.int64) * TILES
    place = row * TILES + tile
    tops = tl.load(parts + place, mask=inside, other=-1e30)
    totals = tl.load(parts + size + place, mask=inside, other=0.0)
    spreads = tl.load(parts + 2 * size + place, mask=inside, other=0.0)
    bests = tl.load(parts + 3 * size + place, mask=inside, other=-1e30)
    seconds = tl.load(parts + 4 * size + place, mask=inside, other=-1e30)
    broken = tl.sum(tl.load(parts + 5 * size + place, mask=inside, other=0.0), 0)
    top = tl.max(tops, 0)
    shrink = tl.exp(tops - top)
    total = tl.sum(shrink * totals, 0)
    spread = tl.sum(shrink * (spreads + (tops - top) * totals), 0)
    best = tl.max(bests, 0)
    winner = tl.min(tl.where((bests == best) & inside, tile, PADDED), 0)
    is_winner = tile == winner
    second = tl.max(tl.where(is_winner, seconds, bests), 0)
    picked = tl.sum(tl.where(is_winner, tl.load(chosen + place, mask=inside, other=0), 0), 0)
    nothing = tl.where(broken > 0, float("nan"), 0.0)
    tl.store(token + row, picked.to(tl.int64))
    tl.store(confidence + row, tl.exp(best - top) / total + nothing)
    tl.store(runner_up + row, tl.exp(second - top) / total + nothing)
    tl.store(entropy + row, tl.log(total) - spread / total + nothing)


def reference(hidden: Array, head: Array, mask_token_id: int) -> tuple[Array, Array, Array, Array]:
    """The contract in NumPy, in float64: token, confidence, runner_up, entropy."""
    return row_statistics.reference(hidden.astype(np.float64) @ head.astype(np.float64).T, mask_token_id)


def _constants(sizes: HeadSizes) -> dict[str, dict[str, int]]:
    """The compile-time constants of both kernels."""
    return {
        "partial": {
            "VOCAB": sizes.vocab,
            "HIDDEN": sizes.hidden,
            "MASK": sizes.mask_token_id,
            "TILES": sizes.tiles,
            "ROWS": ROWS,
            "COLUMNS": COLUMNS,
            "DEPTH": sizes.depth,
        },
        "merge": {"TILES": sizes.tiles, "PADDED": triton.next_power_of_2(sizes.tiles)},
    }


def grids(sizes: HeadSizes, rows: Any) -> dict[str, tuple[Any, Any]]:
    """The number of programs of both kernels along two axes, for `rows` rows."""
    return {"partial": ((rows + (ROWS - 1)) // ROWS, sizes.tiles), "merge": (rows, 1)}


def launch(hidden: Any, head: Any, mask_token_id: int) -> tuple[Any, Any, Any, Any]:
    """Run the kernels on contiguous PyTorch tensors of the contract's shapes and types; the outputs are on
    the same device."""
    import torch

    (rows, width), vocab = hidden.shape, len(head)
    sizes = HeadSizes(vocab, width, mask_token_id, dtype_of(hidden))
    constants, programs = _constants(sizes), grids(sizes, rows)

    def empty(*shape: int, dtype: Any = torch.float32) -> Any:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    parts, chosen = empty(len(PARTS), rows, sizes.tiles), empty(rows, sizes.tiles, dtype=torch.int32)
    options = {"num_warps": WARPS, "num_stages": STAGES}
    partial[programs["partial"]](hidden, head, rows, parts, chosen, **constants["partial"], **options)
    outputs = empty(rows, dtype=torch.int64), *(empty(rows) for _ in range(3))
    merge[programs["merge"]](parts, chosen, rows, *outputs, **constants["merge"])
    return outputs


KERNELS = {"partial": partial, "merge": merge}


def _signature(kernel: str, dtype: str) -> dict[str, str]:
    """The types of a kernel's arguments."""
    values = f"*{dtype}"
    if kernel == "partial":
        return {"hidden": values, "head": values, "rows": "i32", "parts": "*fp32", "chosen": "*i32"}
    outputs = dict.fromkeys(("confidence", "runner_up", "entropy"), "*fp32")
    return {"parts": "*fp32", "chosen": "*i32", "rows": "i32", "token": "*i64", **outputs}


def compiled(kernel: str, sizes: HeadSizes, compute_capability: int) -> CompiledKernel:
    """One of the two kernels compiled. Its arguments are those of the function above: the inputs' pointers,
    the int32 number of rows, the outputs' pointers."""
    constants = _constants(sizes)[kernel]
    signature = _signature(kernel, sizes.dtype) | dict.fromkeys(constants, "constexpr")
    name = "_".join(map(str, ("dllm_head", kernel, *sizes)))
    return ahead_of_time(
        KERNELS[kernel], signature, constants, name, compute_capability, WARPS, stages=STAGES
    )
