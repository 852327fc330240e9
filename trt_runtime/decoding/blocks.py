"""Blocks of block-causal attention: where they begin and end in a row. Pure NumPy.

A position sees its own block, masks included, and everything before it; nothing right of the block. So the
keys and values of a finished block never change: they are computed once more from its final tokens (the
store), and decoding with the cache is exact. Positions are absolute, ranges half-open.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trt_runtime.artifact.manifest import ABSOLUTE, DecodingFacts
from trt_runtime.decoding.policies.base import Ints


@dataclass(frozen=True)
class BlockCausal:
    """How a row is divided. length: positions of a block. origin: where blocks are counted from
    (manifest.ORIGINS). small: positions of a block that are decoded together. next_from_store: a block's
    first token comes from the last row of the forward that stores the block before it."""

    length: int
    origin: str
    small: int
    next_from_store: bool = False

    @property
    def has_small_blocks(self) -> bool:
        """Whether a block is decoded in several parts."""
        return self.small < self.length

    def canvas_length(self, prompt_length: int, gen_length: int) -> int:
        """Positions of the canvas: with absolute blocks, up to the end of the last one."""
        total = prompt_length + gen_length
        return -(-total // self.length) * self.length if self.origin == ABSOLUTE else total

    def reach(self, prompt_length: int, canvas_length: int) -> Ints:
        """The end of each position's block [L]: the position sees everything before it."""
        return row_lengths(np.arange(canvas_length), canvas_length, self.length, self._offset(prompt_length))

    def block_of(self, position: int, prompt_length: int, canvas_length: int) -> tuple[int, int]:
        """The block of a position."""
        offset = self._offset(prompt_length)
        first = (position + offset) // self.length * self.length - offset
        return max(first, 0), min(first + self.length, canvas_length)

    def small_block_of(self, position: int, prompt_length: int, canvas_length: int) -> tuple[int, int]:
        """The small block of a position; small blocks are counted from the start of the block."""
        start, end = self.block_of(position, prompt_length, canvas_length)
        small = start + (position - start) // self.small * self.small
        return small, min(small + self.small, end)

    def _offset(self, prompt_length: int) -> int:
        return 0 if self.origin == ABSOLUTE else -prompt_length % self.length


def row_lengths(positions: Ints, valid: int | Ints, length: int, offset: int = 0) -> Ints:
    """The end of the block of each position, at most `valid` (broadcast to the positions): the graphs'
    row_len. length: positions of a block; offset: how many of the first block's are missing."""
    ends = ((positions + offset) // length + 1) * length - offset
    return np.minimum(ends, valid).astype(np.int64)


def row_len_of(facts: DecodingFacts, positions: Ints, valid: Ints) -> Ints | None:
    """The row_len [B, S] of windows at positions [B, S] with `valid` [B] rows of the cache, with blocks of
    the model's own length from position 0 on; None with full attention."""
    if facts.block_length is None:
        return None
    return np.maximum(row_lengths(positions, valid[:, None], facts.block_length), 1)


def blocks_of(
    facts: DecodingFacts, block_length: int | None = None, small_block: int | None = None
) -> BlockCausal | None:
    """The blocks of a model; None if its attention is full. block_length, small_block: the user's, or the
    model's defaults."""
    if not facts.is_block_causal:
        return None
    assert facts.block_origin is not None and facts.block_length is not None
    length = block_length or facts.block_length
    small = min(small_block or facts.small_block or length, length)
    return BlockCausal(length, facts.block_origin, small, facts.next_from_store)


def usable_length(facts: DecodingFacts, block_length: int | None, longest: int) -> int:
    """How much of a canvas of at most `longest` positions prompt and answer can take: whole blocks, where
    blocks are absolute. block_length: the user's; None: the model's."""
    length = block_length or facts.block_length
    if facts.block_origin != ABSOLUTE or length is None:
        return longest
    return longest // length * length


@dataclass(frozen=True)
class BlockView:
    """Where a row stands among its blocks, for cache plans (cache_plan.py).

    reach [L]: the end of each position's block. start, end: the block that is being decoded. small: its small
    block, half-open. stored: the first positions whose final keys and values are in the cache. is_filled:
    whether the cache has keys and values of a forward over the whole block. needs_first: the block's first
    token is still to come from the forward that stores the block before it.
    """

    reach: Ints
    start: int
    end: int
    small: tuple[int, int]
    stored: int
    is_filled: bool
    needs_first: bool
