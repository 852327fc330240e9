"""Fields of OpenAI's requests that this server does not support: accepted with the value that changes nothing
or null, refused by name with any other value. Labels and hints that never change an answer (`user`,
`metadata`, `prompt_cache_key`, ...) are accepted at any value of their type.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """A model whose fields are named, typed and finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Drop fields that are null: clients send every field they know."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name in cls.model_fields}


def _whole(value: object) -> object:
    """64.0 is another way to write 64 in JSON; 64.5 stays as it is and is refused."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Zero = Annotated[float, Field(ge=0, le=0)]
NoItems = Annotated[list[Any], Field(max_length=0)]
Label = Annotated[str, Field(max_length=1 << 16)]


class ResponseFormat(Strict):
    """Only the type text: the answer cannot be forced to be JSON."""

    type: Literal["text"]


class Neutral(Strict):
    """Fields of both kinds of completion."""

    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: dict[str, Zero] | None = None
    logprobs: Literal[False] | Annotated[Whole, Field(ge=0, le=0)] | None = None
    user: Label | None = None


class NeutralChat(Neutral):
    """Fields of /v1/chat/completions."""

    audio: None = None
    function_call: Literal["none", "auto"] | None = None
    functions: NoItems | None = None
    metadata: dict[str, Label] | None = None
    modalities: list[Literal["text"]] | None = None
    moderation: None = None
    parallel_tool_calls: bool | None = None
    prediction: None = None
    prompt_cache_key: Label | None = None
    prompt_cache_options: dict[str, Label] | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    reasoning_effort: Literal["none"] | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: Label | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: NoItems | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=0)] | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None


class NeutralCompletion(Neutral):
    """Fields of /v1/completions."""

    echo: Literal[False] | None = None
    best_of: Annotated[Whole, Field(ge=1, le=1)] | None = None


NAMES = frozenset({*NeutralChat.model_fields, *NeutralCompletion.model_fields})
