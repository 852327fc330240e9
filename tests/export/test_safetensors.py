"""Which safetensors files are taken, whose names tensors have, and headers that lie."""

from __future__ import annotations

import json
import random
import shutil
import struct

import numpy as np
import pytest
from places import refused
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from tiny import random_tensors, write_checkpoint

from export import families
from export.checkpoint import huggingface as checkpoint
from export.pipeline import ExportConfig, export
from trt_runtime.artifact import manifest as manifests
from trt_runtime.errors import DllmError

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
    assert noted[0] == f"the weights are those of {SINGLE}, as in transformers; {INDEX} beside it is not read"
    assert "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors: not read" in noted[1]
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
    refused(path, tmp_path / "out", "3 of the 3 shards", "there: none")


def test_files_that_the_index_does_not_list_are_not_read_and_noted(tiny, tmp_path):
    whole, _ = _export(tiny("one"), tmp_path / "a")
    path = tiny(shards=2)
    save_file({"anything": np.zeros(3, np.int8)}, path / "consolidated.safetensors")
    taken, noted = _export(path, tmp_path / "b")
    assert taken == whole and noted == [
        f"consolidated.safetensors: not read, the weights are those of {INDEX}"
    ]


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
    refused(path, tmp_path / "out", "comes twice, with different values")
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
        (lambda n: "module." + n, "carry the prefix 'module.'"),
        (lambda n: "base_model.model." + n, "carry the prefix 'base_model.model.'"),
        (lambda n: "_orig_mod." + n, "carry the prefix '_orig_mod.'"),
        (lambda n: "student." + n, "carry the prefix 'student.'"),
        (lambda n: n.removeprefix("model."), "lack the prefix 'model.'"),
        (lambda n: n.replace("model.", "net.", 1), "begin with 'net.' in place of 'model.'"),
        (lambda n: n.replace(".1.", ".1._orig_mod.").replace(".2.", ".2._orig_mod."), "_orig_mod."),
        (
            lambda n: "_fsdp_wrapped_module." + n.replace(".0.", ".0._fsdp_wrapped_module."),
            "carry '_fsdp_wrapped_module.', of a wrapper",
        ),
    ],
)
def test_names_under_a_prefix_are_said_to_be(family, change, said, tmp_path):
    path = write_checkpoint(families.find(family), tmp_path / "c")
    tensors = load_file(path / SINGLE)
    save_file({change(name): tensor for name, tensor in tensors.items()}, path / SINGLE)
    refused(path, tmp_path / "out", said, f"all {len(tensors)} tensors fit but for that", "save_file")
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
        "adapter_config.json is of an adapter",
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
        "9 tensors are of an adapter (LoRA) that is not merged",
        "merge_and_unload",
    )


def _parts(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


BASE = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]},
}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (
            {**BASE, "b": {**BASE["b"], "data_offsets": [28, 36]}},
            "4 bytes between a and b belong to no tensor",
        ),
        ({**BASE, "b": {**BASE["b"], "data_offsets": [20, 28]}}, "overlap"),
        ({"a": BASE["a"]}, "16 bytes between a and the end of the file belong to no tensor"),
        ({**BASE, "b": {**BASE["b"], "shape": [-1, -2]}}, "has the shape [-1, -2]"),
        ({**BASE, "b": {**BASE["b"], "shape": [2.0]}}, "has the shape [2.0]"),
        ({**BASE, "b": {**BASE["b"], "shape": ["2"]}}, "has the shape ['2']"),
        ({**BASE, "b": {**BASE["b"], "shape": [True, 2]}}, "has the shape [True, 2]"),
        ({**BASE, "b": {**BASE["b"], "shape": [2] + [1] * 500}}, "has the shape [2, 1, 1"),
        ({**BASE, "b": {**BASE["b"], "shape": [10**400]}}, "has the shape [1000"),
        ({**BASE, "b": {**BASE["b"], "data_offsets": [24, 10**30]}}, "at [24, 1000"),
        ({**BASE, "b": {**BASE["b"], "data_offsets": [1 << 62, (1 << 62) + 8]}}, "cut short"),
        ({**BASE, "b": {**BASE["b"], "data_offsets": [-8, 0]}}, "at [-8, 0]"),
        ({**BASE, "b": {**BASE["b"], "data_offsets": [32, 24]}}, "bytes for shape"),
        ({**BASE, "b": {**BASE["b"], "data_offsets": [24]}}, "damaged"),
        ({**BASE, "b": {**BASE["b"], "dtype": "F16"}}, "has 8 bytes for shape [2]"),
        ({**BASE, "b": {**BASE["b"], "dtype": ["F32"]}}, "damaged"),
        ({**BASE, "b": {**BASE["b"], "dtype": "F32\nrun this"}}, "is F32\\nrun this, supported are"),
        ({"a": BASE["a"], "b\nerror: none": BASE["b"]}, "a tensor is called"),
        ({**BASE, "b": None}, "damaged"),
        ([BASE], "damaged"),
        ({**BASE, "b": [1]}, "damaged"),
        (
            b'{"a": ' + json.dumps(BASE["a"]).encode() + b', "a": ' + json.dumps(BASE["b"]).encode() + b"}",
            "the key 'a' comes twice",
        ),
        (
            json.dumps(BASE)
            .replace('"dtype": "F32", "shape": [2]', '"dtype": "F32", "dtype": "F32", "shape": [2]')
            .encode(),
            "comes twice",
        ),
        (json.dumps(BASE).encode("utf-16"), "damaged"),
        (b"\xff" + json.dumps(BASE).encode(), "damaged"),
        (b"[" * 100_000, "damaged"),
    ],
)
def test_a_header_that_lies_is_one_clear_line(header, said, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(_join(header, bytes(40)))
    with pytest.raises(DllmError) as error:
        checkpoint._header(file)
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


def _mutated(rng, header, data):
    """A file with one to three random lies."""
    header = json.loads(json.dumps(header))
    numbers = [0, 1, -1, 2, 7, 8, 24, 64, 1 << 31, 1 << 63, 1 << 64, 10**25, 2.5, "4", None, True]
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([n for n in header if isinstance(header[n], dict) and n != "__metadata__"])
        entry, kind = header[name], rng.randrange(8)
        if kind == 0:
            entry["shape"] = [
                rng.choice([*numbers, *(entry.get("shape") or [])]) for _ in range(rng.randint(0, 4))
            ]
        elif kind == 1:
            entry["data_offsets"] = [
                rng.choice([*numbers, len(data)]) for _ in range(rng.choice([1, 2, 2, 2, 3]))
            ]
        elif kind == 2:
            entry["dtype"] = rng.choice(["F16", "F64", "I8", "BF16", "F32", "", 7, None, "f32"])
        elif kind == 3:
            entry.pop(rng.choice(["dtype", "shape", "data_offsets"]), None)
        elif kind == 4:
            header[name + "'"] = rng.choice([dict(entry), None, [], 3])
        elif kind == 5 and len(header) > 2:
            del header[name]
        elif kind == 6:
            data = data[: rng.randrange(len(data))] if rng.random() < 0.5 else data + bytes(rng.randint(1, 9))
        else:
            header[name] = dict(rng.sample(list(entry.items()), len(entry))) | {"more": 1}
    text = bytearray(json.dumps(header).encode() + b" " * rng.randint(0, 9))
    if rng.random() < 0.3:
        text[rng.randrange(len(text))] = rng.randrange(256)
    return _join(bytes(text), data)


def test_no_lie_is_believed_that_safetensors_refuses(tmp_path):
    """1,500 damaged files: one clear line, or the tensors that the safetensors package reads from it too."""
    path, rng = tmp_path / "x.safetensors", random.Random(0)
    good = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(4, np.float16),
        "c": np.ones((1, 2), np.float32),
    }
    save_file(good, path, metadata={"format": "pt"})
    header, data = _parts(path)
    taken = 0
    for _ in range(1500):
        path.write_bytes(_mutated(rng, header, data))
        try:
            held = checkpoint._header(path)
        except DllmError as error:
            assert "\n" not in str(error)
            continue
        taken += 1
        try:
            with safe_open(path, "np") as theirs:
                assert sorted(theirs.keys()) == sorted(held)
                for name, stored in held.items():
                    if stored.size and stored.dtype.name != "bfloat16":
                        assert theirs.get_tensor(name).tobytes() == stored.open().tobytes()
        except SafetensorError as error:
            raise AssertionError(
                f"taken, and refused by safetensors: {error}: {path.read_bytes()[:600]!r}"
            ) from error
    assert 20 < taken < 700
