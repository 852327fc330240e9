"""The rules of decoding for a row, resolved from the options of a generation and the facts of a model; and
the check of a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from trt_runtime.artifact.manifest import Manifest
from trt_runtime.decoding.blocks import BlockCausal, blocks_of, usable_length
from trt_runtime.decoding.cache_plan import CachePlan
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.editing import Editing
from trt_runtime.decoding.policies.base import Policy
from trt_runtime.decoding.sampling import Sampler
from trt_runtime.errors import DllmError


@dataclass(frozen=True)
class Rules:
    """How a row decodes. The values are not checked here: GenerationConfig does that.

    block_length: None makes one block of all masks, wherever they are (Dream without a cache).
    first_commit: with a cache, a block's prefix pass commits only the block's first position, whatever the
    policy (Dream).
    cache: the plan that chooses each forward.
    hold_back_eos: a proposed end token is committed only when no other candidate is left
    (policies.select_holding_back).
    blocks: of block-causal attention; None: attention is full. stop_after_block: an end token ends the row
    only once its block is finished (SDAR's and A2D's own loops). closing_token_id: of DecodingFacts.
    editing: whether and how committed tokens are edited.
    """

    gen_length: int
    block_length: int | None
    cache: CachePlan
    policy: Policy
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    logit_shift: int = 0
    stop_at_eos: bool = False
    sampler: Sampler = field(default_factory=Sampler)
    first_commit: bool = False
    hold_back_eos: bool = False
    blocks: BlockCausal | None = None
    stop_after_block: bool = False
    closing_token_id: int | None = None
    editing: Editing | None = None


def rules_of(config: GenerationConfig, manifest: Manifest) -> Rules:
    """The decoding rules of a resolved configuration."""
    facts = manifest.decoding
    assert config.gen_length is not None
    return Rules(
        config.gen_length,
        config.block_length,
        config.make_plan(facts),
        config.make_policy(is_threshold_strict=facts.is_threshold_strict),
        facts.mask_token_id,
        facts.eos_token_ids,
        facts.logit_shift,
        config.stop_at_eos,
        config.make_sampler(manifest),
        facts.first_commit,
        config.hold_back_eos,
        blocks_of(facts, config.block_length, config.small_block),
        closing_token_id=facts.closing_token_id,
        editing=config.make_editing(),
    )


def check_prompt(ids: list[int], config: GenerationConfig, manifest: Manifest) -> None:
    """Raise DllmError for a prompt that is empty, too long, outside the vocabulary, or has mask tokens
    without `infill`."""
    model, mask = manifest.model, manifest.decoding.mask_token_id
    assert config.gen_length is not None
    if not ids:
        raise DllmError("the prompt is empty: give at least one token.")
    if wrong := [token for token in ids if not 0 <= token < model.vocab_size]:
        raise DllmError(f"the prompt contains token id {wrong[0]}, expected 0 to {model.vocab_size - 1}.")
    most = usable_length(manifest.decoding, config.block_length, model.max_length)
    if most == 0:
        raise DllmError(
            f"block_length is {config.block_length}, more than the model's {model.max_length} "
            f"positions: lower it."
        )
    limit = f"model's {most}"
    if most < model.max_length:
        limit += f" in whole blocks of {config.block_length}"
    if manifest.decoding.closing_token_id is not None:
        most -= 1
        limit = f"{most} that the model has room for before its closing token"
    if len(ids) + config.gen_length > most:
        left, room = most - config.gen_length, most - len(ids)
        mends = [
            *([f"shorten the prompt to {left} tokens"] if left > 0 else []),
            *([f"lower gen_length to {room}"] if room > 0 else []),
        ]
        lengths = f"the prompt has {len(ids)} tokens"
        if config.gen_length:
            lengths += f" and gen_length is {config.gen_length}, together"
        else:
            lengths += ","
        raise DllmError(
            f"{lengths} more than the {limit}: "
            f"{' or '.join(mends) or 'shorten the prompt and lower gen_length'}."
        )
    if mask in ids and not config.infill:
        raise DllmError(
            f"the prompt contains the mask token ({mask}) at position {ids.index(mask)}: use infill "
            "(--infill) to fill such gaps, or remove it."
        )
    if config.gen_length == 0 and mask not in ids:
        raise DllmError("gen_length is 0 and the prompt has no mask token: there is nothing to generate.")
