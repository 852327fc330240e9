"""Keys of config.json that compute nothing, and tokens that config.json does not name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from places import export_quietly, refused
from tiny import write_checkpoint
from trained_tokenizers import DREAM_SPECIAL, decoder_entries, trained

import trt_runtime as rt
from export import cli, families
from export.checkpoint import tokenizer
from export.pipeline import ExportConfig, export, facts_of_checkpoint
from trt_runtime.artifact import manifest as manifests
from trt_runtime.cli.main import main
from trt_runtime.errors import DllmError

HARMLESS = {
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "sdpa",
    "_attn_implementation_internal": "eager",
    "_attn_implementation_autoset": True,
    "attention_implementation": "flash_attention_2",
    "flash_attn_varlen": True,
    "use_flash_attn": True,
    "use_flash_attention_2": True,
    "_flash_attn_2_enabled": True,
    "use_liger_kernel": True,
    "fuse_cross_entropy": True,
    "_comment": "x",
    "_comment_core_dims": "y",
    "//": "z",
    "// rope": ["a"],
    "#note": 1,
    "comment": "c",
    "comments": [],
    "$schema": "s",
    "hidden_dropout_prob": 0.1,
    "classifier_dropout": 0.0,
    "resid_pdrop": 0.1,
    "gradient_checkpointing": True,
    "initializer_factor": 1.0,
    "id2label": {"0": "a"},
    "label2id": {"a": 0},
    "task_specific_params": {},
    "problem_type": "x",
    "unsloth_version": "2025",
    "return_dict": True,
    "output_attentions": False,
    "torchscript": False,
    "chunk_size_feed_forward": 0,
    "pretraining_tp": 1,
    "max_length": 20,
    "do_sample": False,
    "temperature": 0.7,
    "top_p": 1.0,
    "num_beams": 1,
    "bad_words_ids": [[5]],
    "sep_token_id": 3,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "is_causal": False,
    "layer_types": ["full_attention"] * 3,
    "use_sliding_window": False,
    "attn_impl": "flash",
    "attention_backend": "FlashInfer",
    "attn_kernel": "fa3",
    "activation_checkpointing": True,
    "notes": "n",
    "description": "d",
    "_doc": "e",
    "_README": "f",
}
SAID_NOTHING_OF = {
    "is_decoder",
    "is_encoder_decoder",
    "add_cross_attention",
    "pruned_heads",
    "is_causal",
    "layer_types",
    "use_sliding_window",
}


def _noted(path, out, **options):
    said: list[str] = []
    export(ExportConfig(str(path), out, **options), lambda total: lambda done: None, said.append)
    return said


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_keys_that_compute_nothing_are_ignored_and_noted_once(family, tmp_path):
    plain = write_checkpoint(families.find(family), tmp_path / "plain")
    path = write_checkpoint(families.find(family), tmp_path / "c", config=HARMLESS)
    said = [text for text in _noted(path, tmp_path / "a") if "ignored" in text]
    assert len(said) == 1
    listed = said[0].partition("computes: ")[2].split(", ")
    assert set(listed) == set(HARMLESS) - SAID_NOTHING_OF
    assert not [text for text in _noted(plain, tmp_path / "b") if "ignored" in text]
    first, second = (manifests.load(tmp_path / name) for name in "ab")
    assert (first.model, first.decoding, first.files) == (second.model, second.decoding, second.files)


@pytest.mark.parametrize(
    "change",
    [
        {"strange": 0},
        {"attention_window": 64},
        {"final_logit_softcapping": 30.0},
        {"quantization_config": {"bits": 4}},
        {"is_causal": True},
        {"is_decoder": True},
        {"pruned_heads": {"0": [1]}},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"num_experts": 4},
        {"commentary_heads": 2},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"use_qk_norm": True},
        {"init_values": 1e-5},
        {"doc_mask": 1},
        {"attn_kernel": "performer"},
        {"attn_impl": 2},
        {"notebooks": 1},
        {"gen_length": "x"},
        {"attention_bias": True},
        {"eos_token_id": 126},
        {"mask_token_id": 500},
        {"pad_token_id": "end"},
    ],
)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_plan_refuses_what_an_export_refuses(family, change, tmp_path):
    path = write_checkpoint(families.find(family), tmp_path / "c", config=change)
    with pytest.raises(DllmError) as planned:
        facts_of_checkpoint(str(path), "bf16")
    refused(path, tmp_path / "out", str(planned.value))


@pytest.mark.parametrize(
    "change",
    [
        HARMLESS,
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {}},
        {"strange": None},
        {"mask_token_id": None, "eos_token_id": None, "pad_token_id": None},
    ],
)
def test_plan_takes_what_an_export_takes(tiny, change, capsys):
    assert main(["plan", str(tiny(config=change))]) == 0, capsys.readouterr().err


def test_transformers_own_name_of_a_tied_head_must_say_the_same(tiny, tmp_path):
    assert (
        facts_of_checkpoint(str(tiny("a", config={"tie_word_embeddings": False})), "bf16").tied_head is False
    )
    refused(
        tiny("b", config={"tie_word_embeddings": True}),
        tmp_path / "out",
        "tie_word_embeddings is True",
        "supported is False",
    )


def test_all_unknown_keys_stand_in_one_suggestion(tiny, tmp_path):
    path = tiny(config={"one": 1, "two words": [0] * 900, "three": None, "_comment": "x"})
    refused(
        path, tmp_path / "out", "one = 1, two words = [0, 0", "--ignore-key one --ignore-key 'two words'."
    )
    with pytest.raises(DllmError) as error:
        export_quietly(path, tmp_path / "out")
    assert len(str(error.value)) < 500 + len(str(path))
    assert _noted(path, tmp_path / "a", ignored_keys=("one", "two words", "_comment"))
    assert facts_of_checkpoint(str(path), "bf16", ("one", "two words")).num_layers == 3


def _with_tokenizer(path, special, names, **config):
    """A tiny LLaDA whose tokenizer names the special tokens of `names`, or of tokenizer_config.json;
    config.json as `config` says."""
    made = trained(special, tokenizer._QWEN2)
    size = made.get_vocab_size() + 4
    write_checkpoint(
        families.find("llada"),
        path,
        model={
            "vocab_size": size,
            "embedding_size": size,
            "mask_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **config,
        },
    )
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({**names, "added_tokens_decoder": decoder_entries(made)})
    )
    return {text: made.token_to_id(text) for text in special}


LIKE_ILLADA = ["<eos>", "<[MASK]>", "<pad>", "<|eot|>"]


def test_tokens_that_only_the_tokenizer_names_are_taken_from_it(tmp_path):
    path = tmp_path / "c"
    ids = _with_tokenizer(
        path, LIKE_ILLADA, {"mask_token": "<[MASK]>", "eos_token": "<eos>", "pad_token": {"content": "<pad>"}}
    )
    said = _noted(path, tmp_path / "a")
    decoding = manifests.load(tmp_path / "a").decoding
    assert (decoding.mask_token_id, decoding.pad_token_id) == (ids["<[MASK]>"], ids["<pad>"])
    assert decoding.eos_token_ids == (ids["<eos>"], ids["<pad>"])
    for key, name in (
        ("mask_token_id", "mask_token"),
        ("eos_token_id", "eos_token"),
        ("pad_token_id", "pad_token"),
    ):
        assert (
            sum(f"config.json has no {key}" in text and f"the tokenizer's {name}" in text for text in said)
            == 1
        )
    assert facts_of_checkpoint(str(path), "bf16").num_layers == 3
    (path / "tokenizer_config.json").write_text(json.dumps({"mask_token": "<[MASK]>", "eos_token": "<eos>"}))
    assert manifests.load(export_quietly(path, tmp_path / "b")).decoding.pad_token_id == ids["<eos>"]
    (path / "generation_config.json").write_text(
        json.dumps({"mask_token_id": ids["<pad>"], "eos_token_id": [ids["<|eot|>"]]})
    )
    (path / "tokenizer_config.json").write_text("{}")
    decoding = manifests.load(export_quietly(path, tmp_path / "d")).decoding
    assert (decoding.mask_token_id, decoding.eos_token_ids, decoding.pad_token_id) == (
        ids["<pad>"],
        (ids["<|eot|>"],),
        ids["<|eot|>"],
    )


def test_slow_tokenizer_files_name_the_mask_too(tmp_path):
    made = trained(DREAM_SPECIAL, tokenizer._QWEN2)
    path = write_checkpoint(
        families.find("dream"),
        tmp_path / "c",
        model={"vocab_size": made.get_vocab_size(), "mask_token_id": None},
    )
    made.model.save(str(path))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "DreamTokenizer",
                "mask_token": "<|mask|>",
                "added_tokens_decoder": decoder_entries(made),
            }
        )
    )
    assert manifests.load(export_quietly(path, tmp_path / "a")).decoding.mask_token_id == made.token_to_id(
        "<|mask|>"
    )


def test_a_mask_that_nothing_names_can_be_given(tmp_path, capsys):
    path = tmp_path / "c"
    ids = _with_tokenizer(path, LIKE_ILLADA, {"eos_token": "<eos>"})
    mask = ids["<[MASK]>"]
    refused(path, tmp_path / "out", "is the mask: give it with --mask-token", f"<[MASK]> ({mask})")
    for i, given in enumerate(("<[MASK]>", str(mask))):
        out = tmp_path / f"a{i}"
        assert (
            cli.main(["--checkpoint", str(path), "--out", str(out), "--mask-token", given, "--verify", "no"])
            == 0
        )
        manifest = manifests.load(out)
        assert manifest.decoding.mask_token_id == mask == manifest.source["mask_token"]
    capsys.readouterr()
    for given, said in (
        ("<mask>", "is no token of"),
        ("99999", "the model has 0 to"),
        ("-3", "is no token of"),
        ("", "is no token of"),
        ("\udcff", "is no token of"),
        ("9" * 5000, "is no token of"),
    ):
        refused(path, tmp_path / "out", said, mask_token=given)
    refused(path, tmp_path / "out", "is also an end token", mask_token="<eos>")
    (path / "tokenizer.json").unlink()
    refused(path, tmp_path / "out", "is the mask: give it with --mask-token", mask_token=None)
    refused(
        path, tmp_path / "out", "has no tokenizer that knows it: give the token's id", mask_token="<[MASK]>"
    )
    refused(path, tmp_path / "out", "eos_token_id", "ends a text", mask_token=str(mask))


def test_two_masks_of_the_checkpoint_are_a_contradiction(tiny, tmp_path):
    path = tiny()
    other = path / "generation_config.json"
    for same in (126, [126]):
        other.write_text(json.dumps({"mask_token_id": same}))
        export_quietly(path, tmp_path / str(same))
    other.write_text(json.dumps({"mask_token_id": 124}))
    with pytest.raises(DllmError) as planned:
        facts_of_checkpoint(str(path), "bf16")
    refused(
        path, tmp_path / "out", str(planned.value), "is 126, generation_config.json says 124", "--mask-token"
    )
    assert (
        manifests.load(export_quietly(path, tmp_path / "given", mask_token="124")).decoding.mask_token_id
        == 124
    )


def test_end_tokens_that_come_twice_count_once(tiny, tmp_path):
    path = tiny()
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [125, 3, 125]}))
    assert manifests.load(export_quietly(path, tmp_path / "a")).decoding.eos_token_ids == (125, 3)


def test_a_mask_that_is_given_comes_before_the_checkpoints(tmp_path):
    path = tmp_path / "c"
    names = {"eos_token": "<eos>", "mask_token": "<|eot|>"}
    ids = _with_tokenizer(path, LIKE_ILLADA, names, mask_token_id=3)
    refused(path, tmp_path / "out", "its mask token is", "config.json says 3", "--mask-token")
    said = _noted(path, tmp_path / "a", mask_token="<[MASK]>")
    assert sum("as --mask-token says" in text and "is 3" in text for text in said) == 1
    assert manifests.load(tmp_path / "a").decoding.mask_token_id == ids["<[MASK]>"]
    assert not [text for text in _noted(path, tmp_path / "b", mask_token="3") if "--mask-token" in text]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_mask_that_was_given_travels_to_the_verification(dtype, tmp_path):
    pytest.importorskip("torch")
    from export.parity.verify import verify

    path = tmp_path / "c"
    _with_tokenizer(
        path, LIKE_ILLADA, {"eos_token": "<eos>", "mask_token": "<|eot|>"}, max_sequence_length=64
    )
    artifact = export_quietly(path, tmp_path / "a", mask_token="<[MASK]>", dtype=dtype)
    assert all(stage.passed for stage in verify(artifact))
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["source"]["mask_token"] = "<[MASK]>"
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DllmError, match=r"source.mask_token is '<.MASK.>', expected a token id"):
        list(verify(artifact))


def _diffucoder(path, **names):
    """A tiny Dream that pads answers with a token of its own."""
    special = [*DREAM_SPECIAL, "<|dlm_pad|>"]
    made = trained(special, tokenizer._QWEN2)
    ids = {text: made.token_to_id(text) for text in special}
    write_checkpoint(
        families.find("dream"),
        path,
        model={
            "vocab_size": made.get_vocab_size() + 8,
            "mask_token_id": ids["<|mask|>"],
            "eos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
    )
    made.model.save(str(path))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|dlm_pad|>",
                "mask_token": "<|mask|>",
                "added_tokens_decoder": decoder_entries(made),
            }
            | names
        )
    )
    return ids


def test_a_pad_token_of_its_own_ends_an_answer(tmp_path, capsys):
    path = tmp_path / "c"
    ids = _diffucoder(path)
    head, pad = "lm_head.weight", ids["<|dlm_pad|>"]
    artifact = export_quietly(path, tmp_path / "a", head="logits")
    decoding = manifests.load(artifact).decoding
    assert (
        decoding.eos_token_ids == (ids["<|endoftext|>"], pad)
        and decoding.pad_token_id == ids["<|endoftext|>"]
    )
    assert main(["info", str(artifact)]) == 0
    assert f"end {ids['<|endoftext|>']}, {pad}," in capsys.readouterr().out
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = np.ones_like(tensors["model.norm.weight"])
    tensors["model.embed_tokens.weight"][:] = (
        1.0  # every row is the same, so every position proposes the same token: padding
    )
    tensors[head] = np.zeros_like(tensors[head])
    for name in [n for n in tensors if n.endswith(("o_proj.weight", "down_proj.weight"))]:
        tensors[name][:] = 0
    tensors[head][pad] = 1.0
    save_file(tensors, path / "model.safetensors")
    model = rt.load(export_quietly(path, tmp_path / "b"), threads=1)
    (result,) = model.generate([[5, 6, 7]], rt.GenerationConfig(gen_length=32, block_length=8))
    assert result.num_useful == 0 and result.text == "" and result.nfe < 9  # it stops behind the first block


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        ({"pad_token": "<|endoftext|>"}, []),
        ({"pad_token": "<|mask|>"}, []),
        ({"pad_token": None}, []),
        ({"pad_token": "!"}, []),
        ({"pad_token": "<|nowhere|>"}, []),
        ({"pad_token": {"content": "<|dlm_pad|>"}}, ["<|dlm_pad|>"]),
        ({"pad_token": "<|im_end|>"}, ["<|im_end|>"]),
    ],
)
def test_only_a_pad_token_of_its_own_ends_an_answer(names, ends, tmp_path):
    ids = _diffucoder(tmp_path / "c", **names)
    decoding = manifests.load(export_quietly(tmp_path / "c", tmp_path / "a")).decoding
    assert decoding.eos_token_ids == (ids["<|endoftext|>"], *(ids[text] for text in ends))


def test_a_pad_id_of_the_config_ends_an_answer_where_it_is_an_added_token(tmp_path):
    ids = _diffucoder(tmp_path / "c", pad_token=None)
    for pad, ends in ((ids["<|dlm_pad|>"], (ids["<|dlm_pad|>"],)), (0, ())):
        config = json.loads((tmp_path / "c" / "config.json").read_text())
        (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
        decoding = manifests.load(export_quietly(tmp_path / "c", tmp_path / f"a{pad}")).decoding
        assert decoding.eos_token_ids == (ids["<|endoftext|>"], *ends) and decoding.pad_token_id == pad


def test_the_demo_model_ends_as_before(demo_artifact):
    decoding = manifests.load(demo_artifact).decoding
    assert (decoding.mask_token_id, decoding.eos_token_ids, decoding.pad_token_id) == (1, (0,), 0)
    assert "mask_token" not in manifests.load(demo_artifact).source
