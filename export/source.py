"""A checkpoint, read and understood: its family, its network, and how it decodes. No weights are read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from trt_runtime.artifact.manifest import BLOCK_CAUSAL, FULL, DecodingFacts, ExpertFacts, ModelFacts
from trt_runtime.artifact.tokenizer import Tokenizer
from trt_runtime.errors import DllmError

from . import families
from .checkpoint import huggingface as checkpoints
from .checkpoint import token_names
from .checkpoint import tokenizer as tokenizer_files
from .checkpoint.huggingface import Checkpoint
from .families.base import ConfigReader, Family
from .graph.decoder import DecoderConfig, weight_shapes
from .graph.experts import MixtureOfExperts


@dataclass(frozen=True)
class Source:
    """A checkpoint that was read and understood. mask_token, attention, block_length: if the user gave them.
    notes: what a user should know."""

    checkpoint: Checkpoint
    family: Family
    decoder: DecoderConfig
    decoding: DecodingFacts
    mask_token: int | None = None
    attention: str | None = None
    block_length: int | None = None
    notes: tuple[str, ...] = ()

    def fused(self) -> Source:
        """With the experts in the form of ONNX Runtime's own operator."""
        part = self.decoder.feed_forward
        if not isinstance(part, MixtureOfExperts):
            return self
        return replace(self, decoder=replace(self.decoder, feed_forward=part.fused()))

    def as_in(self, facts: ModelFacts) -> Source:
        """With the experts in the form that an artifact has them."""
        return self.fused() if facts.experts is not None and facts.experts.is_fused else self


def read(
    name: str,
    family: str | None = None,
    ignored_keys: tuple[str, ...] = (),
    mask_token: str | None = None,
    attention: str | None = None,
    block_length: int | None = None,
) -> Source:
    """Locate a checkpoint and understand its config. family: if given, it must be the checkpoint's;
    mask_token: replaces the one that the checkpoint names; attention: of manifest.ATTENTIONS, for families
    whose config does not say; block_length: of block-causal attention, replaces the checkpoint's own. Raises
    DllmError."""
    source = checkpoints.load(*checkpoints.locate(name))
    where = str(source.path / "config.json")
    own, reader, decoder = understood(source.config, where)
    if family is not None and families.find(family) is not own:
        raise DllmError(
            f"{where}: model_type is '{source.config['model_type']}', but MODEL={family} was asked for: give "
            f"MODEL={families.of(source.config)[0]}."
        )
    told = _attention_of(own, attention, where)
    named = token_names.find(
        source,
        decoder.vocab_size,
        mask_token,
        (own.mask_tokens, own.mask_token_id),
        ends_with_padding=own.ends_with_padding,
    )
    blocks, said = _blocks(own, reader, told, block_length)
    decoder = replace(decoder, is_block_causal=told == BLOCK_CAUSAL)
    decoding, notes = _decoding(own, reader, decoder, source.generation_config, named.ids, ignored_keys)
    return Source(
        source,
        own,
        decoder,
        replace(decoding, **blocks, is_mask_known=named.is_mask_known),
        mask_token=None if mask_token is None else decoding.mask_token_id,
        attention=told if own.attention_is_told else None,
        block_length=block_length,
        notes=(*source.notes, *([own.note] if own.note else []), *notes, *said, *named.notes),
    )


def _attention_of(family: Family, asked: str | None, where: str) -> str:
    """A checkpoint's attention. asked: what the user says. Raises DllmError if the user must say and does
    not, or says what the family does not have."""
    if family.attention_is_told:
        if asked is None:
            raise DllmError(
                f"{where}: {family.title} has full attention (mdlm checkpoints) or block-causal attention "
                "(bd3lm checkpoints), and config.json does not say which: give --attention full "
                "(ATTENTION=full) for mdlm, --attention block_causal for bd3lm."
            )
        return asked
    own = FULL if family.block_causal is None else BLOCK_CAUSAL
    if asked not in (None, own):
        raise DllmError(f"{where}: {family.title} has attention '{own}', got --attention {asked}: remove it.")
    return own


def _blocks(
    family: Family, reader: ConfigReader, attention: str, asked: int | None
) -> tuple[dict[str, Any], list[str]]:
    """The facts about blocks for DecodingFacts, and notes. asked: the block length, as the user says. Raises
    DllmError if nothing says the block length."""
    rule = family.block_causal
    if rule is None or attention == FULL:
        if asked is not None:
            raise DllmError(
                f"{reader.where}: --block-length is the block length of block-causal attention, and this "
                f"checkpoint has full attention: remove it (generate has --block-length too)."
            )
        return {}, []
    key = rule.length_key
    own = reader.positive(key) if key is not None and reader.config.get(key) is not None else None
    length = asked or own or rule.default_length
    if length is None:
        raise DllmError(
            f"{reader.where}: has no {key}: give the block length that the checkpoint was trained with by "
            f"--block-length (BLOCK_LENGTH=). {rule.advice}"
        )
    if length < 1:
        raise DllmError(f"--block-length is {length}, expected a whole number from 1.")
    facts = {
        "attention": BLOCK_CAUSAL,
        "block_length": length,
        "block_origin": rule.origin,
        "next_from_store": rule.next_from_store,
        "small_block": rule.small_block,
    }
    is_other = asked is not None and own not in (None, asked)
    return facts, [f"the block length is {asked}, as --block-length says; {key} is {own}"] if is_other else []


def _decoding(
    family: Family,
    reader: ConfigReader,
    decoder: DecoderConfig,
    generation_config: Mapping[str, Any],
    ids: Mapping[str, Any],
    ignored_keys: tuple[str, ...],
) -> tuple[DecodingFacts, list[str]]:
    """How a model decodes, with the token `ids` that its config lacks, and notes. Every key must be accounted
    for; a note lists the ignored ones."""
    reader.supply(ids)
    decoding = family.decoding(reader, generation_config)
    ignored = reader.finish(ignored_keys)
    if decoding.mask_token_id in decoding.eos_token_ids:
        raise DllmError(
            f"{reader.where}: mask_token_id {decoding.mask_token_id} is also an end token: use the "
            f"checkpoint's own config.json, or give the mask token with --mask-token."
        )
    for token in (decoding.mask_token_id, decoding.pad_token_id, *decoding.eos_token_ids):
        if token >= decoder.vocab_size:
            raise DllmError(
                f"{reader.where}: token id {token} is outside the vocabulary of {decoder.vocab_size}."
            )
    note = f"config.json: ignored, because it does not change what the model computes: {', '.join(ignored)}"
    return decoding, [note] if ignored else []


def facts_of_checkpoint(name: str, dtype: str, ignored_keys: tuple[str, ...] = ()) -> ModelFacts:
    """The model of a checkpoint (a directory or hub id) from its configuration only. Refuses what an export
    would refuse, except for missing special tokens, which the tokenizer may name. Raises DllmError."""
    return checked_facts(*checkpoints.config_of(name), dtype, ignored_keys)


def checked_facts(
    config: dict[str, Any],
    generation_config: dict[str, Any],
    where: str,
    dtype: str,
    ignored_keys: tuple[str, ...] = (),
) -> ModelFacts:
    """As facts_of_checkpoint, for a configuration that was read already; `where` names it in errors."""
    family, reader, decoder = understood(config, where)
    token_names.check_agreed(config, generation_config, where)
    named = [file.get(key) for key in token_names.KEYS for file in (config, generation_config)]
    taken = [token for value in named for token in (value if isinstance(value, list) else [value])]
    free = (token for token in itertools.count() if token not in taken)
    ids = {key: next(free) for key in token_names.missing(config, generation_config)}
    if config.get(token_names.MASK) is None and generation_config.get(token_names.MASK) is not None:
        ids[token_names.MASK] = generation_config[token_names.MASK]
    _decoding(family, reader, decoder, generation_config, ids, ignored_keys)
    return facts_of_config(decoder, config, dtype)


def decoding_of(source: Source, tokenizer: Tokenizer) -> DecodingFacts:
    """How a checkpoint decodes with its tokenizer. Raises DllmError."""
    return tokenizer_files.completed(
        source.decoding,
        tokenizer,
        source.decoder.vocab_size,
        mask_is_given=source.mask_token is not None,
    )


def facts_of_source(source: Source, dtype: str) -> ModelFacts:
    """What a manifest says about the network of a checkpoint."""
    return facts_of_config(source.decoder, source.checkpoint.config, dtype)


def understood(config: dict[str, Any], where: str) -> tuple[Family, ConfigReader, DecoderConfig]:
    """The family of a config.json, its reader, and the network. Raises DllmError."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise DllmError(
            f"{where}: model_type is {model_type!r}, expected one of {', '.join(families.names())}."
        )
    family, reader = families.of(config)[1], ConfigReader(config, where)
    decoder = family.decoder(reader)
    if family.block_causal is not None and family.block_causal.length_key is not None:
        reader.ignore(family.block_causal.length_key)  # _blocks reads it, where it is needed
    _check_sizes(decoder, where)
    return family, reader, decoder


def facts_of_config(decoder: DecoderConfig, config: dict[str, Any], dtype: str) -> ModelFacts:
    """What a manifest says about a network."""
    return ModelFacts(
        family=families.of(config)[0],
        num_layers=decoder.num_layers,
        num_heads=decoder.attention.num_heads,
        num_kv_heads=decoder.attention.num_kv_heads,
        head_dim=decoder.attention.head_dim,
        hidden_size=decoder.hidden_size,
        intermediate_size=_dense_size(decoder),
        vocab_size=decoder.vocab_size,
        max_length=decoder.max_length,
        dtype=dtype,
        parameters=sum(math.prod(shape) for shape in weight_shapes(decoder).values()),
        tied_head=decoder.tied_head,
        experts=_experts(decoder),
    )


def _dense_size(decoder: DecoderConfig) -> int:
    """The width of the layers without experts, or that of an expert if all have them."""
    parts = [decoder.feed_forward_of(layer) for layer in range(decoder.num_layers)]
    dense = [part for part in parts if not isinstance(part, MixtureOfExperts)]
    return (dense or parts)[0].intermediate_size


def _experts(decoder: DecoderConfig) -> ExpertFacts | None:
    """What a manifest says about experts."""
    parts = [decoder.feed_forward_of(layer) for layer in range(decoder.num_layers)]
    mixed = [part for part in parts if isinstance(part, MixtureOfExperts)]
    if not mixed:
        return None
    part = mixed[0]
    return ExpertFacts(
        num_experts=part.num_experts,
        top_k=part.router.top_k,
        intermediate_size=part.intermediate_size,
        num_layers=len(mixed),
        shared_size=part.shared.intermediate_size if part.shared else 0,
        is_fused=part.is_fused,
    )


def _check_sizes(decoder: DecoderConfig, where: str) -> None:
    most = {"layers": (decoder.num_layers, 10_000), "positions": (decoder.max_length, 1 << 22)}
    for what, (value, limit) in most.items():
        if value > limit:
            raise DllmError(
                f"{where}: {value} {what}, supported are up to {limit}: use the checkpoint's own config.json."
            )
    if decoder.vocab_size < 4:
        raise DllmError(f"{where}: a vocabulary of {decoder.vocab_size}, expected 4 tokens or more.")
    attention = decoder.attention
    if (
        decoder.hidden_size % attention.num_heads
        or attention.num_heads % attention.num_kv_heads
        or attention.head_dim % 2
    ):
        raise DllmError(
            f"{where}: hidden size {decoder.hidden_size}, {attention.num_heads} heads and "
            f"{attention.num_kv_heads} KV heads do not fit together (heads must divide the hidden size, KV "
            f"heads must divide the heads, and head_dim must be even)."
        )
