"""Tokenizers trained on the project's own documents."""

from __future__ import annotations

from places import ROOT
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

DREAM_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]


def trained(special: list[str], pattern: str) -> Tokenizer:
    """A byte-level BPE tokenizer over the project's own documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train([str(ROOT / "LICENSE"), str(ROOT / "CONTRIBUTING.md")], trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


def decoder_entries(tokenizer: Tokenizer) -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        str(i): {"content": token.content, **flags}
        for i, token in tokenizer.get_added_tokens_decoder().items()
    }
