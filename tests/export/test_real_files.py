"""Published configurations and tokenizers (tests/data/real), as they are: exported, compared with
transformers, or refused in one line."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from places import export_quietly, refused
from real_files import REAL, config_of, dream_vocabulary, put_tokenizer
from tiny import write_sparse

from export import families
from export.checkpoint import huggingface as checkpoint
from export.families.base import ConfigReader
from export.graph.decoder import weight_shapes
from export.pipeline import ExportConfig, export, facts_of_checkpoint
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.tokenizer import Tokenizer
from trt_runtime.errors import DllmError

SMALL = {
    "llada": {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 1, "mlp_hidden_size": 96},
    "Dream": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 96,
    },
}
ACCEPTED = ["Dream-v0-Base-7B", "Dream-v0-Instruct-7B", "LLaDA-8B-Instruct", "LLaDA-8B-Instruct-DARE"] + [
    f"small-llada-configs/{name}"
    for name in (
        "F4k3r22-LLaDA-from-scratch.config.json",
        "midstreeeam-llada_1b.json",
        "midstreeeam-llada_4b.json",
        "midstreeeam-tllada_50m.json",
        "midstreeeam-tllada_52m.json",
        "midstreeeam-tllada_56m.json",
    )
]
REFUSED = {
    "SDAR-8B-Chat": ("unknown model type 'sdar'",),
    **{
        f"small-llada-configs/midstreeeam-{name}.json": ("layer_norm_type is 'default'", "supported is 'rms'")
        for name in ("llada_40m", "llada_100m", "llada_400m", "llada_debug")
    },
    **{
        f"small-llada-configs/midstreeeam-{name}.json": ("unknown model type 'llama'",)
        for name in ("llama_400m", "llama_1b", "llama_4b")
    },
}


def _write(path, name, tokenizer=None, **change):
    """A checkpoint with a real configuration of a smaller network, and a real tokenizer. All weights are
    zero."""
    config = config_of(name)
    write_sparse(
        families.find(config["model_type"]), path, {**config, **SMALL[config["model_type"]], **change}, "bf16"
    )
    if tokenizer:
        put_tokenizer(tokenizer, path)
    return path


def _alone(path, name):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_of(name)))
    return path


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    """Dream's configuration and tokenizer over a small network, and its artifact."""
    path = _write(tmp_path_factory.mktemp("dream") / "checkpoint", "Dream-v0-Base-7B", "Dream-v0-Base-7B")
    return path, export_quietly(path, path.parent / "artifact", dtype="bf16", weights="link")


def test_every_real_configuration_is_accepted_or_refused_by_name(tmp_path):
    names = [path.parent.relative_to(REAL).as_posix() for path in REAL.glob("*/config.json")]
    names += [path.relative_to(REAL).as_posix() for path in (REAL / "small-llada-configs").iterdir()]
    assert sorted(names) == sorted([*ACCEPTED, *REFUSED])
    sizes = {}
    for i, name in enumerate(ACCEPTED):
        sizes[name] = facts_of_checkpoint(str(_alone(tmp_path / str(i), name)), "bf16").parameters
    assert sizes["Dream-v0-Base-7B"] == sizes["Dream-v0-Instruct-7B"] == 7_615_616_512
    assert sizes["LLaDA-8B-Instruct"] == sizes["LLaDA-8B-Instruct-DARE"] == 8_015_581_184
    for name, said in REFUSED.items():
        path = _alone(tmp_path / name.replace("/", "-"), name)
        with pytest.raises(DllmError) as error:
            facts_of_checkpoint(str(path), "bf16")
        assert all(part in str(error.value) for part in said) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["Dream-v0-Base-7B", "LLaDA-8B-Instruct"])
def test_the_tensors_of_a_real_index_are_the_familys(name):
    config = config_of(name)
    family = families.find(config["model_type"])
    names = {
        family.tensor_name(weight) for weight in weight_shapes(family.decoder(ConfigReader(config, name)))
    }
    assert names == set(json.loads((REAL / name / "model.safetensors.index.json").read_text())["weight_map"])


@pytest.mark.parametrize(
    ("name", "noted"),
    [
        ("Dream-v0-Instruct-7B", "attn_implementation"),
        ("LLaDA-8B-Instruct-DARE", "flash_attn_varlen"),
        (
            "small-llada-configs/midstreeeam-tllada_56m.json",
            "_comment_bias, _comment_attention, _comment_dropout, _comment_initialization",
        ),
    ],
)
def test_what_a_trainer_added_is_noted_once(tmp_path, name, noted):
    tokenizer = "midstreeeam-tinystory2" if "tllada" in name else None
    path, said = _write(tmp_path / "checkpoint", name, tokenizer), []
    export(
        ExportConfig(str(path), tmp_path / "a", "bf16", weights="link"),
        lambda total: lambda done: None,
        said.append,
    )
    assert len([text for text in said if "ignored" in text and noted in text]) == 1


def _texts(tokenizer, count):
    """Varied texts: prose, code, digits, many scripts, white space, special and half special tokens,
    conversations."""
    rng = random.Random(0)
    pieces = [
        "the ",
        "Hello",
        " world",
        "def f(x):\n",
        "    return ",
        "x ** 2",
        "\t",
        "\r\n",
        "\n\n",
        "  ",
        "it's",
        "I'LL",
        "100",
        "3.14159",
        "٣٤",
        "ß",
        "größe",
        "đem",
        "e\u0301",
        "世界",
        "日本語",
        "한국어",
        "🙂",
        "👩‍👩‍👧",
        "नमस्ते",
        "שלום",
        "\u00a0",
        "\u2028",
        "\u200b",
        "ﬁ",
        "Ⅷ",
        "½",
        "!?",
        "<|im_start|>",
        "<|im_end|>",
        "<|mask|>",
        "<|fim_pad|>",
        "<|im_",
        "end|>",
        "<tool_call>",
        '{"a": [1, 2]}',
        "https://a.b/c?d=e",
        "#include <x>\n",
        "/* ",
        "\\n",
        "_",
        "\x00",
        "\x7f",
        "Ġ",
        "Ã¶",
        "aAbB",
        " ",
        ".",
    ]
    for i in range(count):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 24)))
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
    path = _write(tmp_path / "checkpoint", "Dream-v0-Base-7B", "dream_chemical_tokenizer")
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
    path = _write(tmp_path / "checkpoint", "Dream-v0-Instruct-7B", "Dream-v0-Instruct-7B")
    (path / "vocab.json").write_bytes(dream_vocabulary()["vocab.json"][: 1 << 21])
    refused(
        path,
        tmp_path / "out",
        "vocab.json and merges.txt are not readable",
        "download them again",
        dtype="bf16",
    )


def test_the_real_template_of_llada_names_its_end_of_turn(tmp_path):
    """It has no `if add_generation_prompt`: the assistant's header always follows."""
    path = _write(tmp_path / "checkpoint", "LLaDA-8B-Instruct")
    config = json.loads((REAL / "LLaDA-8B-Instruct" / "tokenizer_config.json").read_text())
    assert "add_generation_prompt" not in config["chat_template"]
    tokens = {int(token): entry for token, entry in config["added_tokens_decoder"].items()}
    small = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "unk_token": "[gMASK]",
            "vocab": {e["content"]: i for i, e in tokens.items()},
        },
        "added_tokens": [{"id": i, **entry} for i, entry in tokens.items()],
    }
    (path / "tokenizer.json").write_text(json.dumps(small))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(REAL / "LLaDA-8B-Instruct" / name, path / name)
    decoding = manifests.load(export_quietly(path, tmp_path / "a", dtype="bf16", weights="link")).decoding
    assert decoding.eos_token_ids == (126081, 126348) and decoding.pad_token_id == 126081
    prompt = Tokenizer(tmp_path / "a" / "tokenizer").render_chat([{"role": "user", "content": " Hi "}])
    assert (
        prompt
        == "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_the_mask_of_a_real_small_llada_is_its_tokenizers(tmp_path):
    """config.json names neither mask nor end; the tokenizer does. [PAD] is a token of its own, so it ends an
    answer too."""
    path, said = (
        _write(
            tmp_path / "checkpoint",
            "small-llada-configs/midstreeeam-tllada_56m.json",
            "midstreeeam-tinystory2",
        ),
        [],
    )
    export(
        ExportConfig(str(path), tmp_path / "a", "bf16", weights="link"),
        lambda total: lambda done: None,
        said.append,
    )
    decoding = manifests.load(tmp_path / "a").decoding
    assert (decoding.mask_token_id, decoding.eos_token_ids, decoding.pad_token_id) == (4, (6, 0), 0)
    assert any("mask_token_id: it is 4, the tokenizer's mask_token" in text for text in said)
    assert any("eos_token_id: it is 6" in text for text in said)


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


def test_config_json_without_include_bias_leaves_the_biases_to_the_tensors(tmp_path):
    """The class's default is true: with biases among the tensors an export refuses them by name, without them
    there is nothing to add."""
    name = "small-llada-configs/F4k3r22-LLaDA-from-scratch.config.json"
    assert "include_bias" not in config_of(name)
    path = _write(tmp_path / "checkpoint", name)
    export_quietly(path, tmp_path / "a", dtype="bf16", weights="link")
    held = {name: tensor.shape for name, tensor in checkpoint.load(path).tensors.items()}
    from random_checkpoint import write_safetensors

    write_safetensors(
        path / "model.safetensors", {**held, "model.transformer.blocks.0.q_proj.bias": (64,)}, "bf16", ()
    )
    refused(
        path,
        tmp_path / "b",
        "1 tensors are not part",
        "blocks.0.q_proj.bias",
        "without these biases",
        dtype="bf16",
    )
