"""Which options of a generation go with which kind of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trt_runtime.artifact.manifest import BLOCK_CAUSAL, FULL, DecodingFacts
from trt_runtime.decoding.blocks import blocks_of
from trt_runtime.decoding.cache_plan import CachePlan
from trt_runtime.decoding.plans import BlockDualCache, names_for
from trt_runtime.errors import DllmError

if TYPE_CHECKING:
    from trt_runtime.decoding.config import GenerationConfig

# options of full attention, and the values at which they do nothing
_OF_FULL: dict[str, Any] = {
    "infill": False, "refresh_every": 1, "refresh_window": 0, "suffix": None, "suffix_decay": False,
}  # fmt: skip
_WHY = "nothing after the block is seen, and stored keys and values are exact"
_WORDS = {FULL: "full", BLOCK_CAUSAL: "block-causal"}


def may_fuse_stores(plan: type[CachePlan], facts: DecodingFacts) -> bool:
    """Whether a finished block may be stored by the first step of the next."""
    return plan.may_fuse_stores and facts.is_block_causal and not facts.next_from_store


def check_attention(config: GenerationConfig, facts: DecodingFacts, plan: type[CachePlan]) -> None:
    """Raise DllmError for options of the other kind of attention."""
    if facts.attention not in plan.attentions:
        raise DllmError(
            f"cache is '{config.cache}', which is not for a model with {_WORDS[facts.attention]} "
            f"attention: use {', '.join(names_for(facts.attention))}."
        )
    if not facts.is_block_causal:
        given = {
            "small_block": config.small_block is not None,
            "fuse_stores": bool(config.fuse_stores),
            "edit_threshold": config.edit_threshold is not None,
        }
        if named := [name for name, is_given in given.items() if is_given]:
            raise DllmError(
                f"{named[0]} is for models with block-causal attention, and this model has full attention: "
                f"remove it."
            )
        return
    for name, off in _OF_FULL.items():
        if getattr(config, name) != off:
            why = "a gap would not see what is right of its block" if name == "infill" else _WHY
            raise DllmError(f"{name} is for models with full attention: here {why}. Remove it.")
    small = config.small_block
    if small is not None and not 1 <= small <= (config.block_length or small):
        raise DllmError(f"small_block is {small}, expected 1 to the block length, {config.block_length}.")
    is_dual = issubclass(plan, BlockDualCache)
    if is_dual and config.speculate > 1:
        raise DllmError(
            "speculate verifies steps of exact caches, and 'block_dual' keeps the keys and values of "
            "earlier steps: use cache 'block', or remove speculate."
        )
    blocks = blocks_of(facts, config.block_length, small)
    if is_dual and blocks is not None and not blocks.has_small_blocks:
        raise DllmError(
            f"cache 'block_dual' keeps keys and values between the small blocks of a block, and here a "
            f"block has only one: use cache 'block', or set small_block below {config.block_length}."
        )
    _check_editing(config, facts, is_dual)
    if config.fuse_stores and not may_fuse_stores(plan, facts):
        why = (
            "this model's next block begins with a token of the store"
            if facts.next_from_store
            else f"cache '{config.cache}' does not"
        )
        raise DllmError(f"fuse_stores stores a block by the first step of the next: {why}. Remove it.")


def _check_editing(config: GenerationConfig, facts: DecodingFacts, is_dual: bool) -> None:
    threshold = config.edit_threshold
    if threshold is None:
        return
    if not 0 <= threshold <= 1:
        raise DllmError(f"edit_threshold is {threshold}, expected 0 to 1.")
    if config.edit_steps < 0:
        raise DllmError(f"edit_steps is {config.edit_steps}, expected a whole number from 0.")
    if facts.logit_shift or facts.small_block or is_dual or config.small_block is not None:
        raise DllmError(
            "edit_threshold edits whole blocks whose rows predict their own tokens, and this model or these "
            "options decode a block in parts or by the row before: remove it."
        )
    if config.speculate > 1:
        raise DllmError(
            "edit_threshold changes committed tokens, and speculate takes them for final: remove one of them."
        )
