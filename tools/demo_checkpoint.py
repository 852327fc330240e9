"""The demo model's checkpoint in LLaDA's official layout: tokenizer, network sizes, files."""

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
MAX_LENGTH = 256
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
    tensors = {f"model.transformer.{name}": tensor.bfloat16() for name, tensor in model.state_dict().items()}
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
            "block_length": 8,
        },
    )
    write_json(out / "config.json", _config())


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
