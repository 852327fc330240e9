"""Which safetensors files are taken, whose names tensors have, and headers that lie."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from places import refused
from safetensors.numpy import load_file, save_file
from tiny import random_tensors, write_checkpoint

from export import families
from export.checkpoint import huggingface as checkpoint
from export.pipeline import ExportConfig, export
from trt_runtime.artifact import manifest as manifests

LLADA = families.find("llada")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _export(path, out):
    """The artifact's weights, and what the export noted."""
    said: list[str] = []
    export(ExportConfig(str(path), out), lambda total: lambda done: None, said.append)
    return manifests.load(out).files["weights.data"], [text for text in said if "tokenizer" not in text]


def test_a_single_file_comes_before_an_index_as_in_transformers(tiny, tmp_path):
    """Beside whole shards of other weights, and beside an index whose shards are not there."""
    other = random_tensors(LLADA, LLADA.tiny_config(), seed=1)
    alone, noted = _export(tiny("alone", change=lambda t: t.update(other)), tmp_path / "alone-out")
    assert not noted
    both = tiny("both", shards=2)
    save_file(other, both / SINGLE)
    taken, noted = _export(both, tmp_path / "both-out")
    assert taken == alone and len(noted) == 2
    assert noted[0] == f"read the weights from {SINGLE}, as transformers does; {INDEX} is ignored"
    assert "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors: ignored" in noted[1]
    for shard in both.glob("model-0*"):
        shard.unlink()
    taken, noted = _export(both, tmp_path / "stale-out")
    assert taken == alone and len(noted) == 1
    (both / INDEX).write_text("not even JSON")
    assert _export(both, tmp_path / "broken-out")[0] == alone


def test_transformers_takes_the_same_file(tmp_path):
    """Its own choice, on a model of its own: model.safetensors beside an index and shards of other
    weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert (tmp_path / INDEX).is_file() and not (tmp_path / SINGLE).is_file()
    tensors = {name: np.full(tensor.shape, 7, np.float32) for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    held, notes = checkpoint._tensors(tmp_path)
    assert (
        float(loaded.model.norm.weight[0].detach()) == 7 == held["model.norm.weight"].open()[0]
        and len(notes) == 2
    )


def test_a_stale_index_says_what_is_missing_and_what_is_there(tiny, tmp_path):
    path = tiny(shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    (path / "model-00003-of-00003.safetensors").rename(path / "consolidated.safetensors")
    refused(
        path,
        tmp_path / "out",
        "model-00002-of-00003.safetensors: missing",
        "2 of the 3 shards",
        "stale",
        "consolidated.safetensors, model-00001-of-00003.safetensors",
    )
    for file in path.glob("model-0*"):
        file.unlink()
    (path / "consolidated.safetensors").unlink()
    refused(path, tmp_path / "out", "3 of the 3 shards", "present: none")


def test_files_that_the_index_does_not_list_are_not_read_and_noted(tiny, tmp_path):
    whole, _ = _export(tiny("one"), tmp_path / "a")
    path = tiny(shards=2)
    save_file({"anything": np.zeros(3, np.int8)}, path / "consolidated.safetensors")
    taken, noted = _export(path, tmp_path / "b")
    assert taken == whole and noted == [f"consolidated.safetensors: ignored, the weights come from {INDEX}"]


def test_an_index_that_contradicts_itself_is_refused(tiny, tmp_path):
    path = tiny(shards=2)
    listed = json.loads((path / INDEX).read_text())["weight_map"]
    name, shard = next(iter(listed.items()))
    rows = [f"{json.dumps(n)}: {json.dumps(s)}" for n, s in listed.items()]
    (path / INDEX).write_text('{"weight_map": {' + ", ".join([*rows, f'"{name}": "{shard}"']) + "}}")
    _export(path, tmp_path / "same")  # twice the same is no contradiction
    (path / INDEX).write_text(
        '{"weight_map": {' + ", ".join([*rows, f'"{name}": "model-00002-of-00002.safetensors"']) + "}}"
    )
    refused(path, tmp_path / "out", "repeated with different values")
    shutil.copyfile(path / shard, path / "model-00003-of-00003.safetensors")
    (path / INDEX).write_text(
        json.dumps({"weight_map": {**listed, "more": "model-00003-of-00003.safetensors"}})
    )
    refused(path, tmp_path / "out", "model-00003-of-00003.safetensors: ", "disagree on")


def test_other_safetensors_alone_are_named(tiny, tmp_path):
    path = tiny(shards=2)
    (path / INDEX).unlink()
    refused(
        path,
        tmp_path / "out",
        "neither model.safetensors nor",
        "there are model-00001-of-00002.safetensors",
        "index",
    )


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda n: "module." + n, "have the prefix 'module.'"),
        (lambda n: "base_model.model." + n, "have the prefix 'base_model.model.'"),
        (lambda n: "_orig_mod." + n, "have the prefix '_orig_mod.'"),
        (lambda n: "student." + n, "have the prefix 'student.'"),
        (lambda n: n.removeprefix("model."), "lack the prefix 'model.'"),
        (lambda n: n.replace("model.", "net.", 1), "begin with 'net.' in place of 'model.'"),
        (lambda n: n.replace(".1.", ".1._orig_mod.").replace(".2.", ".2._orig_mod."), "_orig_mod."),
        (
            lambda n: "_fsdp_wrapped_module." + n.replace(".0.", ".0._fsdp_wrapped_module."),
            "contain '_fsdp_wrapped_module.', added by a wrapper",
        ),
    ],
)
def test_names_under_a_prefix_are_said_to_be(family, change, said, tmp_path):
    path = write_checkpoint(families.find(family), tmp_path / "c")
    tensors = load_file(path / SINGLE)
    save_file({change(name): tensor for name, tensor in tensors.items()}, path / SINGLE)
    refused(path, tmp_path / "out", said, f"otherwise all {len(tensors)} tensors match", "save_file")
    first = next(iter(tensors))
    save_file(
        {change(name): tensor for name, tensor in tensors.items() if name != first}
        | {"odd": np.zeros(2, np.float32)},
        path / SINGLE,
    )
    refused(path, tmp_path / "out", said, "1 tensors are missing and 1 are not part", first, "odd")


def test_a_prefix_is_not_blamed_for_other_faults(tiny, tmp_path):
    path = tiny(
        change=lambda t: t.update(
            {"foo." + n: t.pop(n) for n in [*t] if n.endswith("wte.weight")}, bar=np.zeros(1, np.float32)
        )
    )
    refused(path, tmp_path / "out", "'foo.'", "1 are not part")
    path = tiny(
        "other",
        change=lambda t: t.update({n.replace("q_proj", "query"): t.pop(n) for n in [*t] if "q_proj" in n}),
    )
    refused(path, tmp_path / "out", "3 tensors are missing", "download the checkpoint again")


def test_adapters_have_to_be_merged_first(tiny, tmp_path):
    """An adapter alone, one beside its base model (transformers would apply it), and weights in which it is
    still apart."""
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Base"}'
    )
    save_file(
        {"base_model.model.q.lora_A.weight": np.zeros(2, np.float32)}, alone / "adapter_model.safetensors"
    )
    refused(
        alone,
        tmp_path / "out",
        "adapter_config.json belongs to an adapter",
        "PeftModel.from_pretrained",
        "merge_and_unload()",
    )
    path = tiny()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(alone / name, path / name)
    refused(
        path,
        tmp_path / "out",
        "merge_and_unload",
        "or move adapter_config.json and adapter_model.safetensors elsewhere",
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (path / name).unlink()

    def apart(tensors):
        for name in [n for n in tensors if "q_proj" in n]:
            stem = "base_model.model." + name.removesuffix(".weight")
            tensors |= {
                f"{stem}.base_layer.weight": tensors.pop(name),
                f"{stem}.lora_A.default.weight": np.zeros((2, 64), np.float32),
                f"{stem}.lora_B.default.weight": np.zeros((64, 2), np.float32),
            }

    refused(
        tiny("apart", change=apart),
        tmp_path / "out",
        "9 tensors belong to an adapter (LoRA) that is not merged",
        "merge_and_unload",
    )
