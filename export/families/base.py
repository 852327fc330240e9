"""What a family's file provides, and the reader that accounts for every key of its config."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from export.decoder import DecoderConfig
from trt_runtime.errors import DllmError
from trt_runtime.manifest import DecodingFacts

# keys of any Hugging Face config that say nothing about the computation
_NEUTRAL = {
    "_name_or_path", "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "tokenizer_class",
}  # fmt: skip


class ConfigReader:
    """config.json, read key by key: `finish` refuses what nobody asked for, so no key is silently dropped."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where
        self._seen: set[str] = set(_NEUTRAL)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, which must be of `kind` (an int will do for a float); `default` where it is absent or null."""
        self._seen.add(key)
        value = self.config.get(key)
        if value is None:
            if default is None:
                raise DllmError(f"{self.where}: {key} is missing: this model needs it; take the config.json of the checkpoint.")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise DllmError(f"{self.where}: {key} is {value!r}, expected {kind.__name__}.")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        """A whole number from 1."""
        value: int = self.get(key, int, default)
        if value < 1:
            raise DllmError(f"{self.where}: {key} is {value}, expected a whole number from 1.")
        return value

    def require(self, key: str, *supported: Any) -> None:
        """Refuse a value that is not implemented. An absent or null key passes."""
        self._seen.add(key)
        value = self.config.get(key)
        if value is not None and value not in supported:
            shown = " or ".join(repr(item) for item in supported)
            raise DllmError(f"{self.where}: {key} is {value!r}, which is not implemented: supported is {shown}.")

    def ignore(self, *keys: str) -> None:
        """Keys that do not change what the exported model computes."""
        self._seen.update(keys)

    def token_ids(self, key: str, other: Mapping[str, Any]) -> tuple[int, ...]:
        """One or several token ids under `key`; a value in `other` (generation_config.json) comes before the config's."""
        value = other.get(key, self.config.get(key))
        ids = value if isinstance(value, list) else [value]
        if not ids or any(not isinstance(token, int) or isinstance(token, bool) or token < 0 for token in ids):
            raise DllmError(f"{self.where}: {key} is {value!r}, expected a token id or a list of them.")
        return tuple(ids)

    def finish(self, ignored: Collection[str]) -> None:
        """Raise for a key that was neither read nor ignored, unless its value is null or false."""
        unread = [k for k, v in self.config.items() if k not in self._seen and k not in ignored and v not in (None, False)]
        if unread:
            raise DllmError(
                f"{self.where}: {', '.join(f'{key} = {self.config[key]!r}' for key in unread)}: not known to this family. "
                f"If it does not change what the model computes, export with --ignore-key {unread[0]}."
            )


class Family(ABC):
    """An architecture: how its config is spelled, how its tensors are named, how it decodes."""

    title: str
    allowed_surplus: Iterable[str] = ()  # regular expressions: tensors that a checkpoint may hold and the decoder does not use

    @abstractmethod
    def decoder(self, config: ConfigReader) -> DecoderConfig:
        """The network. Raises DllmError for a value that is not implemented, naming key and value."""

    @abstractmethod
    def decoding(self, config: ConfigReader, generation_config: Mapping[str, Any]) -> DecodingFacts:
        """The decoding facts."""

    @abstractmethod
    def tensor_name(self, weight: str) -> str:
        """The checkpoint's name of a decoder weight (decoder.weight_shapes), e.g. 'layers.3.q_proj'."""

    @abstractmethod
    def tiny_config(self) -> dict[str, Any]:
        """A config.json of a tiny model of this family, for the parametrised tests."""

    @abstractmethod
    def reference(self, decoder: DecoderConfig) -> tuple[str, dict[str, Any]]:
        """The transformers class of the PyTorch reference ('Llama' or 'Qwen2') and its configuration."""


def split_layer(weight: str) -> tuple[int, str] | None:
    """(3, 'q_proj') of 'layers.3.q_proj'; None for a weight outside the layers."""
    head, _, rest = weight.partition(".")
    if head != "layers":
        return None
    layer, _, leaf = rest.partition(".")
    return int(layer), leaf
