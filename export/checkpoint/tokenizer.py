"""A checkpoint's tokenizer, put into the artifact as tokenizer.json with its configuration and chat template.

Most checkpoints have a tokenizer.json. Dream and other relatives of Qwen2 may have only the slow tokenizer's
files (vocab.json and merges.txt, next to Python code that is never run): this module makes their
tokenizer.json.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from trt_runtime.artifact.manifest import DecodingFacts
from trt_runtime.artifact.tokenizer import Tokenizer
from trt_runtime.errors import DllmError

from .huggingface import read_json

FILE_NAME = "tokenizer.json"
_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
# how a slow byte-level BPE tokenizer splits a text before its merges, by the class in tokenizer_config.json
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = dict.fromkeys(("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast"), _QWEN2)


def note(checkpoint: Path) -> str:
    """What to tell a user about a checkpoint whose tokenizer cannot be exported; empty if there is nothing to
    say."""
    if (checkpoint / FILE_NAME).is_file() or _is_slow(checkpoint):
        return ""
    if models := sorted(file.name for file in checkpoint.glob("*.model")):
        return (
            f"{models[0]} is a SentencePiece model, which is not read: prompts must be token ids. For text, "
            f"make a {FILE_NAME} with "
            "transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...)) and export again"
        )
    return f"the checkpoint has no {FILE_NAME}: prompts must be token ids"


def assemble(checkpoint: Path, directory: Path) -> Tokenizer | None:
    """Write the tokenizer of a checkpoint into `directory`, and open it. None if there is none. Raises
    DllmError."""
    if not (checkpoint / FILE_NAME).is_file() and not _is_slow(checkpoint):
        return None
    directory.mkdir()
    for name in _BESIDE:
        if (checkpoint / name).is_dir():
            shutil.copytree(checkpoint / name, directory / name, ignore_dangling_symlinks=True)
        elif (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, directory / name)
    if (checkpoint / FILE_NAME).is_file():
        shutil.copyfile(checkpoint / FILE_NAME, directory / FILE_NAME)
    else:
        _from_slow_files(checkpoint).save(str(directory / FILE_NAME))
    try:
        return Tokenizer(directory)
    except DllmError as error:  # the artifact does not exist yet: the message names the checkpoint's file
        said = (
            str(error)
            .replace(str(directory), str(checkpoint))
            .replace("export the artifact again", "download it again")
        )
        raise DllmError(said) from error


def completed(
    decoding: DecodingFacts, tokenizer: Tokenizer, vocab_size: int, *, mask_is_given: bool = False
) -> DecodingFacts:
    """The decoding facts, with further end tokens: the token that ends a turn of the chat template, and the
    padding tokens with which a model was trained to fill the rest of an answer (DiffuCoder's <|dlm_pad|>):
    the pad tokens of the tokenizer and of config.json. A pad token counts only if it is an added token (a
    pad_token_id of 0 by mistake is an ordinary word) and is not the tokenizer's eos_token, for which
    generation_config.json decides.

    Raises DllmError for a tokenizer of another model: ids beyond the vocabulary, or another mask token,
    unless the user gave the mask.
    """
    if (most := tokenizer.max_id) >= vocab_size:
        raise DllmError(
            f"{FILE_NAME}: has token id {most}, but the model's vocabulary has {vocab_size} tokens: use the "
            f"tokenizer of this checkpoint."
        )
    mask = tokenizer.special_id("mask_token")
    if mask is not None and mask != decoding.mask_token_id and not mask_is_given:
        raise DllmError(
            f"{FILE_NAME}: its mask token is {mask}, config.json says {decoding.mask_token_id}: take both "
            "from one checkpoint, or say which is right with --mask-token."
        )
    added, eos = tokenizer.added_tokens, tokenizer.special_id("eos_token")
    pads = [
        token
        for token in (tokenizer.special_id("pad_token"), decoding.pad_token_id)
        if token in added and token != eos
    ]
    ends = list(decoding.eos_token_ids)
    for end in (tokenizer.end_of_turn(), *pads):
        if end is not None and end not in (*ends, decoding.mask_token_id):
            ends.append(end)
    return replace(decoding, eos_token_ids=tuple(ends))


def _is_slow(checkpoint: Path) -> bool:
    return (checkpoint / _VOCABULARY).is_file() and (checkpoint / _MERGES).is_file()


def _from_slow_files(checkpoint: Path) -> tokenizers.Tokenizer:
    config = read_json(checkpoint / "tokenizer_config.json")
    name = config.get("tokenizer_class")
    if not isinstance(name, str) or name not in _SPLITS:
        raise DllmError(
            f"{checkpoint}: has no {FILE_NAME}, and its tokenizer class {name!r} is unsupported "
            f"(supported: {', '.join(_SPLITS)}): make a {FILE_NAME} "
            "with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))."
        )
    try:
        model = models.BPE.from_file(str(checkpoint / _VOCABULARY), str(checkpoint / _MERGES))
    except Exception as error:  # the package raises plain Exception
        raise DllmError(
            f"{checkpoint}: {_VOCABULARY} and {_MERGES} are not readable ({error}): download them again."
        ) from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLITS[name]), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, checkpoint, config)
    return tokenizer


def _add_tokens(tokenizer: tokenizers.Tokenizer, checkpoint: Path, config: dict[str, Any]) -> None:
    """The added tokens with their ids, from tokenizer_config.json or the older added_tokens.json."""
    listed = _listed(checkpoint, config)
    for token, entry in sorted(listed.items()):
        flags = {key: entry[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in entry}
        added = tokenizers.AddedToken(entry["content"], special=bool(entry.get("special")), **flags)
        (tokenizer.add_special_tokens if entry.get("special") else tokenizer.add_tokens)([added])
        if (got := tokenizer.token_to_id(entry["content"])) != token:
            raise DllmError(
                f"{checkpoint}: the added token {entry['content']!r} gets id {got}, "
                f"tokenizer_config.json says {token}: its "
                f"vocabulary has gaps; make a {FILE_NAME} with transformers' save_pretrained."
            )


def _listed(checkpoint: Path, config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The added tokens by id, checked."""
    older = checkpoint / "added_tokens.json"
    named: Any = config.get("added_tokens_decoder")
    if not named and older.is_file():
        named = {token: {"content": text, "special": True} for text, token in read_json(older).items()}
    listed: dict[int, dict[str, Any]] = {}
    for token, entry in (named or {}).items() if isinstance(named or {}, dict) else [("", named)]:
        texts = (
            isinstance(entry, dict) and isinstance(entry.get("content"), str) and _is_text(entry["content"])
        )
        flags = texts and all(
            isinstance(entry.get(key, False), bool)
            for key in ("single_word", "lstrip", "rstrip", "normalized")
        )
        if not str(token).isdigit() or not flags:
            raise DllmError(
                f"{checkpoint}: the added token {token!r} is {entry!r}, expected an id with 'content' and "
                "flags: download tokenizer_config.json again."
            )
        listed[int(token)] = entry
    return listed


def _is_text(text: str) -> bool:
    return bool(text) and not any(0xD800 <= ord(letter) <= 0xDFFF for letter in text)
