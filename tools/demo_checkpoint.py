"""The demo models' checkpoints in the official layouts of LLaDA and SDAR: tokenizer, network sizes, files."""

from __future__ import annotations

import json
from pathlib import Path

import demo_task
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn

END, MASK, USER, ASSISTANT, UNKNOWN = SPECIAL = (
    "<|endoftext|>", "<|mdm_mask|>", "<|user|>", "<|assistant|>", "<|unknown|>",
)  # fmt: skip
END_ID, MASK_ID = 0, 1
VOCAB, WIDTH, LAYERS, HEADS, MLP, THETA, EPS = 192, 192, 4, 3, 384, 1000.0, 1e-5
MAX_LENGTH, BLOCK_LENGTH = 256, 8
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """One token per word and per run of punctuation with its spaces; other spaces are dropped. Answers
    survive a round trip exactly."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *demo_task.glue(), *demo_task.words()])}
    assert len(vocab) <= VOCAB and vocab[MASK] == MASK_ID and vocab[END] == END_ID
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r'[\s"\[\]{}:,;.?!]+'), "isolated"),
            pre_tokenizers.Split(Regex(r"^\s+$"), "removed"),
        ]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def save(model: nn.Module, tokenizer: Tokenizer, out: Path) -> None:
    """A checkpoint of the model with full attention, in LLaDA's layout."""
    names = {name: f"model.transformer.{name}" for name in model.state_dict()}
    _save(model, names, tokenizer, _config(), out)


def save_block_causal(model: nn.Module, tokenizer: Tokenizer, out: Path) -> None:
    """A checkpoint of the block-causal model, in SDAR's layout."""
    names = {name: stored_name(name) for name in model.state_dict()}
    _save(model, names, tokenizer, _block_causal_config(), out)


def stored_name(name: str) -> str:
    """The official name of a weight of the block-causal model."""
    head, _, rest = name.partition(".")
    if head != "blocks":
        return f"model.{name}"
    layer, part, leaf = rest.split(".")
    inside = "" if part.endswith("layernorm") else "mlp." if part[0] in "gud" else "self_attn."
    return f"model.layers.{layer}.{inside}{part}.{leaf}"


def _save(model: nn.Module, names: dict[str, str], tokenizer: Tokenizer, config: dict, out: Path) -> None:
    tensors = {names[name]: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": END,
            "unk_token": UNKNOWN,
            "mask_token": MASK,
            "model_max_length": MAX_LENGTH,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
        },
    )
    write_json(
        out / "generation_config.json",
        {
            "eos_token_id": END_ID,
            "pad_token_id": END_ID,
            "gen_length": demo_task.GEN_LENGTH,
            "block_length": BLOCK_LENGTH,
        },
    )
    write_json(out / "config.json", config)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _config() -> dict:
    """config.json, with the keys of the published LLaDA."""
    return {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": WIDTH,
        "embedding_dropout": 0.0,
        "embedding_size": VOCAB,
        "eos_token_id": END_ID,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": MASK_ID,
        "max_sequence_length": MAX_LENGTH,
        "mlp_hidden_size": MLP,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "n_layers": LAYERS,
        "pad_token_id": END_ID,
        "residual_dropout": 0.0,
        "rms_norm_eps": EPS,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": THETA,
        "scale_logits": False,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "vocab_size": VOCAB,
        "weight_tying": False,
    }


def _block_causal_config() -> dict:
    """config.json, with the keys of the published SDAR."""
    return {
        "architectures": ["SDARForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": BLOCK_LENGTH,
        "eos_token_id": END_ID,
        "head_dim": WIDTH // HEADS,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "mask_token_id": MASK_ID,
        "max_position_embeddings": MAX_LENGTH,
        "model_type": "sdar",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "pad_token_id": END_ID,
        "rms_norm_eps": EPS,
        "rope_scaling": None,
        "rope_theta": THETA,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": VOCAB,
    }
