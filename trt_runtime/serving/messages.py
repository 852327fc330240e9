"""Messages of a conversation as clients write them: text, text in parts, and the fields of an answer's own
message."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from trt_runtime.serving.neutral import Label, Strict

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_HINTS = {"cache_control", "prompt_cache_breakpoint"}  # field of a part: where a prompt cache may end


class Part(Strict):
    """A piece of a message's text; a refusal in an earlier answer counts as text."""

    type: str
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        if (
            isinstance(given, dict)
            and isinstance(kind := given.get("type"), str)
            and kind not in ("text", "refusal")
        ):
            raise ValueError(f"a part of type '{kind[:40]}': only text is supported: remove it")
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if key not in _HINTS and not _says_nothing(value)}

    @model_validator(mode="after")
    def _has_text(self) -> Part:
        value = self.text if self.type == "text" else self.refusal
        if value is None:
            raise ValueError(f"a part of type '{self.type}' has no field '{self.type}'")
        return self

    @property
    def said(self) -> str:
        return (self.text if self.type == "text" else self.refusal) or ""


class Message(Strict):
    """A turn with role system (or developer), user or assistant. Empty fields of OpenAI's message objects
    (null, [], {}) are accepted, because clients send an answer's message back."""

    model_config = ConfigDict(
        json_schema_extra={"additionalProperties": {"description": "only empty values: null, [] or {}"}}
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: Label | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name in ("tool_calls", "function_call"):
            if not _says_nothing(given.get(name)):
                raise ValueError(f"a message has {name}, but tools are not supported: remove it")
        return {
            key: value for key, value in given.items() if key in cls.model_fields or not _says_nothing(value)
        }

    @field_validator("role", mode="before")
    @classmethod
    def _known(cls, role: Any) -> Any:
        if role in ("tool", "function"):
            raise ValueError(
                f"a message has role '{role}', but tools are not supported: remove it, or use role 'user'"
            )
        return role

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.role != "assistant" and (self.content is None or self.content == []):
            raise ValueError(f"a message of role '{self.role}' has no content: give a text")
        return self

    @property
    def plain(self) -> dict[str, str]:
        """The message in the form that chat templates expect."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.said for part in content)
        return {"role": _ROLES[self.role], "content": text} | (
            {"name": self.name} if self.name is not None else {}
        )


def _says_nothing(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, list) and not value)
        or (isinstance(value, dict) and all(map(_says_nothing, value.values())))
    )
