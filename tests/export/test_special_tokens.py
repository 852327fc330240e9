"""Special tokens that config.json, generation_config.json or only the tokenizer name: the mask, end tokens,
padding."""

from __future__ import annotations

import json

import numpy as np
import pytest
from exports import notes_of
from places import export_quietly, refused
from tiny import write_checkpoint
from trained_tokenizers import DREAM_SPECIAL, decoder_entries, trained

import trt_runtime as rt
from export import cli, families
from export.checkpoint import tokenizer
from export.pipeline import facts_of_checkpoint
from trt_runtime.artifact import manifest as manifests
from trt_runtime.cli.main import main
from trt_runtime.errors import DllmError


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
    said = notes_of(path, tmp_path / "a")
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
        ("<mask>", "not a token of"),
        ("99999", "expected 0 to"),
        ("-3", "not a token of"),
        ("", "not a token of"),
        ("\udcff", "not a token of"),
        ("9" * 5000, "not a token of"),
    ):
        refused(path, tmp_path / "out", said, mask_token=given)
    refused(path, tmp_path / "out", "is also an end token", mask_token="<eos>")
    (path / "tokenizer.json").unlink()
    refused(path, tmp_path / "out", "is the mask: give it with --mask-token", mask_token=None)
    refused(
        path,
        tmp_path / "out",
        "has no tokenizer to look it up in: give the token's id",
        mask_token="<[MASK]>",
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
    said = notes_of(path, tmp_path / "a", mask_token="<[MASK]>")
    assert sum("as --mask-token says" in text and "is 3" in text for text in said) == 1
    assert manifests.load(tmp_path / "a").decoding.mask_token_id == ids["<[MASK]>"]
    assert not [text for text in notes_of(path, tmp_path / "b", mask_token="3") if "--mask-token" in text]


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
