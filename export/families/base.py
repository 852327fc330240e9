"""What the file of a family provides: how its config is spelled, how its tensors are named, how it
decodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from trt_runtime.artifact.manifest import DecodingFacts

from ..checkpoint.config_reader import ConfigReader, decoding_defaults
from ..graph import decoder
from ..graph.context import split_layer
from ..graph.decoder import DecoderConfig
from ..graph.experts import MixtureOfExperts
from ..graph.feed_forward import EXPERTS_BESIDE, EXPERTS_STACKED

__all__ = [
    "BlockRule",
    "ConfigReader",
    "Family",
    "Piece",
    "Reference",
    "StoredAs",
    "decoding_defaults",
    "hf_name",
    "transformers_reference",
]

_HF_LAYER = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "router": "mlp.gate",
}
_HF_OUTSIDE = {
    decoder.EMBEDDING: "model.embed_tokens",
    decoder.FINAL_NORM: "model.norm",
    decoder.HEAD: "lm_head",
}


def hf_name(weight: str) -> str:
    """The name of a decoder weight in transformers' Llama, Qwen2 and Qwen3: 'layers.3.q_proj.bias' ->
    'model.layers.3.self_attn.q_proj.bias'."""
    where = split_layer(weight)
    if where is None:
        return _HF_OUTSIDE[weight] + ".weight"
    leaf, _, kind = where[1].partition(".")
    return f"model.layers.{where[0]}.{_HF_LAYER[leaf]}.{kind or 'weight'}"


@dataclass(frozen=True)
class BlockRule:
    """How a family's block-causal checkpoints decode; the fields are those of DecodingFacts. length_key: the
    key of config.json that holds the block length. default_length: of checkpoints without it; None: the user
    must say, and `advice` says where to look."""

    origin: str
    length_key: str | None = None
    default_length: int | None = None
    small_block: int | None = None
    next_from_store: bool = False
    advice: str = "Its documentation says it."


@dataclass(frozen=True)
class Piece:
    """A checkpoint tensor, or only its rows [start, stop). The pieces of a weight are concatenated along its
    first axis."""

    tensor: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class StoredAs:
    """How a checkpoint stores a weight: its pieces, and how they are joined (feed_forward.JOINS): one below
    the other, side by side, or row by row in turn, pair by pair."""

    pieces: tuple[Piece, ...]
    join: str = EXPERTS_STACKED

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shape of each piece, all alike, of a weight of `shape`."""
        if len(self.pieces) == 1:
            return [shape]
        if len(shape) == 3:  # of experts: one or several pieces each
            each = len(self.pieces) // shape[0]
            return [(shape[1] // each, shape[2])] * len(self.pieces)
        if self.join == EXPERTS_BESIDE:
            return [(shape[0], shape[1] // len(self.pieces))] * len(self.pieces)
        return [(shape[0] // len(self.pieces), *shape[1:])] * len(self.pieces)


class Reference(Protocol):
    """The network of a family in PyTorch, which the exported graphs are compared with. Shape letters: B rows
    of the call, S rows of the window.

    module: all of it, for hooks and for moving it to a device. layers: its decoder layers, in order; what one
    returns is the residual stream after it (or a tuple that begins with it).
    """

    module: Any
    layers: Any

    def load(self, state: Mapping[str, Any], dtype: Any) -> None:
        """Load the weights: tensors by the names of decoder.weight_shapes. Raises DllmError if they do not
        match the network."""

    def hidden_states(self, input_ids: Any, position_ids: Any, mask: Any, cache: Any) -> Any:
        """The residual stream after the final norm [B, S, hidden], for int64 ids and positions [B, S] and an
        additive mask [B, 1, S, keys].

        cache: an object with `update(key, value, layer)`, which receives a layer's keys (after RoPE) and
        values [B, H, S, D] and returns those to attend to.
        """

    def logits(self, hidden: Any) -> Any:
        """float32 logits [B, R, V] of hidden states [B, R, hidden]."""


def transformers_reference(architecture: str, decoder: DecoderConfig, **config: Any) -> Reference:
    """transformers' own decoder of an architecture ('Llama', 'Qwen2', 'Qwen3', 'Qwen3Moe', 'Glm4Moe') with
    full attention. config:
    further fields of its configuration."""
    from . import experts_network, transformers_network  # import torch

    if isinstance(decoder.feed_forward, MixtureOfExperts):
        return experts_network.ExpertsNetwork(architecture, decoder, config)
    return transformers_network.TransformersNetwork(architecture, decoder, config)


class Family(ABC):
    """An architecture: how its config is spelled, how its tensors are named, how it decodes."""

    title: str  # its name in messages
    # classes that config.json may name in `architectures`, where the model type says too little
    architectures: tuple[str, ...] = ()
    # a model type that another network has too, and the key of config.json that only this one has
    told_by: tuple[str, str] | None = None
    # other model types of its checkpoints
    aliases: tuple[str, ...] = ()
    # the mask token of the published checkpoints, if no configuration names it: its possible texts in the
    # tokenizer, and its id for checkpoints without a tokenizer
    mask_tokens: tuple[str, ...] = ()
    mask_token_id: int | None = None
    # whether an answer ends with the padding token, where nothing else names an end token
    ends_with_padding: bool = False
    # what a user should know about every export of this family
    note: str | None = None
    # whether config.json leaves open which attention a checkpoint was trained with, so that the user must say
    attention_is_told: bool = False
    # how its checkpoints with block-causal attention decode; None: it has none
    block_causal: BlockRule | None = None
    allowed_surplus: Iterable[
        str
        # regular expressions: tensors that a checkpoint may contain although the decoder does not use them
    ] = ()

    @abstractmethod
    def decoder(self, config: ConfigReader) -> DecoderConfig:
        """The network. Raises DllmError for a value that is not implemented, naming key and value."""

    @abstractmethod
    def decoding(self, config: ConfigReader, generation_config: Mapping[str, Any]) -> DecodingFacts:
        """How the model decodes."""

    @abstractmethod
    def tensor_name(self, weight: str) -> str:
        """The checkpoint's name of a decoder weight (decoder.weight_shapes), e.g. 'layers.3.q_proj'."""

    def pieces(self, weight: str) -> tuple[Piece, ...]:
        """Where a decoder weight is stored: in one tensor, unless the family's checkpoints have it in several
        tensors or as rows of a larger one."""
        return (Piece(self.tensor_name(weight)),)

    def stored_as(self, weight: str, decoder: DecoderConfig) -> StoredAs:
        """The pieces of a weight in a checkpoint of this network, and how they are joined: those of `pieces`,
        but for weights that experts share."""
        where = split_layer(weight)
        if where is not None:
            part = decoder.feed_forward_of(where[0])
            if (of_experts := part.of_experts(where[1])) is not None:
                names, join = of_experts
                return StoredAs(
                    tuple(
                        Piece(self.expert_tensor(where[0], expert, name))
                        for expert in range(part.num_experts)
                        for name in names
                    ),
                    join,
                )
        return StoredAs(self.pieces(weight))

    def expert_tensor(self, layer: int, expert: int, name: str) -> str:
        """The checkpoint's name of a linear layer of an expert, 'gate_proj', 'up_proj' or 'down_proj'."""
        return f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"

    @abstractmethod
    def tiny_config(self) -> dict[str, Any]:
        """A config.json of a tiny model of this family, for the parametrised tests."""

    @abstractmethod
    def reference(self, decoder: DecoderConfig) -> Reference:
        """The same network in PyTorch, from code that is not ours; imports torch. `transformers_reference`
        provides it if transformers has the network."""


def tensor_shapes(family: Family, network: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of this network, and their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weight, shape in decoder.weight_shapes(network).items():
        stored = family.stored_as(weight, network)
        for piece, own in zip(stored.pieces, stored.shapes(shape), strict=True):
            if piece.rows is not None:  # of a larger tensor
                there = shapes.get(piece.tensor, (0,))[0]
                shapes[piece.tensor] = (max(piece.rows[1], there), *own[1:])
            else:
                shapes[piece.tensor] = own
    return shapes
