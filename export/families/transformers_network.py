"""transformers' own decoder as the reference of a family: none of the network's code is ours. Imports torch.
Shape letters: B rows of the call, S rows of the window, D head_dim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from trt_runtime.errors import DllmError
from trt_runtime.system import commands

from ..graph.decoder import EMBEDDING, HEAD, DecoderConfig
from .base import hf_name


class TransformersNetwork:
    """A Reference (base.py) on `architecture`ForCausalLM of transformers, with full attention."""

    def __init__(self, architecture: str, decoder: DecoderConfig, config: Mapping[str, Any]) -> None:
        attention = decoder.attention
        self.architecture, self.decoder = architecture, decoder
        rope = {"rope_type": "default", "rope_theta": attention.rope_theta}
        if attention.rotary_dim is not None:  # always said: some architectures have another default than 1
            rope["partial_rotary_factor"] = attention.rotary_dim / attention.head_dim
        sizes = {
            "vocab_size": decoder.vocab_size,
            "hidden_size": decoder.hidden_size,
            "intermediate_size": decoder.feed_forward.intermediate_size,
            "num_hidden_layers": decoder.num_layers,
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_kv_heads,
            "head_dim": attention.head_dim,
            "max_position_embeddings": decoder.max_length,
            "rms_norm_eps": decoder.norm_eps,
            "tie_word_embeddings": decoder.tied_head,
            "hidden_act": "silu",
            "attn_implementation": "sdpa",
            "rope_parameters": rope,
        }
        self._config = getattr(transformers, f"{architecture}Config")(**{**sizes, **config})
        with torch.device("meta"):
            self.module: Any = getattr(transformers, f"{architecture}ForCausalLM")(self._config)
        self.layers: Any = self.module.model.layers

    def weight_name(self, weight: str) -> str:
        """The parameter of the module that holds a weight of decoder.weight_shapes."""
        return hf_name(weight)

    def load(self, state: Mapping[str, Any], dtype: Any, joined: Mapping[str, Any] | None = None) -> None:
        """Load tensors by name and shape. joined: more of them, by the module's own names. Raises
        DllmError."""
        named = {self.weight_name(weight): tensor.to(dtype) for weight, tensor in state.items()}
        named |= joined or {}
        if self.decoder.tied_head:
            named[self.weight_name(HEAD)] = named[self.weight_name(EMBEDDING)]
        try:
            self.module.load_state_dict(named, strict=True, assign=True)
        except RuntimeError as error:
            raise DllmError(
                f"the weights do not match the reference, transformers' {self.architecture}ForCausalLM "
                f"({' '.join(str(error).split())[:300]}): correct the family's reference() or the names of "
                f"its tensors."
            ) from error
        rotary = self.module.model.rotary_emb = type(self.module.model.rotary_emb)(
            self._config
        )  # its buffers are empty after creation on the meta device
        attention, rotated = self.decoder.attention, self.decoder.rotary_dim
        expected = attention.rope_theta ** -(torch.arange(0, rotated, 2) / rotated)
        if not torch.allclose(rotary.inv_freq.cpu(), expected, rtol=1e-4):
            raise DllmError(
                f"transformers {transformers.__version__} ignores rope_theta {attention.rope_theta:g} "
                f"of the configuration: install "
                f"transformers 5.8 or newer ({commands.package('-U', 'transformers')})."
            )
        self.module.eval()

    def hidden_states(self, input_ids: Any, position_ids: Any, mask: Any, cache: Any) -> Any:
        return self.module.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state

    def logits(self, hidden: Any) -> Any:
        return self.module.lm_head(hidden).float()
