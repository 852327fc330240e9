"""Published configurations and tokenizers (tests/data/real), as they are: exported, compared with
transformers, or refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
from places import export_quietly, refused
from real_files import REAL, config_of, write_small

from export import families
from export.checkpoint import huggingface as checkpoint
from export.families.base import ConfigReader
from export.graph.decoder import weight_shapes
from export.pipeline import ExportConfig, export, facts_of_checkpoint
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.tokenizer import Tokenizer
from trt_runtime.errors import DllmError

ACCEPTED = [
    "Dream-v0-Base-7B",
    "Dream-v0-Instruct-7B",
    "LLaDA-8B-Instruct",
    "LLaDA-8B-Instruct-DARE",
    "SDAR-8B-Chat",
] + [
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
    **{
        f"small-llada-configs/midstreeeam-{name}.json": ("layer_norm_type is 'default'", "supported is 'rms'")
        for name in ("llada_40m", "llada_100m", "llada_400m", "llada_debug")
    },
    **{
        f"small-llada-configs/midstreeeam-{name}.json": ("unknown model type 'llama'",)
        for name in ("llama_400m", "llama_1b", "llama_4b")
    },
}


def _alone(path, name):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_of(name)))
    return path


def test_every_real_configuration_is_accepted_or_refused_by_name(tmp_path):
    names = [path.parent.relative_to(REAL).as_posix() for path in REAL.glob("*/config.json")]
    names += [path.relative_to(REAL).as_posix() for path in (REAL / "small-llada-configs").iterdir()]
    assert sorted(names) == sorted([*ACCEPTED, *REFUSED])
    sizes = {}
    for i, name in enumerate(ACCEPTED):
        sizes[name] = facts_of_checkpoint(str(_alone(tmp_path / str(i), name)), "bf16").parameters
    assert sizes["Dream-v0-Base-7B"] == sizes["Dream-v0-Instruct-7B"] == 7_615_616_512
    assert sizes["SDAR-8B-Chat"] == 8_190_735_360
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
    path, said = write_small(tmp_path / "checkpoint", name, tokenizer), []
    export(
        ExportConfig(str(path), tmp_path / "a", "bf16", weights="link"),
        lambda total: lambda done: None,
        said.append,
    )
    assert len([text for text in said if "ignored" in text and noted in text]) == 1


def test_the_real_template_of_llada_names_its_end_of_turn(tmp_path):
    """It has no `if add_generation_prompt`: the assistant's header always follows."""
    path = write_small(tmp_path / "checkpoint", "LLaDA-8B-Instruct")
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
    user, assistant = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
    assert prompt == f"<|startoftext|>{user}Hi<|eot_id|>{assistant}"


def test_the_mask_of_a_real_small_llada_is_its_tokenizers(tmp_path):
    """config.json names neither mask nor end; the tokenizer does. [PAD] is a token of its own, so it ends an
    answer too."""
    path, said = (
        write_small(
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


def test_config_json_without_include_bias_leaves_the_biases_to_the_tensors(tmp_path):
    """The class's default is true: with biases among the tensors an export refuses them by name, without them
    there is nothing to add."""
    name = "small-llada-configs/F4k3r22-LLaDA-from-scratch.config.json"
    assert "include_bias" not in config_of(name)
    path = write_small(tmp_path / "checkpoint", name)
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
