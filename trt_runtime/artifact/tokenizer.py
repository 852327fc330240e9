"""The artifact's tokenizer: tokenizer.json, and the chat template rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trt_runtime.artifact import chat_template
from trt_runtime.artifact.detokenize import Detokenizer
from trt_runtime.errors import DllmError

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text <-> token ids. path: the artifact's tokenizer directory."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            self._tokenizer.no_truncation()  # training settings, which some files contain
            self._tokenizer.no_padding()
        except Exception as error:  # the package raises plain Exception
            raise DllmError(
                f"{path / 'tokenizer.json'}: not readable ({error}): export the artifact again."
            ) from error
        config, older = (
            _read_object(path / name) for name in ("tokenizer_config.json", "special_tokens_map.json")
        )
        texts = {name: _text(config.get(name)) or _text(older.get(name)) for name in SPECIAL}
        self._special: dict[str, str] = {name: text for name, text in texts.items() if text}
        self._template = _template(path, config)
        self._detokenizer = Detokenizer(self._tokenizer, config)
        self.adds_bos = self._adds_bos(config)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def max_id(self) -> int:
        """The largest token id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)

    def special_id(self, name: str) -> int | None:
        """The id of a special token by its name ('mask_token'); None if it does not exist."""
        text = self._special.get(name)
        return self.id_of(text) if text else None

    def id_of(self, token: str) -> int | None:
        """The id of a token by its text; None if it does not exist."""
        try:
            token_id: int | None = self._tokenizer.token_to_id(token)
        except UnicodeEncodeError:  # lone surrogates: bytes that are not UTF-8
            return None
        return token_id

    @property
    def added_tokens(self) -> dict[int, str]:
        """Tokens in addition to the vocabulary, special ones and others, by their ids."""
        return {token: added.content for token, added in self._tokenizer.get_added_tokens_decoder().items()}

    def _adds_bos(self, config: Mapping[str, Any]) -> bool:
        """Whether plain texts begin with the BOS token: if tokenizer_config.json says so (add_bos_token), or
        tokenizer.json puts it there.

        For slow tokenizers, transformers goes by tokenizer_config.json alone; the tokenizer.json that the
        export makes from their files adds no BOS token.
        """
        bos = self.special_id("bos_token")
        if bos is None:
            return False
        return config.get("add_bos_token") is True or self._tokenizer.encode(
            "a", add_special_tokens=True
        ).ids[:1] == [bos]

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Token ids of an unchanged text; special tokens in it count as such, none are added.

        add_bos: put the BOS token in front, unless the text begins with it. Models whose tokenizer `adds_bos`
        expect it before plain texts, but not before the output of a chat template. Raises DllmError for a
        tokenizer without a BOS token.
        """
        ids = list(self._encoding(text).ids)
        if not add_bos:
            return ids
        bos = self.special_id("bos_token")
        if bos is None:
            raise DllmError("this tokenizer has no BOS token (bos_token): leave add_bos out.")
        return ids if ids[:1] == [bos] else [bos, *ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, without special tokens."""
        return self._detokenizer.decode(ids)

    def settled(self, ids: Iterable[int]) -> str:
        """The part of the text of token ids that no later token can change: a prefix of decode() of any
        longer sequence."""
        return self._detokenizer.settled(ids)

    def spelled(self, ids: Iterable[int]) -> str:
        """Text of token ids, with special tokens as they are written."""
        return self._detokenizer.spelled(ids)

    @property
    def special_texts(self) -> frozenset[str]:
        """The special tokens, as they are written."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special and token.content)

    def surely_exceeds(self, text: str, most: int) -> bool:
        """Whether a text certainly has more than `most` tokens, judged by its beginning; False if unknown.
        Tokens near the end of that beginning are not counted, because they may differ in the whole text."""
        begin = text[: 8 * most + 4096]
        if len(begin) == len(text):
            return False
        return sum(end <= len(begin) - 256 for _, end in self._encoding(begin).offsets) > most

    def piece(self, token: int) -> str:
        """The text of one token; special tokens as they are written."""
        return self._detokenizer.piece(token)

    def unknown_words(self, text: str) -> list[str]:
        """The pieces of a text that the vocabulary has no token for."""
        unknown = self._special.get("unk_token")
        if unknown is None:
            return []
        encoding = self._encoding(text)
        return [
            text[begin:end]
            for token, (begin, end) in zip(encoding.tokens, encoding.offsets, strict=True)
            if token == unknown and text[begin:end] != unknown
        ]

    def render_chat(
        self,
        messages: Iterable[Mapping[str, str]],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt text of a conversation of {'role', 'content'} messages, by the model's own template. It
        ends where the model's answer begins (add_generation_prompt, the default), or with
        continue_final_message right after the text of the last message, which the model continues."""
        if self._template is None:
            raise DllmError(
                "this model has no chat template: use 'generate --raw', which uses the prompt unchanged."
            )
        opens = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        return chat_template.render(
            self._template,
            list(messages),
            self._special,
            add_generation_prompt=opens,
            continue_final_message=continue_final_message,
        )

    def end_of_turn(self) -> int | None:
        """The special token that the chat template writes after an answer; None if it writes none."""
        if self._template is None:
            return None
        question, answer = (
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "the-answer"},
        )
        try:
            text = self.render_chat([question, answer], add_generation_prompt=False)
        except DllmError:
            return None
        if text.count(answer["content"]) != 1:
            return None
        before, _, after = text.partition(answer["content"])
        added = self._tokenizer.get_added_tokens_decoder()
        opening = [token for token in self.encode(before) if token in added and added[token].special][-1:]
        closing = [token for token in self.encode(after)[:1] if token in added and added[token].special]
        return (
            closing[0] if closing and closing != opening else None
        )  # a token that starts a turn does not end one

    def _encoding(self, text: str) -> Any:
        try:
            # not encode, which holds the interpreter's lock
            return self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        except TypeError as error:  # lone surrogates: bytes that are not UTF-8
            raise DllmError(f"the prompt {text[:80]!r} is not valid Unicode: give it in UTF-8.") from error


def _template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: from a file of its own or from the configuration; if there are several, the one
    called 'default'."""
    file = path / "chat_template.jinja"
    try:
        template = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    except UnicodeDecodeError as error:
        raise DllmError(f"{file}: is not UTF-8 ({error}): export the artifact again.") from error
    if isinstance(template, list):
        template = next(
            (i.get("template") for i in template if isinstance(i, dict) and i.get("name") == "default"), None
        )
    if template is not None and not isinstance(template, str):
        raise DllmError(
            f"{path / 'tokenizer_config.json'}: chat_template is {template!r}, expected a string: export the "
            f"artifact again."
        )
    return template


def _text(token: object) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DllmError(f"{path}: not readable as JSON ({error}): export the artifact again.") from error
    if not isinstance(read, dict):
        raise DllmError(
            f"{path}: contains a {type(read).__name__}, expected an object: export the artifact again."
        )
    return read
