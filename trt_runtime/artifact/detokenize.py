"""Token ids back to text: what the tokenizers package leaves to transformers, and how much of a text no later
token can change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

# transformers' clean_up_tokenization, in its order: each is replaced by itself without its space (" ' "
# without both)
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_IN_CLEANED = set("".join(_CLEANED))
_GOES_ON = {
    text[i] for text in _CLEANED for i in range(len(text) - 1)
}  # characters that another one may follow in these
_PAIRS = {text[i : i + 2] for text in _CLEANED for i in range(len(text) - 1)}


def _byte_alphabet() -> list[str]:
    """The character for each byte in a byte-level vocabulary (GPT-2's): the byte itself if it is visible,
    else one from U+0100."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


class Detokenizer:
    """Decodes as transformers does.

    Added tokens decode to exactly their own text. A byte-level decoder would read the letters of one like
    'größe' as bytes, so it is given the letters that stand for the token's bytes instead. (transformers' slow
    tokenizers, Dream's own among them, keep added tokens as they are; its fast ones have the same bug as the
    package.) If the configuration sets clean_up_tokenization_spaces, spaces before punctuation are removed,
    but not for BPE, as in transformers 5.
    """

    def __init__(self, tokenizer: Any, config: Mapping[str, Any]) -> None:
        """`tokenizer`: of the tokenizers package. `config`: tokenizer_config.json."""
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token for token, entry in added.items() if entry.special}
        contents = {token: entry.content for token, entry in added.items()}
        self._misread = _misread(tokenizer, contents) if _is_byte_level(tokenizer) else {}
        is_bpe = type(tokenizer.model).__name__ == "BPE"
        forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
        self._cleans = bool(config.get("clean_up_tokenization_spaces")) and (not is_bpe or bool(forced))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out."""
        text = self._raw(list(ids), skip_special=True)
        return _clean(text) if self._cleans else text

    def settled(self, ids: Iterable[int]) -> str:
        """The part of that text that no later token can change: without an incomplete character, and without
        an end whose spaces the next characters may remove."""
        text = self._raw(list(ids), skip_special=True).rstrip("\ufffd")
        return _clean(text[: _settled_length(text)]) if self._cleans else text

    def spelled(self, ids: Iterable[int]) -> str:
        """Text of token ids, with special tokens as they are written."""
        text = self._raw(list(ids), skip_special=False)
        return _clean(text) if self._cleans else text

    def piece(self, token: int) -> str:
        """The text of one token; special tokens as they are written."""
        return self._raw([token], skip_special=False)

    def _raw(self, ids: list[int], *, skip_special: bool) -> str:
        if self._misread.keys().isdisjoint(ids):
            return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special))
        kept = [token for token in ids if not (skip_special and token in self._special)]
        read = [self._misread.get(token) or self._tokenizer.id_to_token(token) for token in kept]
        return str(self._tokenizer.decoder.decode([text for text in read if text is not None]))


def _is_byte_level(tokenizer: Any) -> bool:
    def holds(decoder: Any) -> bool:
        inner = decoder.get("decoders", []) if isinstance(decoder, dict) else []
        return isinstance(decoder, dict) and (
            decoder.get("type") == "ByteLevel" or any(holds(part) for part in inner)
        )

    return tokenizer.decoder is not None and holds(json.loads(tokenizer.decoder.__getstate__()))


def _misread(tokenizer: Any, added: Mapping[int, str]) -> dict[int, str]:
    """For each added token that does not decode to its own text (also because the package stores normalised
    tokens): the spelling that a byte-level decoder turns into that text."""
    letters = _byte_alphabet()
    return {
        token: "".join(letters[byte] for byte in text.encode())
        for token, text in added.items()
        if tokenizer.decode([token], skip_special_tokens=False) != text
    }


def _clean(text: str) -> str:
    for pattern in _CLEANED:
        text = text.replace(pattern, pattern.strip())
    return text


def _settled_length(text: str) -> int:
    """The length of the longest prefix that can be cleaned independently of the rest: it ends where no
    replacement can match across, even after an earlier one removed a space. That is after a character that
    only ends patterns, before one that is in no pattern, or between two non-spaces that are neighbours in no
    pattern."""
    for end in range(len(text), 0, -1):
        before, after = text[end - 1], text[end : end + 1]
        if before not in _GOES_ON or (after and after not in _IN_CLEANED):
            return end
        if after and " " not in (before, after) and before + after not in _PAIRS:
            return end
    return 0
