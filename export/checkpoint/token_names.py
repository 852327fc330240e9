"""The mask, end and padding tokens: from config.json or generation_config.json, else from the tokenizer or
the user."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trt_runtime.artifact.tokenizer import Tokenizer
from trt_runtime.errors import DllmError

from . import tokenizer as tokenizer_files
from .huggingface import Checkpoint, read_json

MASK, END, PAD = KEYS = ("mask_token_id", "eos_token_id", "pad_token_id")


@dataclass
class Found:
    """Token ids that config.json lacks or has wrong, by its keys, and notes on where they come from."""

    ids: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_mask_known: bool = True


def missing(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> list[str]:
    """The keys that neither file has."""
    return [key for key in KEYS if config.get(key) is None and generation_config.get(key) is None]


def check_agreed(config: Mapping[str, Any], generation_config: Mapping[str, Any], where: str) -> None:
    """Raise DllmError if both files name a mask token, and different ones: nothing says which one the model
    was trained with."""
    own, other = (
        [value] if type(value) is int else value for value in (config.get(MASK), generation_config.get(MASK))
    )
    if own is not None and other is not None and own != other:
        raise DllmError(
            f"{where}: {MASK} is {config[MASK]!r}, generation_config.json says {generation_config[MASK]!r}: "
            "take both files from one checkpoint, or say which is right with --mask-token."
        )


def find(
    checkpoint: Checkpoint,
    vocab_size: int,
    given: str | None = None,
    of_family: tuple[tuple[str, ...], int | None] = ((), None),
    *,
    ends_with_padding: bool = False,
) -> Found:
    """The token ids that config.json lacks, so that all three tokens are known. given: the mask token, as
    text or id, which takes precedence. of_family: possible texts, and the id, of the mask token in the
    family's published checkpoints, used if nothing else names it. ends_with_padding: the end token of
    the family is its padding token, where nothing else names one. Raises DllmError, saying how to give it, if
    nothing names the mask or an end token."""
    names, tokenizer = Found(), _Tokenizer(checkpoint.path)
    config, generation_config = checkpoint.config, checkpoint.generation_config
    named = generation_config.get(MASK) if config.get(MASK) is None else config[MASK]
    if given is not None:
        names.ids[MASK] = _given(given, tokenizer, vocab_size)
        if named is not None and named != names.ids[MASK]:
            names.notes.append(
                f"the mask token is {names.ids[MASK]}, as --mask-token says; {MASK} of the checkpoint is "
                f"{named!r}"
            )
    else:
        check_agreed(config, generation_config, f"{checkpoint.path / 'config.json'}")
    if given is None and named is not None and config.get(MASK) is None:
        names.ids[MASK] = named
        names.notes.append(f"config.json has no {MASK}: it is {named!r}, of generation_config.json")
    for key in missing(config, generation_config):
        pad = generation_config.get(PAD) if config.get(PAD) is None else config[PAD]
        if key == END and ends_with_padding and pad is not None and tokenizer.opened is None:
            names.ids[key] = pad
            names.notes.append(f"config.json has no {key}: it is {pad}, the padding token")
        if key not in names.ids:
            known = _of_family(tokenizer, vocab_size, *of_family) if key == MASK else None
            if key == MASK and known is None and of_family[1] is not None and tokenizer.opened is None:
                known = _stand_in(checkpoint, vocab_size, of_family[1])
                names.is_mask_known = False
            names.ids[key], said = known or _of_tokenizer(key, tokenizer, names, checkpoint)
            names.notes.append(f"config.json has no {key}: it is {said}")
    return names


class _Tokenizer:
    """A checkpoint's tokenizer, opened only if it is needed: most checkpoints do not need it here."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def opened(self) -> Tokenizer | None:
        with tempfile.TemporaryDirectory() as temporary:
            return tokenizer_files.assemble(self.path, Path(temporary) / "tokenizer")

    def masks(self) -> str:
        """The tokens that look like a mask token, for a message."""
        added = {} if self.opened is None else self.opened.added_tokens
        like = [f"{text} ({token})" for token, text in added.items() if "mask" in text.lower()]
        return f"; its tokenizer has {', '.join(like[:5])}" if like else ""


def _given(given: str, tokenizer: _Tokenizer, vocab_size: int) -> int:
    token = int(given) if given.isascii() and given.isdigit() and len(given) < 20 else None
    if token is None:
        if tokenizer.opened is None:
            raise DllmError(
                f"--mask-token {given!r}: {tokenizer.path} has no tokenizer to look it up in: give the "
                f"token's id."
            )
        token = tokenizer.opened.id_of(given)
    if token is None:
        raise DllmError(
            f"--mask-token {given!r}: not a token of {tokenizer.path}{tokenizer.masks()}: give a token or "
            f"its id."
        )
    if not 0 <= token < vocab_size:
        raise DllmError(f"--mask-token {given!r}: token id {token}, expected 0 to {vocab_size - 1}.")
    return token


def _of_family(
    tokenizer: _Tokenizer, vocab_size: int, texts: tuple[str, ...], token: int | None
) -> tuple[int, str] | None:
    """The mask token of a family's published checkpoints, and where it comes from; None if the family has
    none, the tokenizer names its own or does not have it."""
    ids: dict[str, Any] = {}
    if tokenizer.opened is not None:
        token = None
        if tokenizer.opened.special_id("mask_token") is None:
            ids = {text: tokenizer.opened.id_of(text) for text in texts}
    elif texts and (file := tokenizer.path / "added_tokens.json").is_file():
        added = read_json(file, "remove it, or download it again")
        ids = {text: added.get(text) for text in texts}
    named = [(text, own) for text, own in ids.items() if type(own) is int and own >= 0]
    text, token = named[0] if named else (" or ".join(texts), token)
    if token is None or token >= vocab_size:
        return None
    return token, f"{token}, {text} of the published checkpoints"


def _stand_in(checkpoint: Checkpoint, vocab_size: int, published: int) -> tuple[int, str]:
    """A token in place of a mask token that nothing names, where the family's own is outside the vocabulary:
    the last one that is not named as something else."""
    taken: set[Any] = set()
    for file in (checkpoint.config, checkpoint.generation_config):
        for value in map(file.get, KEYS):
            taken |= set(value) if isinstance(value, list) else {value}
    token = next(token for token in range(vocab_size - 1, -1, -1) if token not in taken)
    return token, (
        f"unknown: {published}, that of the published checkpoints, is outside this vocabulary of "
        f"{vocab_size}. {token} stands for it: the artifact replays recorded cases, and decodes nothing "
        f"else until it is exported with --mask-token"
    )


def _of_tokenizer(key: str, tokenizer: _Tokenizer, names: Found, checkpoint: Checkpoint) -> tuple[Any, str]:
    """The id for a key that no configuration has, and where it comes from."""
    name = key.removesuffix("_id")
    token = None if tokenizer.opened is None else tokenizer.opened.special_id(name)
    if token is not None:
        return token, f"{token}, the tokenizer's {name}"
    if key == PAD:  # it is not used in any computation
        ends = names.ids.get(END) or checkpoint.generation_config.get(END) or checkpoint.config.get(END)
        return (
            ends[0] if isinstance(ends, list) and ends else ends
        ), "the end token, as the tokenizer names no pad_token"
    where = f"{checkpoint.path}: neither config.json ({key}) nor the tokenizer ({name}) says which token"
    if key == MASK:
        raise DllmError(
            f"{where} is the mask: give it with --mask-token TOKEN, or its id{tokenizer.masks()}."
        )
    raise DllmError(f"{where} ends a text: add {key} to config.json or generation_config.json.")
