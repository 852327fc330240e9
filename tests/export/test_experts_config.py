"""config.json of models with experts: what is not implemented is refused, absent keys, how a family is found,
and damaged or missing tensors of experts."""

from __future__ import annotations

import numpy as np
import pytest
from places import export_quietly, refused
from tiny import ABSENT, write_checkpoint

from export import families
from export.families.base import ConfigReader
from trt_runtime.errors import DllmError


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llada2", {"use_bias": ABSENT}, "use_bias is missing, for which the model's own code takes True"),
        ("llada2", {"n_group": 3}, "8 experts in 3 groups"),
        ("llada2", {"n_group": 8}, "groups of 1 expert"),
        ("llada2", {"num_experts_per_tok": 5}, "5 experts for each row, of 4"),
        ("llada2", {"rotary_dim": 4}, "rotary_dim is 4"),
        ("llada2", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ("llada2", {"score_function": "softmax"}, "score_function is 'softmax'"),
        ("llada_moe", {"moe_layer_freq": [1, 2, 1]}, "moe_layer_freq is [1, 2, 1]"),
        ("llada_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size is 8"),
        ("llada_moe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("llada_moe", {"num_experts_per_tok": 9}, "9 experts for each row"),
        ("rnd1", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("rnd1", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("sdar_moe", {"mlp_only_layers": [1]}, "mlp_only_layers is [1]"),
        ("llada2", {"use_qk_norm": False}, "use_qk_norm is False"),
        (
            "llada2",
            {"first_k_dense_replace": -1},
            "first_k_dense_replace is -1, expected a whole number from 0",
        ),
        ("llada2", {"num_shared_experts": -1}, "num_shared_experts is -1, expected a whole number from 0"),
        ("llada2", {"shared_expert_intermediate_size": 8}, "names a part of the network"),
        ("llada2", {"n_group": ABSENT}, "groups of 1 expert"),
        ("llada2", {"topk_group": ABSENT}, "2 groups, of which 4 are chosen"),
        ("llada_moe", {"partial_rotary_factor": ABSENT}, "partial_rotary_factor is missing"),
        ("sdar_moe", {"norm_topk_prob": ABSENT}, "norm_topk_prob is missing, for which"),
        ("rnd1", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, name, change, said):
    path = write_checkpoint(families.find(name), tmp_path / "checkpoint", config=change)
    options = {"block_length": 4} if name == "sdar_moe" else {}
    refused(path, tmp_path / "out", said, **({} if name == "sdar_moe" else options))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llada2", "n_group", 8),
        ("llada2", "topk_group", 4),
        ("llada2", "routed_scaling_factor", 2.5),
        ("llada2", "partial_rotary_factor", 0.5),
        ("llada2", "num_shared_experts", 0),
        ("llada2", "first_k_dense_replace", 0),
        ("llada2", "head_dim", 12),
        ("rnd1", "norm_topk_prob", True),
        ("rnd1", "head_dim", 128),
    ],
)
def test_an_absent_key_has_the_value_of_the_official_class(name, key, value):
    family = families.find(name)
    config = {**family.tiny_config(), "num_experts": 16, "n_group": 8, "topk_group": 4, key: value}
    if name != "llada2":
        config = {**family.tiny_config(), key: value}
    absent = {other: kept for other, kept in config.items() if other != key}
    read, expected = (family.decoder(ConfigReader(each, "config.json")) for each in (absent, config))
    assert read == expected
    if name == "llada2" and key not in ("num_shared_experts", "first_k_dense_replace"):  # it says something
        other = {"n_group": 4, "topk_group": 2, "head_dim": 16}.get(key, 1.0)
        assert family.decoder(ConfigReader({**config, key: other}, "config.json")) != expected


def test_a_plain_rope_scaling_is_none(tmp_path):
    for spelling in (False, None, {"rope_type": "default"}):
        path = write_checkpoint(
            families.find("rnd1"), tmp_path / str(spelling)[:5], config={"rope_scaling": spelling}
        )
        export_quietly(path, tmp_path / "out" / str(spelling)[:5])


@pytest.mark.parametrize("damage", [np.nan, np.inf, 1e6])
def test_the_damaged_expert_is_named(tmp_path, damage):
    """Several tensors make up one weight."""

    def change(tensors):
        tensors["model.layers.1.mlp.experts.3.gate_proj.weight"][2, 3] = damage

    path = write_checkpoint(families.find("rnd1"), tmp_path / "checkpoint", change=change)
    said = "has the value 1e+06" if damage == 1e6 else "has NaN or infinite values"
    refused(path, tmp_path / "out", f"model.layers.1.mlp.experts.3.gate_proj.weight: {said}", dtype="fp16")


def test_a_family_is_found_by_its_class_and_by_its_other_names():
    """LLaDA-MoE's model type is that of the dense model."""
    moe = families.find("llada_moe").tiny_config()
    assert families.of(moe)[0] == "llada_moe" and moe["model_type"] == "llada"
    assert families.of({"model_type": "llada", "architectures": ["LLaDAModelLM"]})[0] == "llada"
    # without its class: by a key that the dense network has not
    assert families.of({"model_type": "llada", "num_experts": 64})[0] == "llada_moe"
    assert families.of({"model_type": "LLaDA", "num_experts": None})[0] == "llada"
    for other, name in (("lladamoe", "llada_moe"), ("llada2_moe", "llada2"), ("llada2_moe_veomni", "llada2")):
        assert families.of({"model_type": other})[0] == name
    with pytest.raises(DllmError, match="llada2, llada_moe"):
        families.of({"model_type": "llada3"})


def test_a_tensor_of_another_expert_count_or_width_is_refused(tmp_path):
    def drop(tensors):
        del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]

    def widen(tensors):
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
        tensors[name] = np.concatenate([tensors[name], tensors[name]], 1)

    for change, said in (
        (drop, "1 tensors are missing: model.layers.1.mlp.experts.7.up_proj.weight"),
        (widen, "experts.3.down_proj.weight has shape [48, 48], config.json asks for [48, 24]"),
    ):
        path = tmp_path / change.__name__
        write_checkpoint(families.find("rnd1"), path, change=change)
        refused(path, tmp_path / "out", said)
