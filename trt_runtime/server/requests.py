"""What a request may say. A field that is not honoured is refused by its name, never ignored.

Fields of OpenAI's API that change nothing at their neutral value are taken at that value alone.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trt_runtime.config import GenerationConfig, configured
from trt_runtime.errors import DllmError
from trt_runtime.manifest import Manifest

MOST_CHOICES, MOST_STOPS, LONGEST_STOP = 16, 4, 256


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Mask(_Model):
    """A gap of a template: `mask` tokens to fill."""

    mask: int = Field(ge=1, le=4096)


class StreamOptions(_Model):
    """include_usage: a last chunk with the counts. provisional: what is unmasked in the running block, as chunks without choices."""

    include_usage: bool = False
    provisional: bool = False


class Message(_Model):
    role: Literal["system", "user", "assistant"]
    content: str


class Common(_Model):
    """What both kinds of completion take."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1, description="tokens to generate (default: the model's gen_length)")
    temperature: float | None = Field(default=None, description="0 (default) takes the best token")
    top_p: float | None = None
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(default=None, ge=0)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # of diffusion models
    threshold: float | None = Field(default=None, description="of the policy 'threshold'")
    policy: str | None = None
    factor: float | None = Field(default=None, description="of the policy 'factor'")
    gamma: float | None = Field(default=None, description="of the policy 'eb'")
    alpha: float | None = Field(default=None, description="of the policy 'dynamic'")
    low_threshold: float | None = Field(default=None, description="of 'localleap', 'hierarchy' and 'slowfast'")
    refresh_every: int | None = Field(default=None, ge=0, description="blocks from one rebuilt cache to the next")
    refresh_window: int | None = Field(
        default=None, ge=0, description="positions around a block that begins without a rebuilt cache"
    )
    suffix: int | None = Field(default=None, ge=0, description="masks behind the block that a forward sees")
    suffix_decay: bool | None = Field(default=None, description="take those of suffix at growing distances")
    hold_back_eos: bool | None = Field(
        default=None, description="commit an end token only when nothing else is left in the block"
    )
    steps: int | None = Field(default=None, ge=1, description="forwards in all, of a schedule")
    block_length: int | None = Field(default=None, ge=1)
    cache: str | None = Field(default=None, description="none, prefix or dual")
    top_k: int | None = None
    # taken at their neutral values alone
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)
    logprobs: Literal[False] | None = None

    def stops(self) -> list[str]:
        """The stop strings. Raises DllmError."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(found) > MOST_STOPS or not all(found):
            raise DllmError(f"stop has {len(found)} strings, expected up to {MOST_STOPS}, none of them empty.")
        if max(map(len, found), default=0) > LONGEST_STOP:
            raise DllmError(f"stop has a string of {max(map(len, found))} characters, expected up to {LONGEST_STOP}.")
        return found

    def length(self) -> int | None:
        return self.max_tokens

    def config(self, manifest: Manifest, *, infill: bool = False) -> GenerationConfig:
        """The options of a generation, not yet checked against the model. Raises DllmError."""
        if self.n > 1 and not self.temperature:
            raise DllmError(
                f"n is {self.n} with temperature 0: all choices would be the same: give a temperature above 0, or n 1."
            )
        if self.stream_options is not None and not self.stream:
            raise DllmError("stream_options goes with stream: true.")
        own = {item.name for item in fields(GenerationConfig)} - {"infill", "stop_at_eos", "gen_length", "alg_temp", "speculate"}
        given: dict[str, Any] = {name: value for name in own if (value := getattr(self, name)) is not None}
        if (length := self.length()) is not None:
            given["gen_length"] = length
        return configured(given | ({"infill": True, "gen_length": self.length() or 0} if infill else {}), manifest)


class ChatRequest(Common):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, description="the newer name of max_tokens")

    def length(self) -> int | None:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise DllmError("max_tokens and max_completion_tokens are one option: give one of them.")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Common):
    """A prompt as text or token ids, or a template of fixed text and gaps, which are filled."""

    prompt: str | list[int] | None = None
    template: list[str | Mask] | None = Field(default=None, min_length=1, max_length=1024)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
