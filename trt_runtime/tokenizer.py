"""The artifact's tokenizer: tokenizer.json, and the chat template rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trt_runtime.errors import DllmError


class Tokenizer:
    """Text <-> token ids. `path` is the artifact's tokenizer directory."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the package raises plain Exception
            raise DllmError(f"{path / 'tokenizer.json'}: not readable ({error}): export the artifact again.") from error
        config_file = path / "tokenizer_config.json"
        self._config = _read_object(config_file) if config_file.is_file() else {}
        template_file = path / "chat_template.jinja"
        template = template_file.read_text("utf-8") if template_file.is_file() else self._config.get("chat_template")
        self._template: str | None = template if isinstance(template, str) else None

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands; special tokens in it count as such, none are added."""
        return list(self._encoding(text).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def unknown_words(self, text: str) -> list[str]:
        """The pieces of a text that the vocabulary has no token for."""
        unknown = self._token("unk_token")
        if unknown is None:
            return []
        encoding = self._encoding(text)
        return [text[begin:end] for token, (begin, end) in zip(encoding.tokens, encoding.offsets, strict=True)
                if token == unknown and text[begin:end] != unknown]  # fmt: skip

    def render_chat(self, messages: Iterable[Mapping[str, str]]) -> str:
        """The prompt text of a conversation of {'role', 'content'} messages, by the model's own template."""
        if self._template is None:
            raise DllmError("this model has no chat template: use 'generate --raw', which takes the prompt as it stands.")
        import jinja2
        import jinja2.sandbox

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        special = {name: self._token(name) or "" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            template = environment.from_string(self._template)
            return template.render(messages=list(messages), add_generation_prompt=True, **special)
        except Exception as error:  # a template can raise anything
            raise DllmError(f"the chat template failed ({error}): check the roles of the messages.") from error

    def _encoding(self, text: str) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError as error:  # lone surrogates: bytes that are not UTF-8
            raise DllmError(f"the prompt {text!r} is not valid Unicode: give it in UTF-8.") from error

    def _token(self, name: str) -> str | None:
        token = self._config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DllmError(f"{path}: not readable as JSON ({error}): export the artifact again.") from error
    if not isinstance(read, dict):
        raise DllmError(f"{path}: holds a {type(read).__name__}, expected an object: export the artifact again.")
    return read


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
