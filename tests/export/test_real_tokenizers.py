"""Published tokenizers: texts become the tokens of transformers, and damaged files are refused."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from places import export_quietly, refused
from real_files import dream_vocabulary, put_tokenizer, write_small

from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    """Dream's configuration and tokenizer over a small network, and its artifact."""
    path = write_small(
        tmp_path_factory.mktemp("dream") / "checkpoint", "Dream-v0-Base-7B", "Dream-v0-Base-7B"
    )
    return path, export_quietly(path, path.parent / "artifact", dtype="bf16", weights="link")


# fmt: off
PIECES = [  # prose, code, digits, many scripts, white space, special and half special tokens
    "the ", "Hello", " world", "def f(x):\n", "    return ", "x ** 2", "\t", "\r\n", "\n\n", "  ",
    "it's", "I'LL", "100", "3.14159", "٣٤", "ß", "größe", "đem", "é", "世界", "日本語", "한국어", "🙂",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "नमस्ते", "שלום", "\xa0", "\u2028", "\u200b", "ﬁ",
    "Ⅷ", "½", "!?", "<|im_start|>", "<|im_end|>", "<|mask|>", "<|fim_pad|>", "<|im_", "end|>",
    "<tool_call>", '{"a": [1, 2]}', "https://a.b/c?d=e", "#include <x>\n", "/* ", "\\n", "_",
    "\x00", "\x7f", "Ġ", "Ã¶", "aAbB", " ", ".",
]
# fmt: on


def _texts(tokenizer, count):
    """Varied texts: prose, code, digits, many scripts, white space, special and half special tokens,
    conversations."""
    rng = random.Random(0)
    for i in range(count):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 24)))
        if i % 10 == 0:
            text = tokenizer.render_chat(
                [{"role": "user", "content": text}], add_generation_prompt=bool(i % 20)
            )
        if i % 7 == 0:
            text += "".join(
                chr(rng.choice([rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x11000)])) for _ in range(8)
            )
        yield text


def _qwen2(path, tmp_path):
    transformers = pytest.importorskip("transformers")
    plain = shutil.copytree(
        path, tmp_path / "plain", ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    config = json.loads((plain / "tokenizer_config.json").read_text())
    changed = {key: value for key, value in config.items() if key not in ("auto_map", "backend", "is_local")}
    (plain / "tokenizer_config.json").write_text(json.dumps({**changed, "tokenizer_class": "Qwen2Tokenizer"}))
    return transformers.Qwen2Tokenizer.from_pretrained(plain)


def test_dreams_whole_tokenizer_is_transformers_token_by_token(dream, tmp_path):
    path, artifact = dream
    ours, theirs = Tokenizer(artifact / "tokenizer"), _qwen2(path, tmp_path)
    assert ours.encode("Hello world") == [9707, 1879] and ours.encode(" Hello world") == [21927, 1879]
    assert (ours.special_id("mask_token"), ours.encode("<|mask|>"), ours.max_id) == (151666, [151666], 151666)
    rng = random.Random(1)
    for text in _texts(ours, 2000):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        drawn = rng.choices(range(151_700), k=12)  # also ids that no token has
        assert ours.decode(drawn) == theirs.decode(drawn, skip_special_tokens=True)
    manifest = manifests.load(artifact)
    assert manifest.decoding.eos_token_ids == (151643, 151645) and manifest.decoding.mask_token_id == 151666


def test_a_tokenizer_that_transformers_5_saved_with_131_added_tokens(tmp_path):
    path = write_small(tmp_path / "checkpoint", "Dream-v0-Base-7B", "dream_chemical_tokenizer")
    artifact = export_quietly(path, tmp_path / "a", dtype="bf16", weights="link")
    ours, theirs = Tokenizer(artifact / "tokenizer"), _qwen2(path, tmp_path)
    assert len(ours.added_tokens) == 131 and ours.max_id == 151773
    assert ours.encode("[/C@@H1][C][/O-1]") == [151676, 151727, 151691]
    rng, parts = random.Random(2), [*ours.added_tokens.values(), "C", " is ", "größe", "世", "[C"]
    for _ in range(300):
        text = "".join(rng.choices(parts, k=9))
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    rendered = theirs.apply_chat_template(
        [{"role": "user", "content": "[C][O]"}], tokenize=False, add_generation_prompt=True
    )
    assert ours.render_chat([{"role": "user", "content": "[C][O]"}]) == rendered
    assert manifests.load(artifact).decoding.eos_token_ids == (151643, 151645)


def test_a_vocabulary_that_is_cut_short_is_one_clear_line(dream, tmp_path):
    """As one public repository holds it: the first 2 MiB."""
    path = write_small(tmp_path / "checkpoint", "Dream-v0-Instruct-7B", "Dream-v0-Instruct-7B")
    (path / "vocab.json").write_bytes(dream_vocabulary()["vocab.json"][: 1 << 21])
    refused(
        path,
        tmp_path / "out",
        "vocab.json and merges.txt are not readable",
        "download them again",
        dtype="bf16",
    )


@pytest.mark.parametrize("name", ["midstreeeam-tinystory", "midstreeeam-tinystory2"])
@pytest.mark.parametrize("cleans", [None, True, False])
def test_wordpiece_texts_are_those_of_transformers(name, cleans, tmp_path):
    transformers = pytest.importorskip("transformers")
    put_tokenizer(name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if cleans is not None:
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({**config, "clean_up_tokenization_spaces": cleans})
        )
    ours, theirs = Tokenizer(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "Tom said , \" I do n't know ! \" We 're here , he 's not . Is it ' so ' ?"
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    if name == "midstreeeam-tinystory":  # its decoder is null, so nothing else takes a space away
        assert (" ," in ours.decode(ids)) is not bool(cleans)
    rng = random.Random(0)
    marks = [ours.encode(mark)[0] for mark in ".,!?'" + "ntmsver"]
    for _ in range(500):
        drawn = rng.choices([*marks, *rng.sample(range(ours.max_id), 5)], k=20)
        whole = ours.decode(drawn)
        assert whole == theirs.decode(drawn, skip_special_tokens=True)
        assert whole.startswith(ours.settled(drawn[: rng.randint(0, 20)]))
