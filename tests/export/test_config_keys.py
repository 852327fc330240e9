"""Keys of config.json that compute nothing, and tokens that config.json does not name."""

from __future__ import annotations

import pytest
from exports import notes_of
from places import export_quietly, refused
from tiny import ABSENT, write_checkpoint

from export import families
from export.pipeline import facts_of_checkpoint
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


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_keys_that_compute_nothing_are_ignored_and_noted_once(family, tmp_path):
    plain = write_checkpoint(families.find(family), tmp_path / "plain")
    path = write_checkpoint(families.find(family), tmp_path / "c", config=HARMLESS)
    said = [text for text in notes_of(path, tmp_path / "a") if "ignored" in text]
    assert len(said) == 1
    listed = said[0].partition("computes: ")[2].split(", ")
    assert set(listed) == set(HARMLESS) - SAID_NOTHING_OF
    assert not [text for text in notes_of(plain, tmp_path / "b") if "ignored" in text]
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
    assert notes_of(path, tmp_path / "a", ignored_keys=("one", "two words", "_comment"))
    assert facts_of_checkpoint(str(path), "bf16", ("one", "two words")).num_layers == 3


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("rope", "rope is missing, for which the model's own code takes False"),
        ("activation_type", "activation_type is missing, for which the model's own code takes 'swiglu'"),
        ("layer_norm_type", "layer_norm_type is missing, for which the model's own code takes 'default'"),
        ("weight_tying", "model.transformer.ff_out.weight"),
    ],
)
def test_a_key_that_lladas_class_would_fill_with_another_value_must_be_there(tmp_path, key, said):
    """Its defaults are those of another network: no RoPE, LayerNorm, a fused activation, a tied head."""
    path = write_checkpoint(families.find("llada"), tmp_path / "checkpoint", config={key: ABSENT})
    refused(path, tmp_path / "out", said)


def test_a_key_that_names_a_part_of_the_network_is_not_to_be_ignored(tmp_path):
    for number, (key, value) in enumerate(
        {"layer_types": ["sliding_attention"] * 3, "logits_scaling": 2.0, "num_local_experts": 4}.items()
    ):
        path = write_checkpoint(families.find("dream"), tmp_path / str(number), config={key: value})
        with pytest.raises(DllmError, match=f"{key} names a part of the network") as error:
            export_quietly(path, tmp_path / "out")
        assert "--ignore-key" not in str(error.value)
