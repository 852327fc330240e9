"""Token ids back to text: added tokens as they are written, spaces cleaned as transformers does, and what of
a text stays."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import tokenizers
from places import export_quietly
from real_files import put_tokenizer
from tiny import write_checkpoint
from tokenizers import AddedToken, decoders, normalizers
from trained_tokenizers import DREAM_SPECIAL, trained

import trt_runtime as rt
from export import families
from export.checkpoint import tokenizer as tokenizer_files
from trt_runtime.artifact.detokenize import _byte_alphabet
from trt_runtime.artifact.tokenizer import Tokenizer

WORDS = ["größe", "đem", "čaj", "世界", "🙂👍", "ß ß", "Ġthe", "Ã¶", "naïve-½", "e\u0301t"]


def _written(path, words, normalized, special, decoder=None):
    """A byte-level tokenizer with added words; the first of DREAM_SPECIAL are special tokens."""
    made = trained(DREAM_SPECIAL, tokenizer_files._QWEN2)
    if decoder is not None:
        made.decoder = decoder
    tokens = [AddedToken(word, normalized=normalized, special=special) for word in words]
    (made.add_special_tokens if special else made.add_tokens)(tokens)
    path.mkdir(exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    return Tokenizer(path)


def _slow(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The rule of transformers' slow tokenizers, restated: special tokens go, runs of the vocabulary's tokens
    are bytes, added tokens are text."""
    inner, letters = tokenizer._tokenizer, {letter: byte for byte, letter in enumerate(_byte_alphabet())}
    added = inner.get_added_tokens_decoder()
    text, run = "", b""
    for token in ids:
        if token in added and added[token].special:
            continue
        if token in added:
            text, run = text + run.decode(errors="replace") + added[token].content, b""
        elif inner.id_to_token(token) is not None:
            run += bytes(letters[letter] for letter in inner.id_to_token(token))
    return text + run.decode(errors="replace")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_added_words_beyond_ascii_come_back(tmp_path, normalized, special):
    tokenizer = _written(tmp_path, WORDS, normalized, special)
    for word in WORDS:
        token = tokenizer.id_of(word)
        assert tokenizer.piece(token) == word
        if normalized and normalizers.NFC().normalize_str(word) != word:
            continue  # texts are composed first, and then the word does not stand in them
        assert tokenizer.encode(f"is {word} it") == [
            *tokenizer.encode("is "),
            token,
            *tokenizer.encode(" it"),
        ]
        assert tokenizer.decode(tokenizer.encode(f"is {word} it")) == (
            "is  it" if special else f"is {word} it"
        )


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.Sequence([decoders.ByteLevel()]),
        decoders.Sequence([decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()])]),
    ],
)
def test_any_ids_read_as_the_slow_tokenizer_reads_them(tmp_path, decoder):
    tokenizer = _written(tmp_path, WORDS[:5] + WORDS[7:], False, False, None if decoder is None else decoder)
    rng, most = random.Random(0), tokenizer.max_id
    broken = "Fuse" in repr(decoder)  # bytes and what is no byte are one token then: every letter must be one
    ids = (
        range(most + 9)
        if not broken
        else [
            i for i in range(most) if set(tokenizer._tokenizer.id_to_token(i) or "") <= set(_byte_alphabet())
        ]
    )
    for _ in range(1000):
        drawn = rng.choices([*ids, *[i for i in ids if i >= most - 12]], k=rng.randint(0, 16))
        whole = tokenizer.decode(drawn)
        assert whole == _slow(tokenizer, drawn)
        assert whole.startswith(tokenizer.settled(drawn[: rng.randint(0, len(drawn))]))


def test_a_character_that_is_split_by_an_added_token_is_two_halves(tmp_path):
    tokenizer = _written(tmp_path, ["größe"], False, False)
    first, second = (tokenizer.id_of(letter) for letter in (_byte_alphabet()[0xC3], _byte_alphabet()[0xA9]))
    word, special = tokenizer.id_of("größe"), tokenizer.id_of("<|im_end|>")
    assert tokenizer.decode([first, second, word]) == "égröße"
    assert tokenizer.decode([first, word, second]) == "\ufffdgröße\ufffd"
    assert (
        tokenizer.decode([word, first, special, second]) == "größeé"
    )  # a token that is left out splits nothing
    assert tokenizer.settled([word, first]) == "größe"


def test_other_decoders_are_left_as_they_are(tmp_path):
    """Only a byte-level decoder takes letters for bytes."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    made.add_tokens(["größe", "##x"])
    for decoder in (None, decoders.WordPiece("##", False), decoders.Metaspace()):
        if decoder is not None:
            made.decoder = decoder
        made.save(str(tmp_path / "tokenizer.json"))
        assert Tokenizer(tmp_path).decode([0, 2, 3, 1]) == made.decode([0, 2, 3, 1])


def test_spaces_are_cleaned_only_where_the_configuration_asks_and_not_for_bpe(tmp_path):
    tokenizer = _written(tmp_path, [], False, False)
    ids = tokenizer.encode("a , b 's c . d")
    for config, said in (
        ({}, "a , b 's c . d"),
        ({"clean_up_tokenization_spaces": True}, "a , b 's c . d"),
        (
            {
                "clean_up_tokenization_spaces": True,
                "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
            },
            "a, b's c. d",
        ),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert Tokenizer(tmp_path).decode(ids) == said


def test_what_is_settled_is_a_prefix_of_whatever_follows():
    """Texts of nothing but what the rules look at, cut anywhere."""
    from trt_runtime.artifact import detokenize

    rng = random.Random(0)
    parts = [
        " ",
        ".",
        "'",
        " '",
        " ' ",
        "n",
        "n't",
        " n't",
        "t",
        "m",
        "s",
        "v",
        "e",
        "r",
        "ve",
        "re",
        "a",
        "?",
        " ,",
        "'re",
        "'ve",
    ]
    for _ in range(30_000):
        text = "".join(rng.choices(parts, k=rng.randint(1, 14)))
        cut = text[: rng.randint(0, len(text))]
        assert detokenize._clean(text).startswith(
            detokenize._clean(cut[: detokenize._settled_length(cut)])
        ), (text, cut)
    words = "I do n't know , said the man . We 're"
    assert (
        detokenize._clean(words[: detokenize._settled_length(words)]) == "I don't know, said the man. We're"
    )


@pytest.mark.parametrize("kind", ["wordpiece", "bytes"])
def test_text_that_a_stream_has_shown_is_never_changed(kind, tmp_path):
    """A model of random weights writes any tokens in any order: after each forward, what is committed begins
    the answer."""
    path = tmp_path / "tokenizer"
    path.mkdir()
    if kind == "wordpiece":
        put_tokenizer("midstreeeam-tinystory2", path)
        held = json.loads((path / "tokenizer.json").read_text())
        vocabulary = held["model"]["vocab"]
        marks = [
            vocabulary[text]
            for text in [".", ",", "!", "?", "'", "n", "t", "s", "m", "v", "r"]
            if text in vocabulary
        ]
        (path / "tokenizer.json").write_text(json.dumps({**held, "decoder": None}))
        config = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(
            json.dumps({**config, "clean_up_tokenization_spaces": True})
        )
    else:
        _written(path, WORDS, False, False)
        marks = []
    tokenizer = Tokenizer(path)
    size = tokenizer.max_id + 1
    checkpoint = write_checkpoint(
        families.find("llada"),
        tmp_path / "checkpoint",
        model={
            "vocab_size": size + 2,
            "embedding_size": size + 2,
            "mask_token_id": 4 if kind == "wordpiece" else tokenizer.id_of("<|mask|>"),
            "eos_token_id": size + 1,
            "pad_token_id": size + 1,
        },
    )
    for file in path.iterdir():
        shutil.copyfile(file, checkpoint / file.name)
    model = rt.load(export_quietly(checkpoint, tmp_path / "artifact"), threads=1)
    rng, shown = random.Random(0), 0
    for i in range(12):
        prompt = rng.choices(marks or range(5, size), k=6)
        options = rt.GenerationConfig(
            gen_length=24, block_length=3, temperature=2.0, seed=i, stop_at_eos=False, infill=True
        )
        committed = [update.committed for update in model.stream([prompt], options)]
        assert all(committed[-1].startswith(text) for text in committed)
        shown += len({*committed})
    assert shown > 40
