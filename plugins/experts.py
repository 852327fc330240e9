"""Mixture of experts: only the experts that a row chose are computed, as a grouped matrix product over rows
sorted by expert. It replaces the dense form of export/graph/experts.py, which computes all experts for every
row, where a pass has many rows.

Contract, for T rows of K values, E experts of I inner units and at most C experts of a row:

| tensor | type, shape | |
|---|---|---|
| `hidden` | float32, float16 or bfloat16 [T, K] | |
| `gate`, `up` | as hidden [E * I, K] | the experts' weights, one expert after another |
| `down` | as hidden [K, E * I] | side by side |
| `weights` | float32 [T, E] | of the experts; 0 where an expert was not chosen, more than 0 where it was |
| result | as hidden [T, K] | the sum over experts of weight * down(silu(gate(h)) * up(h)) |

Products are summed in float32, and the inner units are rounded to hidden's type. The sum over the experts is
in float32, from the lowest expert to the highest, so that a row's result does not depend on the other rows. A
row with a NaN weight is NaN. At most T * C places are written, whatever `weights` holds.

Four kernels run one after another:

1. `sort_rows`: per expert, the rows that chose it, in order, and their number;
2. `inner`: silu(gate) * up of tiles of those rows: [T * C, I], sorted by expert;
3. `outer`: the product of each tile with its expert's `down`: float32 [T * C, K];
4. `combine`: per row, the weighted sum of its places.

A program of kernel 2 or 3 finds its tile from the experts' numbers of rows; the grid has room for the worst
case, and programs without a tile end at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

from .compile import CompiledKernel, ahead_of_time, dtype_of

Array = npt.NDArray[Any]
ROWS = 64  # rows of a tile
COLUMNS = 64  # columns of a tile
CHUNK = 256  # rows that are sorted at a time
WIDE = 256  # columns that are combined at a time
WARPS, STAGES = 4, 3


class Sizes(NamedTuple):
    """E, I, K and C of the contract, and the type of hidden (fp32, fp16, bf16)."""

    experts: int
    inner: int
    hidden: int
    top_k: int
    dtype: str

    @property
    def depth(self) -> int:
        """Columns of K or I that are multiplied at a time."""
        return 16 if self.dtype == "fp32" else 32

    def tiles(self, rows: Any) -> Any:
        """The most tiles that `rows` rows can need: each expert may have one that is not full."""
        return rows * self.top_k // ROWS + self.experts


@triton.jit
def sort_rows(weights, rows, counts, order, places, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """One program per expert. counts [E]; order [E, T]: its rows, ascending; places [T, E]: where a row is
    among them. Entries of experts that a row did not choose are not written."""
    expert = tl.program_id(0)
    count = tl.full([], 0, tl.int32)
    first = tl.full([], 0, tl.int32)
    while first < rows:  # the interpreter takes no `range` up to an argument
        row = first + tl.arange(0, CHUNK)
        weight = tl.load(weights + row * EXPERTS + expert, mask=row < rows, other=0.0)
        chosen = weight > 0
        ones = chosen.to(tl.int32)
        place = count + tl.cumsum(ones, 0) - ones
        tl.store(order + expert * rows + place, row, mask=chosen)
        tl.store(places + row * EXPERTS + expert, place, mask=chosen)
        count += tl.sum(ones, 0)
        first += CHUNK
    tl.store(counts + expert, count)


@triton.jit
def tile_of(counts, tile, EXPERTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """The expert of a tile (EXPERTS: none), the places of the tile's rows among its rows, which of them it
    has, and the place of its first row among all."""
    expert = tl.arange(0, PADDED)
    count = tl.load(counts + expert, mask=expert < EXPERTS, other=0)
    tiles = (count + ROWS - 1) // ROWS
    mine = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    mine = tl.minimum(mine, EXPERTS)
    before = expert < mine
    within = (tile - tl.sum(tl.where(before, tiles, 0), 0)) * ROWS + tl.arange(0, ROWS)
    has = within < tl.sum(tl.where(expert == mine, count, 0), 0)
    return mine, within, has, tl.sum(tl.where(before, count, 0), 0)


@triton.jit
def inner(
    hidden,
    gate,
    up,
    counts,
    order,
    rows,
    units,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """units [T * C, I]: silu(gate) * up of a tile of rows and of inner units."""
    expert, within, has, first = tile_of(counts, tl.program_id(0), EXPERTS, PADDED, ROWS)
    if expert < EXPERTS:
        row = tl.load(order + expert.to(tl.int64) * rows + within, mask=has, other=0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        weight = (expert.to(tl.int64) * INNER + column) * HIDDEN
        gated = tl.zeros([ROWS, COLUMNS], tl.float32)
        raised = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, HIDDEN, DEPTH):
            k = start + tl.arange(0, DEPTH)
            x = tl.load(
                hidden + row[:, None] * HIDDEN + k[None, :],
                mask=has[:, None] & (k < HIDDEN)[None, :],
                other=0.0,
            )
            inside = (k < HIDDEN)[:, None] & (column < INNER)[None, :]
            g = tl.load(gate + weight[None, :] + k[:, None], mask=inside, other=0.0)
            u = tl.load(up + weight[None, :] + k[:, None], mask=inside, other=0.0)
            gated = tl.dot(x, g, gated, input_precision="ieee")
            raised = tl.dot(x, u, raised, input_precision="ieee")
        product = gated / (1.0 + tl.exp(-gated)) * raised
        place = first + within
        tl.store(
            units + place.to(tl.int64)[:, None] * INNER + column[None, :],
            product.to(units.dtype.element_ty),
            mask=(has & (place < rows * TOP_K))[:, None] & (column < INNER)[None, :],
        )


@triton.jit
def outer(
    units,
    down,
    counts,
    rows,
    parts,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """parts [T * C, K]: a tile of inner units times its expert's `down`."""
    expert, within, has, first = tile_of(counts, tl.program_id(0), EXPERTS, PADDED, ROWS)
    if expert < EXPERTS:
        place = (first + within).to(tl.int64)
        has = has & (place < rows * TOP_K)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        weight = column.to(tl.int64) * (EXPERTS * INNER) + expert.to(tl.int64) * INNER
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, INNER, DEPTH):
            k = start + tl.arange(0, DEPTH)
            x = tl.load(
                units + place[:, None] * INNER + k[None, :],
                mask=has[:, None] & (k < INNER)[None, :],
                other=0.0,
            )
            w = tl.load(
                down + weight[None, :] + k[:, None],
                mask=(k < INNER)[:, None] & (column < HIDDEN)[None, :],
                other=0.0,
            )
            total = tl.dot(x, w, total, input_precision="ieee")
        tl.store(
            parts + place[:, None] * HIDDEN + column[None, :],
            total,
            mask=has[:, None] & (column < HIDDEN)[None, :],
        )


@triton.jit
def combine(
    parts,
    weights,
    counts,
    places,
    rows,
    out,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out [T, K]: the sum of a row's parts, each times its expert's weight, from the lowest expert on."""
    row = tl.program_id(0)
    expert = tl.arange(0, PADDED)
    count = tl.load(counts + expert, mask=expert < EXPERTS, other=0)
    weight = tl.load(weights + row * EXPERTS + expert, mask=expert < EXPERTS, other=0.0)
    chosen = weight > 0
    place = tl.load(places + row * EXPERTS + expert, mask=chosen, other=0) + tl.cumsum(count, 0) - count
    rank = tl.cumsum(chosen.to(tl.int32), 0)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros([WIDE], tl.float32)
    for number in range(1, TOP_K + 1):
        picked = chosen & (rank == number)
        share = tl.sum(tl.where(picked, weight, 0.0), 0)
        at = column * 0 + tl.min(tl.where(picked, place, rows * TOP_K), 0)
        held = (column < HIDDEN) & (at < rows * TOP_K)
        total += share * tl.load(parts + at.to(tl.int64) * HIDDEN + column, mask=held, other=0.0)
    total += tl.sum(weight, 0) * 0.0  # NaN stays NaN
    tl.store(out + row.to(tl.int64) * HIDDEN + column, total.to(out.dtype.element_ty), mask=column < HIDDEN)


def reference(hidden: Array, gate: Array, up: Array, down: Array, weights: Array) -> Array:
    """The contract in NumPy, in float64: the result [T, K]."""
    wide = hidden.astype(np.float64)
    size = len(gate) // weights.shape[1]
    total = np.zeros_like(wide)
    for expert in range(weights.shape[1]):
        of = slice(expert * size, (expert + 1) * size)
        gated, raised = (wide @ weight[of].astype(np.float64).T for weight in (gate, up))
        units = gated / (1 + np.exp(-gated)) * raised
        share = weights[:, expert : expert + 1].astype(np.float64)
        part = share * (units @ down[:, of].astype(np.float64).T)
        total += np.where(share == 0, 0.0, part)
    return total


def _constants(sizes: Sizes) -> dict[str, dict[str, int]]:
    """The compile-time constants of each kernel."""
    experts = {"EXPERTS": sizes.experts}
    tile = experts | {
        "PADDED": triton.next_power_of_2(sizes.experts),
        "INNER": sizes.inner,
        "HIDDEN": sizes.hidden,
        "TOP_K": sizes.top_k,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "DEPTH": sizes.depth,
    }
    return {
        "sort_rows": experts | {"CHUNK": CHUNK},
        "inner": tile,
        "outer": tile,
        "combine": {key: tile[key] for key in ("EXPERTS", "PADDED", "HIDDEN", "TOP_K")} | {"WIDE": WIDE},
    }


def grids(sizes: Sizes, rows: Any) -> dict[str, tuple[Any, Any]]:
    """The number of programs of each kernel along two axes, for `rows` rows."""
    return {
        "sort_rows": (sizes.experts, 1),
        "inner": (sizes.tiles(rows), triton.cdiv(sizes.inner, COLUMNS)),
        "outer": (sizes.tiles(rows), triton.cdiv(sizes.hidden, COLUMNS)),
        "combine": (rows, triton.cdiv(sizes.hidden, WIDE)),
    }


def launch(hidden: Any, gate: Any, up: Any, down: Any, weights: Any, top_k: int) -> Any:
    """Run the kernels on contiguous PyTorch tensors of the contract's shapes and types. Returns the result on
    the same device."""
    import torch

    (rows, width), experts = hidden.shape, weights.shape[1]
    sizes = Sizes(experts, len(gate) // experts, width, top_k, dtype_of(hidden))
    constants, programs = _constants(sizes), grids(sizes, rows)

    def empty(*shape: int, dtype: Any) -> Any:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    counts, order = empty(experts, dtype=torch.int32), empty(experts, rows, dtype=torch.int32)
    places = empty(rows, experts, dtype=torch.int32)
    units = empty(rows * top_k, sizes.inner, dtype=hidden.dtype)
    parts, out = empty(rows * top_k, width, dtype=torch.float32), torch.empty_like(hidden)
    options = {"num_warps": WARPS, "num_stages": STAGES}
    sort_rows[programs["sort_rows"]](weights, rows, counts, order, places, **constants["sort_rows"])
    inner[programs["inner"]](hidden, gate, up, counts, order, rows, units, **constants["inner"], **options)
    outer[programs["outer"]](units, down, counts, rows, parts, **constants["outer"], **options)
    combine[programs["combine"]](parts, weights, counts, places, rows, out, **constants["combine"])
    return out


_INT32, _FLOAT = "*i32", "*fp32"
KERNELS = {"sort_rows": sort_rows, "inner": inner, "outer": outer, "combine": combine}


def _signature(kernel: str, dtype: str) -> dict[str, str]:
    """The types of a kernel's arguments."""
    values = f"*{dtype}"
    kinds = {
        "sort_rows": {"weights": _FLOAT, "rows": "i32", "counts": _INT32, "order": _INT32, "places": _INT32},
        "inner": {
            **dict.fromkeys(("hidden", "gate", "up"), values),
            "counts": _INT32,
            "order": _INT32,
            "rows": "i32",
            "units": values,
        },
        "outer": {"units": values, "down": values, "counts": _INT32, "rows": "i32", "parts": _FLOAT},
        "combine": {
            "parts": _FLOAT,
            "weights": _FLOAT,
            "counts": _INT32,
            "places": _INT32,
            "rows": "i32",
            "out": values,
        },
    }
    return kinds[kernel]


def compiled(kernel: str, sizes: Sizes, compute_capability: int) -> CompiledKernel:
    """One of the four kernels compiled. Its arguments are those of the function above: the inputs' pointers,
    the int32 number of rows, the outputs' pointers."""
    constants = _constants(sizes)[kernel]
    signature = _signature(kernel, sizes.dtype) | dict.fromkeys(constants, "constexpr")
    name = "_".join(map(str, ("dllm_experts", kernel, *sizes)))
    return ahead_of_time(
        KERNELS[kernel], signature, constants, name, compute_capability, WARPS, stages=STAGES
    )
