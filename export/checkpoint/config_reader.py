"""The reader of a config.json: every key is read, known not to affect the computation, or refused."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from trt_runtime.errors import DllmError, shown

# keys of nearly every Hugging Face config that do not affect the computation, or are read elsewhere
_NEUTRAL = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "model_type",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "mask_token_id",
    "tokenizer_class",
}
# keys that never affect the computation, in any family (regular expressions of whole keys): ignored, with a
# note
_COMPUTES_NOTHING = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # which kernel computes attention or experts
        r"_*(attn|attention|experts)_implementation(_internal|_autoset)?",
        r"_?(use_)?(flash|flex)_?(attn|attention)(_?[234]|_varlen|_version|_2_enabled)?",
        r"(use_)?(sdpa|sdpa_attention|xformers|memory_efficient_attention|liger(_kernel)?|torch_compile|"
        r"compile|fused_\w+|kernels)",
        r"fuse_\w+",
        # comments
        r"[_$]*comments?([^a-z].*)?",
        r"_+(note|description|info|todo|doc|readme)s?([^a-z].*)?",
        r"notes?|description|readme",
        r"(//|#).*",
        r"\$schema",
        # training
        r"\w*dropout(_p|_prob|_rate)?",
        r"\w*_pdrop",
        r"layer_?drop",
        r"\w*(gradient|activation)_checkpointing\w*",
        r"initializer_\w+",
        r"init_(std|fn|device|method|cutoff_factor)",
        r"(id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params)",
        r"(loss_type|label_smoothing|learning_rate|weight_decay|max_grad_norm|warmup_\w+|"
        r"skip_checkpoint|unsloth_\w+)",
        # what a forward returns in addition, and how transformers runs it
        r"(return_dict|output_attentions|output_hidden_states|torchscript|chunk_size_feed_forward|"
        r"keys_to_ignore_at_inference)",
        r"(use_bfloat16|tf_legacy_loss|pretraining_tp|gguf_file|_commit_hash|_from_model_config|"
        r"model_max_length|precision)",
        # generation settings, which transformers up to 4.50 writes into config.json
        r"(max_length|min_length|max_new_tokens|min_new_tokens|do_sample|early_stopping|num_beams|"
        r"num_beam_groups|num_return_sequences)",
        r"(temperature|top_k|top_p|typical_p|min_p|alg|alg_temp|steps|output_history|diversity_penalty|"
        r"repetition_penalty)",
        r"(length_penalty|exponential_decay_length_penalty|no_repeat_ngram_size|"
        r"encoder_no_repeat_ngram_size|bad_words_ids|output_scores)",
        r"(return_dict_in_generate|remove_invalid_values|suppress_tokens|begin_suppress_tokens|"
        r"forced_(bos|eos)_token_id|prefix)",
        r"(sep|cls|unk|decoder_start|additional_special)_tokens?_id",
        r"generation_config",
    )
)
# keys that may name another attention than softmax, unless their value is a kernel for softmax attention
_KERNEL_KEY = re.compile(r"_*(attn|attention)_(impl|backend|kernel|type)", re.IGNORECASE)
_KERNEL = re.compile(
    r"auto|default|math|eager|torch|sdpa|triton|cudnn|xformers|flashinfer|te|fa[234]?|(flash|flex|"
    r"mem_efficient)([_-]?(attn|attention))?([_-]?[234])?"
)
# keys that say what the network computes
_PART_OF_NETWORK = re.compile(
    r"layer_types|expert|router|qk_?(layer)?_?norm|sliding|window|rope|rotary|alibi|softcap|"
    r"(^|_)(bias|scaling|scale|multiplier)($|_)",
    re.IGNORECASE,
)
_PLAIN_ROPE: tuple[Any, ...] = (
    {},
    {"rope_type": "default"},
    {"type": "default"},
    {"type": "default", "rope_type": "default"},
)
# keys that do not affect the computation at these values; any other value stops the export
_COMPUTES_NOTHING_AT: dict[str, tuple[Any, ...]] = {
    "is_causal": (False,),
    "causal": (False,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "rope_scaling": _PLAIN_ROPE,
    "use_sliding_window": (False,),
    "sliding_window": (),
    "partial_rotary_factor": (1.0,),
}


class ConfigReader:
    """Reads config.json key by key; `finish` refuses keys that nothing has read, so that no key is silently
    dropped."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where
        self._seen: set[str] = set(_NEUTRAL)

    def get(self, key: str, kind: type[Any], default: Any = None) -> Any:
        """The value of `key`, which must be of type `kind` (an int is accepted for a float); `default` if it
        is absent or null."""
        self._seen.add(key)
        value: Any = self.config.get(key)
        if value is None:
            if default is None:
                raise DllmError(
                    f"{self.where}: {key} is missing: this model needs it; take the config.json of the "
                    f"checkpoint."
                )
            return default
        if not isinstance(value, (int, float) if kind is float else (kind,)) or (
            kind is not bool and isinstance(value, bool)
        ):
            raise DllmError(f"{self.where}: {key} is {value!r}, expected {kind.__name__}.")
        if kind is float and not 0 < value < 1e30:
            raise DllmError(f"{self.where}: {key} is {value!r}, expected a number above 0.")
        return float(value) if kind is float else value

    def positive(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` (and below 2^31, the longest possible tensor axis)."""
        value: int = self.get(key, int, default)
        if not least <= value < 2**31:
            raise DllmError(f"{self.where}: {key} is {value}, expected a whole number from {least}.")
        return value

    def rope_theta(self) -> float:
        """The base of plain RoPE under either of its names: rope_theta, or rope_parameters of newer
        transformers."""
        parameters = self.get("rope_parameters", dict, {})
        inner = ConfigReader(parameters, f"{self.where}: rope_parameters") if parameters else self
        theta: float = inner.get("rope_theta", float)
        if parameters:
            self._seen.add("rope_theta")
            if strange := sorted(set(parameters) - {"rope_type", "rope_theta"}):
                raise DllmError(
                    f"{inner.where}: {strange[0]} is not implemented: supported are rope_type 'default' and "
                    f"rope_theta."
                )
            inner.require("rope_type", "default")
            if self.config.get("rope_theta") not in (None, theta):
                raise DllmError(
                    f"{self.where}: rope_theta is {self.config['rope_theta']!r}, rope_parameters say "
                    f"{theta:g}."
                )
        if theta < 1:
            raise DllmError(f"{self.where}: rope_theta is {theta:g}, expected 1 or more.")
        return theta

    def require(self, key: str, *supported: Any, absent: Any = None) -> None:
        """Refuse a value that is not implemented. A null key passes, and an absent one, unless its official
        class then takes a value that is not: `absent`."""
        self._seen.add(key)
        value = self.config.get(key, absent)
        if value is not None and value not in supported:
            known = " or ".join(repr(item) for item in supported) or "null"
            is_or_would_be = (
                "is" if key in self.config else "is missing, for which the model's own code takes"
            )
            raise DllmError(
                f"{self.where}: {key} {is_or_would_be} {shown(value)}, which is not implemented: supported is"
                f" {known}."
            )

    def ignore(self, *keys: str) -> None:
        """Keys that do not change what the exported model computes."""
        self._seen.update(keys)

    def supply(self, values: Mapping[str, Any]) -> None:
        """Set values from elsewhere, replacing what the config has under their keys."""
        self.config = {**self.config, **values}

    def token_ids(self, key: str, other: Mapping[str, Any]) -> tuple[int, ...]:
        """One or several token ids under `key`; a value in `other` (generation_config.json) takes precedence
        over the config's."""
        value = self.config.get(key) if other.get(key) is None else other[key]
        ids = value if isinstance(value, list) else [value]
        if not ids or any(
            not isinstance(token, int) or isinstance(token, bool) or token < 0 for token in ids
        ):
            raise DllmError(f"{self.where}: {key} is {value!r}, expected a token id or a list of them.")
        return tuple(dict.fromkeys(ids))

    def token_id(self, key: str, other: Mapping[str, Any]) -> int:
        """The one token id under `key`."""
        ids = self.token_ids(key, other)
        if len(ids) != 1:
            raise DllmError(f"{self.where}: {key} is {list(ids)}, expected one token id.")
        return ids[0]

    def finish(self, ignored: Collection[str]) -> list[str]:
        """The keys that were ignored because they never affect the computation. Raises DllmError for a key
        that was neither read nor ignored, unless its value is null."""
        for key, harmless in _COMPUTES_NOTHING_AT.items():
            if key not in self._seen:
                self.require(key, *harmless)
        if isinstance(kinds := self.config.get("layer_types"), list) and set(map(str, kinds)) <= {
            "full_attention"
        }:
            self._seen.add("layer_types")
        unread = [
            key
            for key, value in self.config.items()
            if key not in self._seen | set(ignored) and value is not None
        ]
        noted = [key for key in unread if _computes_nothing(key, self.config[key])]
        unknown = [key for key in unread if key not in noted]
        if strange := sorted(set(ignored) - set(self.config)):
            raise DllmError(f"{self.where}: has no key {strange[0]}: remove --ignore-key {strange[0]}.")
        if unknown:
            raise DllmError(
                f"{self.where}: {', '.join(f'{key} = {shown(self.config[key])}' for key in unknown)}: not "
                f"known to this family. {_advice(unknown)}"
            )
        return noted


def _advice(unknown: Collection[str]) -> str:
    """What to do about keys that are not known."""
    if parts := [key for key in unknown if _PART_OF_NETWORK.search(key)]:
        return (
            f"{parts[0]} names a part of the network, which is not implemented: this checkpoint cannot be "
            "exported."
        )
    keys = " ".join(f"--ignore-key {shlex.quote(key)}" for key in unknown)
    return f"If this does not change what the model computes, export with {keys}."


def _computes_nothing(key: str, value: Any) -> bool:
    is_kernel = _KERNEL_KEY.fullmatch(key) and isinstance(value, str) and _KERNEL.fullmatch(value.lower())
    return bool(is_kernel) or any(pattern.fullmatch(key) for pattern in _COMPUTES_NOTHING)


def decoding_defaults(generation_config: Mapping[str, Any]) -> dict[str, int]:
    """gen_length and block_length, if generation_config.json has them."""
    defaults = {
        key: generation_config[key]
        for key in ("gen_length", "block_length")
        if generation_config.get(key) is not None
    }
    for key, value in defaults.items():
        if type(value) is not int or value < 1:
            raise DllmError(f"generation_config.json: {key} is {value!r}, expected a whole number from 1.")
    return defaults
