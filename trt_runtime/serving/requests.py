"""The fields of a request. A field that is not supported is refused by name, never ignored (neutral.py has
those of OpenAI's API)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, create_model

from trt_runtime.artifact.manifest import Manifest
from trt_runtime.decoding.config import GenerationConfig, configured, effective_temperature, option_names
from trt_runtime.decoding.plans import PLANS
from trt_runtime.decoding.policies import registry
from trt_runtime.decoding.policies.registry import POLICIES
from trt_runtime.errors import DllmError
from trt_runtime.serving.messages import Message
from trt_runtime.serving.neutral import Neutral, NeutralChat, NeutralCompletion, Strict, Whole

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, LONGEST_STOP = 16, 256, 64, 256
LARGEST_SEED = 2**63 - 1
_OTHERWISE = {"suffix": "suffix_masks"}  # options whose name means something else in OpenAI's API
_CLOSED = {
    "infill",
    "stop_at_eos",
    "gen_length",
    "alg_temp",
    "speculate",
}  # not for clients, or given by other fields
OPTIONS = {name: _OTHERWISE.get(name, name) for name in option_names() if name not in _CLOSED}


def _plain_prompt(given: Any) -> Any:
    """A prompt, or a list of prompts of one kind; token ids may be written as 5.0. One error, however long
    the list is."""
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, list) and len(given) > MOST_PROMPTS and isinstance(given[0], (str, list)):
        raise ValueError(f"has {len(given)} prompts, expected up to {MOST_PROMPTS}")
    if isinstance(given, list) and given and all(isinstance(item, str) for item in given):
        return given
    if isinstance(given, list) and given and all(isinstance(item, list) for item in given):
        return [_ids(item) for item in given]
    return _ids(given)


def _ids(given: Any) -> list[int]:
    if not isinstance(given, list) or not all(
        type(item) is int or (isinstance(item, float) and item.is_integer()) for item in given
    ):
        raise ValueError("expected a text, a list of token ids, or a list of texts or of such lists")
    return [int(item) for item in given]


Name = Annotated[str, Field(max_length=64)]


class Mask(Strict):
    """A gap of a template: `mask` tokens to fill."""

    mask: Whole = Field(ge=1, le=4096)


class StreamOptions(Strict):
    """include_usage: a last chunk with the counts; provisional: what is unmasked in the current block, as
    chunks without choices."""

    include_usage: bool | None = None
    provisional: bool | None = None
    include_obfuscation: Annotated[bool, Field(le=False)] | None = Field(
        default=None, description="false alone"
    )


class Common(Neutral):
    """The fields of both kinds of completion."""

    model: str | None = Field(default=None, description="the name of the server's only model")
    max_tokens: Whole | None = Field(
        default=None, ge=1, description="tokens to generate (default: the model's gen_length)"
    )
    temperature: Annotated[float, AfterValidator(effective_temperature)] | None = Field(
        default=None, description="0 (default), or less than 0.001, takes the best token"
    )
    top_p: float | None = None
    n: Annotated[Whole, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Whole | None = Field(
        default=None, ge=0, le=LARGEST_SEED, description="default: a new one for each request"
    )
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # options of diffusion models; those of policies are added below
    policy: Name | None = None
    refresh_every: Whole | None = Field(
        default=None, ge=0, description="blocks from one rebuilt cache to the next"
    )
    refresh_window: Whole | None = Field(
        default=None, ge=0, description="positions around a block that begins without a rebuilt cache"
    )
    suffix_masks: Whole | None = Field(
        default=None, ge=0, description="masks after the block that a forward sees"
    )
    suffix_decay: bool | None = Field(
        default=None, description="space the masks of suffix_masks at growing distances"
    )
    hold_back_eos: bool | None = Field(
        default=None, description="commit end tokens only when nothing else is left in the block"
    )
    steps: Whole | None = Field(
        default=None, ge=1, description="forwards in total, for policies that follow a schedule"
    )
    block_length: Whole | None = Field(default=None, ge=1)
    cache: Name | None = Field(
        default=None,
        description="none, prefix or dual; with block-causal attention none, block or block_dual",
    )
    small_block: Whole | None = Field(
        default=None, ge=1, description="block-causal attention: positions decoded before the next ones"
    )
    fuse_stores: bool | None = Field(
        default=None,
        description="block-causal attention: store a block by the first step of the next (default: if "
        "possible)",
    )
    edit_threshold: float | None = Field(
        default=None, ge=0, le=1, description="replace committed tokens of the running block above this"
    )
    edit_steps: Whole | None = Field(
        default=None, ge=0, description="forwards of a block that only look for edits, at most"
    )
    top_k: Whole | None = Field(default=None, ge=-1, description="-1 and 0 keep every token")

    @property
    def choices(self) -> int:
        """Choices per prompt."""
        return self.n or 1

    @property
    def is_stream(self) -> bool:
        return bool(self.stream)

    def stops(self) -> list[str]:
        """The stop strings. Raises DllmError."""
        strings = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(strings) > MOST_STOPS or not all(strings):
            raise DllmError(
                f"stop has {len(strings)} strings, expected up to {MOST_STOPS}, none of them empty."
            )
        if max(map(len, strings), default=0) > LONGEST_STOP:
            raise DllmError(
                f"stop has a string of {max(map(len, strings))} characters, expected up to {LONGEST_STOP}."
            )
        return strings

    def length(self) -> int | None:
        """Tokens to generate, if the request says so."""
        return self.max_tokens

    def config(self, manifest: Manifest) -> GenerationConfig:
        """The decoding options, except for the length and the gaps; not yet checked against the model. Raises
        DllmError."""
        if self.stream_options is not None and not self.stream:
            raise DllmError("stream_options needs stream: true.")
        given = {
            name: value
            for name, field in OPTIONS.items()
            if (value := getattr(self, field, None)) is not None
        }
        if self.top_k in (-1, 0):
            del given["top_k"]
        if self.policy is not None:
            POLICIES.installed(self.policy)  # a client may not name a module to import
        if self.cache is not None:
            PLANS.installed(self.cache)
        config = configured(given, manifest)
        if self.choices > 1 and not config.draws:
            raise DllmError(
                f"n is {self.n} with temperature 0, so all choices would be the same: set a temperature "
                f"above 0, or n to 1."
            )
        return config


class _ChatRequest(Common, NeutralChat):
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: Whole | None = Field(
        default=None, ge=1, description="the newer name of max_tokens"
    )

    def length(self) -> int | None:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise DllmError(
                "max_tokens and max_completion_tokens are the same option: give only one of them."
            )
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
Ids = Annotated[list[list[int]], Field(min_length=1, max_length=MOST_PROMPTS)]


class _CompletionRequest(Common, NeutralCompletion):
    """A prompt as text or token ids, or several of them; or a template of fixed text and gaps to fill.
    suffix: text after a gap of max_tokens tokens, which is filled and is the answer."""

    prompt: Annotated[str | list[int] | Texts | Ids | None, BeforeValidator(_plain_prompt)] = None
    suffix: str | None = None
    template: Annotated[list[str | Mask], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None

    def prompts(self) -> list[Any]:
        """The prompts, in the order of their choices."""
        if isinstance(self.prompt, list) and (not self.prompt or isinstance(self.prompt[0], (str, list))):
            return list(self.prompt)
        return [self.prompt]


Request = TypeVar("Request", bound=Common)


def _with_policies(base: type[Request], name: str) -> type[Request]:
    """A kind of request with a field for each option of each registered policy."""
    added: dict[str, Any] = {}
    for option in registry.options().values():
        if option.name not in _CLOSED:
            kind = Whole if option.kind is int else option.kind
            said = f"{option.help}; of {', '.join(registry.takers(option.name))}"
            added[option.name] = (kind | None, Field(default=None, description=said))
    return create_model(name, __base__=base, __doc__=base.__doc__, **added)


if TYPE_CHECKING:
    ChatRequest: TypeAlias = _ChatRequest
    CompletionRequest: TypeAlias = _CompletionRequest
else:
    ChatRequest = _with_policies(_ChatRequest, "ChatRequest")
    CompletionRequest = _with_policies(_CompletionRequest, "CompletionRequest")
