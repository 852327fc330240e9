"""The cache plans by name, and those of block-causal attention (blocks.py). A plan from outside is an entry
point of the group `dllm_trt.cache_plans`, or `--cache my_module:MyPlan`."""

from __future__ import annotations

import numpy as np

from trt_runtime.artifact.manifest import BLOCK_CAUSAL
from trt_runtime.decoding.blocks import BlockView
from trt_runtime.decoding.cache_plan import (
    PREFILL,
    PREFIX,
    REFINE,
    REFINE_BLOCK,
    REFINE_FILL,
    REFINE_SMALL,
    STORE,
    STORE_AND_REFINE,
    CachePlan,
    DualCache,
    Forward,
    NoCache,
    PrefixCache,
    RowView,
    of_blocks,
)
from trt_runtime.registry import Registry, of_classes


class BlockCache(CachePlan):
    """Exact, with block-causal attention: the prompt's whole blocks are stored by one prefix pass, and each
    finished block by the next block's first step or, without `fuse_stores` and where a model takes the next
    block's first token from the store, by a forward of its own. The last block is not stored."""

    name = "block"
    attentions = (BLOCK_CAUSAL,)
    may_fuse_stores = True

    def next_forward(self, row: RowView) -> Forward:
        assert row.blocks is not None
        if row.blocks.stored < row.blocks.start:
            return self._store(row, row.blocks)
        return self._step(row, row.blocks)

    def _store(self, row: RowView, blocks: BlockView) -> Forward:
        """The forward that stores everything before the block."""
        is_prompt = not row.number
        role, kind = (PREFIX, PREFILL) if is_prompt else (REFINE, STORE)
        start, end = blocks.stored, blocks.start
        if self.fuses_stores:
            kind = kind if is_prompt else STORE_AND_REFINE
            return of_blocks(blocks, (role, kind, start, blocks.end), row.inside, stores=end)
        first = np.arange(end, end + blocks.needs_first)
        return of_blocks(blocks, (role, kind, start, end), first, stores=end, is_forced=True)

    def _step(self, row: RowView, blocks: BlockView) -> Forward:
        return of_blocks(blocks, (REFINE, REFINE_BLOCK, blocks.start, blocks.end), row.inside)


class BlockDualCache(BlockCache):
    """As `block`, but steps compute only the small block, once a forward over the whole block has filled the
    cache and the small block's first token is known. Keys and values of the other small blocks are as old as
    that forward (Fast-dLLM v2, arXiv 2509.26328)."""

    name = "block_dual"
    may_fuse_stores = False

    def _step(self, row: RowView, blocks: BlockView) -> Forward:
        start, end = blocks.small
        if blocks.is_filled and not row.is_masked[start]:
            return of_blocks(blocks, (REFINE, REFINE_SMALL, start, end), row.inside, visible=blocks.end)
        return of_blocks(blocks, (REFINE, REFINE_FILL, blocks.start, blocks.end), row.inside)


PLANS: Registry[type[CachePlan]] = Registry(
    "cache",
    "dllm_trt.cache_plans",
    "a class that extends CachePlan",
    of_classes(CachePlan),
    (NoCache, PrefixCache, DualCache, BlockCache, BlockDualCache),
)


def names_for(attention: str) -> list[str]:
    """The names of the registered plans for a kind of attention."""
    return [plan.name for plan in PLANS.all() if attention in plan.attentions]
