"""The variants that a benchmark runs: caches, each with one token per forward and with parallel
unmasking."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trt_runtime.artifact.manifest import DecodingFacts
from trt_runtime.decoding.attention_options import may_fuse_stores
from trt_runtime.decoding.blocks import blocks_of
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.plans import BlockCache, BlockDualCache, names_for


def variants_of(
    base: GenerationConfig, facts: DecodingFacts, tokens_per_step: int | None
) -> dict[str, GenerationConfig]:
    """The variants by name. base: resolved, with a fixed schedule; tokens_per_step: measure that schedule
    instead of parallel unmasking."""
    caches = _caches(base, facts)
    if tokens_per_step is None:
        single = {name: replace(base, **cache) for name, cache in caches.items()}
        parallel = {name: replace(config, policy="threshold") for name, config in single.items()}
        return single | {f"{name}+parallel": config for name, config in parallel.items()}
    assert base.gen_length is not None and base.block_length is not None
    blocks = -(-base.gen_length // base.block_length)
    several = replace(base, steps=blocks * -(-base.block_length // tokens_per_step))
    vanilla = {"vanilla": replace(base, cache="none")}
    return vanilla | {name: replace(several, **cache) for name, cache in caches.items()}


def _caches(base: GenerationConfig, facts: DecodingFacts) -> dict[str, dict[str, Any]]:
    """The caches to measure, as options by name."""
    caches: dict[str, dict[str, Any]] = {name: {"cache": name} for name in names_for(facts.attention)}
    blocks = blocks_of(facts, base.block_length, base.small_block)
    if blocks is None:
        return caches
    if not blocks.has_small_blocks:
        del caches[BlockDualCache.name]
    if may_fuse_stores(BlockCache, facts):
        caches[BlockCache.name] |= {"fuse_stores": False}
        caches["block-fused"] = {"cache": BlockCache.name, "fuse_stores": True}
    return caches
