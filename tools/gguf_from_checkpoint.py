"""Write a checkpoint as a GGUF file for llama.cpp's diffusion example: the same weights for a comparison.

    python tools/gguf_from_checkpoint.py checkpoints/llada-140m llada-140m.gguf
    python tools/gguf_from_checkpoint.py checkpoints/llada-140m llada-140m-q8.gguf --type q8_0

LLaDA, Dream, LLaDA-MoE and RND1, whose networks llama.cpp knows. Its vocabulary is not the model's: token 17
is the text "<17>", so that a prompt of token ids, "<5><17>", is read as these, and an answer can be compared
token by token. For chatting, convert the checkpoint with llama.cpp's own script. Runs from a checkout with
the extras `export` and `bench`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

import gguf
from gguf.quants import quantize

from export import families
from export import source as sources
from export.graph import decoder, experts
from export.graph.context import split_layer
from export.source import Source
from export.weights.sources import Array, FromCheckpoint
from trt_runtime.errors import DllmError

# family -> llama.cpp's architecture, and whether its RoPE turns neighbouring entries instead of halves
_ARCHITECTURES = {
    "llada": ("llada", True),
    "dream": ("dream", False),
    "llada_moe": ("llada-moe", False),
    "rnd1": ("rnd1", False),
}
_OUTSIDE = {
    decoder.EMBEDDING: "token_embd",
    decoder.FINAL_NORM: "output_norm",
    decoder.HEAD: "output",
}
_LAYER = {
    "attention_norm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    experts.ROUTER: "ffn_gate_inp",
    experts.GATE: "ffn_gate_exps",
    experts.UP: "ffn_up_exps",
    experts.OUTER: "ffn_down_exps",
}
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}


def write(checkpoint: str, out: Path, kind: str = "f32", mask_token: str | None = None) -> None:
    """A GGUF file of a checkpoint; matrices have the type `kind`, vectors and routers are float32. Raises
    DllmError for a family that llama.cpp does not have, and for a file that exists."""
    if out.exists():
        raise DllmError(f"{out}: exists: give another file, or remove it.")
    source = sources.read(checkpoint, mask_token=mask_token)
    name = families.of(source.checkpoint.config)[0]
    if name not in _ARCHITECTURES:
        raise DllmError(
            f"{checkpoint}: llama.cpp has no network of {source.family.title}: supported are "
            f"{', '.join(sorted(_ARCHITECTURES))}."
        )
    architecture, is_interleaved = _ARCHITECTURES[name]
    writer = gguf.GGUFWriter(out, architecture)
    _add_facts(writer, source)
    _add_vocabulary(writer, source)
    tensors = {
        tensor: (weight, shape, _type(tensor, shape, kind)) for tensor, weight, shape in _stored(source)
    }
    for tensor, (_, shape, dtype) in tensors.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[dtype]
        is_quantised = block > 1
        writer.add_tensor_info(
            tensor,
            gguf.quant_shape_to_byte_shape(shape, dtype) if is_quantised else shape,
            np.dtype(np.uint8 if is_quantised else f"f{block_bytes}"),
            math.prod(shape) // block * block_bytes,
            raw_dtype=dtype,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, (weight, shape, dtype) in tensors.items():
        array = np.concatenate(list(weight.rows(shape[-1]))).reshape(shape)
        if is_interleaved and tensor.split(".")[-2] in ("attn_q", "attn_k"):
            array = _interleaved(array, source.decoder.attention.head_dim)
        writer.write_tensor_data(quantize(array, dtype))
    writer.close()


def _type(tensor: str, shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    """The type of a tensor: float32 for vectors and routers, f16 where rows are not whole blocks."""
    if len(shape) == 1 or "gate_inp" in tensor:
        return TYPES["f32"]
    return TYPES["f16" if shape[-1] % gguf.GGML_QUANT_SIZES[TYPES[kind]][0] else kind]


def _stored(source: Source) -> Iterator[tuple[str, FromCheckpoint, tuple[int, ...]]]:
    """llama.cpp's name of every tensor, its elements, and its shape. Those of experts are [E, out, in]."""
    part, network, stacked = source.decoder.feed_forward, source.decoder, None
    if isinstance(part, experts.MixtureOfExperts):
        stacked = replace(network, feed_forward=part.fused())
    for weight, shape in decoder.weight_shapes(network).items():
        own, config, leaf = weight, network, (split_layer(weight) or ("", ""))[1]
        if leaf == experts.DOWN and stacked is not None:
            own, config = weight.replace(experts.DOWN, experts.OUTER), stacked
        whole = shape
        if leaf == experts.DOWN and stacked is not None:
            whole = decoder.weight_shapes(stacked)[own]
        elif leaf in (experts.GATE, experts.UP):
            whole = (part.num_experts, shape[0] // part.num_experts, shape[1])
        yield _name(own), FromCheckpoint.of(source.checkpoint, source.family.stored_as(own, config)), whole


def _name(weight: str) -> str:
    where = split_layer(weight)
    if where is None:
        return f"{_OUTSIDE[weight]}.weight"
    leaf, _, kind = where[1].partition(".")
    return f"blk.{where[0]}.{_LAYER[leaf]}.{kind or 'weight'}"


def _interleaved(array: Array, head_dim: int) -> Array:
    """Rows [H * D, ...] of heads whose halves are turned with one another, as rows whose neighbours are."""
    heads = array.reshape(-1, 2, head_dim // 2, *array.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(array.shape)


def _add_facts(writer: gguf.GGUFWriter, source: Source) -> None:
    """The sizes of the network, and how it decodes."""
    network, attention = source.decoder, source.decoder.attention
    part = network.feed_forward
    writer.add_context_length(network.max_length)
    writer.add_embedding_length(network.hidden_size)
    writer.add_block_count(network.num_layers)
    writer.add_head_count(attention.num_heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_layer_norm_rms_eps(network.norm_eps)
    writer.add_rope_freq_base(attention.rope_theta)
    writer.add_rope_dimension_count(attention.head_dim)
    writer.add_vocab_size(network.vocab_size)
    writer.add_feed_forward_length(part.intermediate_size)
    if isinstance(part, experts.MixtureOfExperts):
        writer.add_expert_count(part.router.num_experts)
        writer.add_expert_used_count(part.router.top_k)
        writer.add_expert_feed_forward_length(part.intermediate_size)
    writer.add_causal_attention(False)
    writer.add_diffusion_shift_logits(bool(source.decoding.logit_shift))


def _add_vocabulary(writer: gguf.GGUFWriter, source: Source) -> None:
    """Token 17 is the text <17>. The mask stands for the tokens that llama.cpp leaves out of its output:
    no answer has it."""
    size, mask = source.decoder.vocab_size, source.decoding.mask_token_id
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{token}>" for token in range(size)])
    writer.add_token_types([gguf.TokenType.USER_DEFINED] * size)
    writer.add_token_merges(["< >"])  # none is used, but one is expected
    writer.add_mask_token_id(mask)
    writer.add_bos_token_id(mask)
    writer.add_eos_token_id(mask)
    writer.add_add_bos_token(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a checkpoint's directory or hub id")
    parser.add_argument("out", type=Path, help="the GGUF file to write")
    parser.add_argument("--type", choices=sorted(TYPES), default="f32", help="of the matrices (default f32)")
    parser.add_argument("--mask-token", help="the mask token, where config.json names none")
    args = parser.parse_args()
    try:
        write(args.checkpoint, args.out, args.type, args.mask_token)
    except DllmError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
