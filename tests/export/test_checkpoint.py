"""Bad checkpoints and bad configs: each one clear line that names the file, key or tensor, and nothing left
behind."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
from places import DEMO, ROOT, export_quietly, refused

from export import cli, families
from export.checkpoint import huggingface as checkpoint
from trt_runtime.artifact import manifest as manifests
from trt_runtime.errors import DllmError

LLADA = families.find("llada")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "lada"}, ("unknown model type 'lada'", "did you mean 'llada'")),
        ({"model_type": None}, ("model_type is None", "llada")),
        ({"block_type": "sequential"}, ("block_type is 'sequential'", "supported is 'llama'")),
        ({"activation_type": "gelu"}, ("activation_type is 'gelu'",)),
        ({"include_bias": True}, ("include_bias is True",)),
        ({"alibi": True}, ("alibi is True",)),
        ({"scale_logits": True}, ("scale_logits is True",)),
        ({"layer_norm_type": "default"}, ("layer_norm_type is 'default'",)),
        ({"rope_theta": None}, ("rope_theta is missing",)),
        ({"rope_theta": "big"}, ("rope_theta is 'big'", "expected float")),
        ({"rope_theta": 1e-320}, ("rope_theta is", "expected 1 or more")),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 500000.0}}, ("rope_type is 'yarn'",)),
        (
            {"rope_parameters": {"rope_theta": 500000.0, "factor": 2}},
            ("rope_parameters: factor is not implemented",),
        ),
        (
            {"rope_parameters": {"rope_theta": 10000.0}},
            ("rope_theta is 500000.0, rope_parameters say 10000",),
        ),
        ({"n_layers": 1 << 30}, ("layers, supported are up to",)),
        ({"max_sequence_length": 1 << 30}, ("positions, supported are up to",)),
        ({"embedding_size": 2, "vocab_size": 2}, ("a vocabulary of 2",)),
        ({"rope_theta": -1.0}, ("rope_theta is -1.0, expected a number above 0",)),
        ({"rope_theta": 10**400}, ("rope_theta is", "expected a number above 0")),
        ({"rms_norm_eps": float("nan")}, ("rms_norm_eps is nan",)),
        ({"max_sequence_length": 10**15}, ("max_sequence_length is",)),
        ({"eos_token_id": 126}, ("mask_token_id 126 is also an end token",)),
        ({"mask_token_id": [5, 6]}, ("mask_token_id is [5, 6], expected one",)),
        ({"strange": 0}, ("strange = 0", "--ignore-key strange")),
        ({"bidirectional": False}, ("bidirectional = False", "--ignore-key")),
        ({"n_layers": 0}, ("n_layers is 0",)),
        ({"n_heads": 5}, ("5 heads",)),
        ({"n_kv_heads": 3}, ("3 KV heads",)),
        ({"mask_token_id": 4000}, ("token id 4000 is outside the vocabulary of 128",)),
        ({"eos_token_id": "end"}, ("eos_token_id is 'end'",)),
        ({"quantization_config": {"bits": 4}}, ("quantization_config", "--ignore-key")),
        ({"n_layers": 4}, ("9 tensors are missing", "blocks.3.attn_norm")),
        ({"n_layers": 2}, ("9 tensors are not part of a LLaDA", "blocks.2")),
        ({"mlp_hidden_size": 80}, ("ff_proj.weight has shape [96, 64]", "asks for [80, 64]")),
    ],
)
def test_configs_that_do_not_fit_are_refused(tiny, tmp_path, change, said):
    refused(tiny(config=change), tmp_path / "out", *said)


def test_an_unknown_key_can_be_ignored_on_request(tiny, tmp_path):
    path = tiny(config={"my_note": "harmless"})
    refused(path, tmp_path / "out", "my_note = 'harmless'")
    assert export_quietly(path, tmp_path / "out", ignored_keys=("my_note",)).is_dir()
    refused(path, tmp_path / "other", "has no key typo", ignored_keys=("my_note", "typo"))


def test_an_ignored_key_travels_to_the_verification(tiny, tmp_path):
    pytest.importorskip("torch")
    from export.parity.verify import verify

    artifact = export_quietly(
        tiny(config={"my_note": "x"}), tmp_path / "out", ignored_keys=("my_note",), dtype="bf16"
    )
    assert all(stage.passed for stage in verify(artifact))


def test_a_damaged_tokenizer_is_refused_at_export(tiny, tmp_path):
    path = tiny()
    (path / "tokenizer.json").write_text("{}")
    refused(path, tmp_path / "out", "tokenizer.json: not readable")
    shutil.copyfile(DEMO / "tokenizer.json", path / "tokenizer.json")
    (path / "tokenizer_config.json").write_text("[1]")
    refused(path, tmp_path / "out", "tokenizer_config.json: contains a list")


def test_generation_config_is_checked(tiny, tmp_path):
    path = tiny()
    (path / "generation_config.json").write_text(json.dumps({"gen_length": "abc"}))
    refused(path, tmp_path / "out", "gen_length is 'abc'")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": None, "gen_length": 40}))
    manifest = manifests.load(export_quietly(path, tmp_path / "out"))
    assert manifest.decoding.eos_token_ids == (125,) and manifest.decoding.defaults == {"gen_length": 40}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop("model.transformer.blocks.1.up_proj.weight"),
            ("1 tensors are missing", "blocks.1.up_proj"),
        ),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), ("1 tensors are not part", "extra")),
        (
            lambda t: t.update({"model.transformer.ln_f.weight": np.zeros(3, np.float32)}),
            ("ln_f.weight has shape [3]",),
        ),
        (
            lambda t: t.update({"model.transformer.ln_f.weight": np.zeros(64, np.int8)}),
            ("is I8", "supported are F32"),
        ),
    ],
)
def test_tensors_are_accounted_for_one_by_one(tiny, tmp_path, change, said):
    refused(tiny(change=change), tmp_path / "out", *said)


def test_files_that_are_missing_or_damaged(tiny, tmp_path):
    out = tmp_path / "out"
    refused(tmp_path / "nowhere", out, "no such directory", "hub id")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", out, "config.json: missing")
    no_config = tiny("no-json")
    (no_config / "config.json").write_text("{")
    refused(no_config, out, "config.json: not JSON")
    pickled = tiny("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(pickled, out, "pytorch_model.bin is a pickle", "convert")
    cut = tiny("cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-100])
    refused(cut, out, "cut short", "download it again")
    for damage in (b"", b"12345678", struct.pack("<Q", 1 << 60) + data[8:], data[:8] + b"}" + data[9:]):
        (cut / "model.safetensors").write_bytes(damage)
        refused(cut, out, "download it again")
    lies = tiny("lies")
    header = data[8 : 8 + struct.unpack("<Q", data[:8])[0]].replace(b"[64]", b"[65]")
    (lies / "model.safetensors").write_bytes(data[:8] + header + data[8 + len(header) :])
    refused(lies, out, "bytes, but its shape [65]")


def test_shards(tiny, tmp_path):
    """A sharded checkpoint exports like a single file; a cut or missing shard and a false index are
    refused."""
    single, sharded = tiny("single"), tiny("sharded", shards=3)
    assert (
        manifests.load(export_quietly(single, tmp_path / "a")).files["weights.data"]
        == manifests.load(export_quietly(sharded, tmp_path / "b")).files["weights.data"]
    )
    shard = sharded / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    refused(sharded, tmp_path / "out", "model-00002-of-00003.safetensors: cut short")
    shard.unlink()
    refused(sharded, tmp_path / "out", "model-00002-of-00003.safetensors: missing")
    shard.write_bytes(data)
    index = sharded / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    name = next(iter(listed["weight_map"]))
    for change, said in (
        (lambda m: m.pop(name), "disagree"),
        (lambda m: m.update(ghost=shard.name), "disagree on ghost"),
        (lambda m: m.update({name: "../outside.safetensors"}), "not a bare file name"),
    ):
        changed = json.loads(json.dumps(listed))
        change(changed["weight_map"])
        index.write_text(json.dumps(changed))
        refused(sharded, tmp_path / "out", said)
    index.write_text(json.dumps({"weight_map": {"a": ["x"], "b": 1}}))
    refused(sharded, tmp_path / "out", "not a bare file name")
    index.write_text("{}")
    refused(sharded, tmp_path / "out", "has no weight_map")


def test_tied_head_and_grouped_heads(tiny, tmp_path):
    """A tied LLaDA has no head tensor; n_kv_heads below n_heads shrinks the caches. Both agree with the
    reference."""
    from export.parity.verify import verify

    pytest.importorskip("torch")
    path = tiny(model={"weight_tying": True, "n_kv_heads": 2})
    assert "model.transformer.ff_out.weight" not in checkpoint.load(path).tensors
    artifact = export_quietly(path, tmp_path / "out")
    assert manifests.load(artifact).model.num_kv_heads == 2
    assert [stage.passed for stage in verify(artifact)] == [True] * 5


def test_overlapping_tensors_and_odd_shard_names_are_refused(tiny, tmp_path):
    path = tiny()
    data = (path / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    first, second = (n for n in header if n.endswith(("blocks.0.k_proj.weight", "blocks.0.q_proj.weight")))
    header[first]["data_offsets"] = header[second]["data_offsets"]
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    refused(path, tmp_path / "out", "overlap")
    sharded = tiny("sharded", shards=2)
    index = sharded / "model.safetensors.index.json"
    listed = index.read_text()
    for name in (
        "weights.data",
        "refine.onnx",
        "manifest.json",
        "manifest.json.tmp",
        "x:y.safetensors",
        "tokenizer",
    ):
        index.write_text(listed.replace("model-00001-of-00002.safetensors", name))
        refused(sharded, tmp_path / "out", "is not a bare file name like", weights="link")


def test_the_command_line_names_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["--model", "dreem", "--out", str(tmp_path / "x")]) == 1
    assert "unknown model type 'dreem'" in capsys.readouterr().err
    assert cli.main(["--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert cli.main(["--model", "llada", "--out", str(tmp_path / "demo"), "--verify", "no"]) == 0
    said = capsys.readouterr().out
    assert "exporting the demo checkpoint checkpoints/llada-demo" in said
    assert manifests.load(tmp_path / "demo").tokenizer == "tokenizer"


def test_a_slip_in_a_directorys_name_is_no_hub_id(monkeypatch, tmp_path):
    (tmp_path / "models" / "llada").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("models/lada", "./models/lada"):
        with pytest.raises(
            DllmError,
            match=r"no such directory; models has llada\. .* give models/lada@main|not a hub id",
        ):
            checkpoint.locate(name)
        with pytest.raises(DllmError, match="no such directory"):
            checkpoint.config_of(name)


def test_a_hub_id_without_a_network_is_one_clear_line(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_, **__):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        DllmError,
        match=r"GSAI-ML/LLaDA-8B-Base: .* the hub does not provide it \(OSError: no route to host\)",
    ):
        checkpoint.locate("GSAI-ML/LLaDA-8B-Base")


def test_a_hub_id_is_downloaded_with_its_revision(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        (tmp_path / "snapshots" / "abc123").mkdir(parents=True)
        return str(tmp_path / "snapshots" / "abc123")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint.locate("org/name@v2") == (tmp_path / "snapshots" / "abc123", "abc123")
    assert asked["repo"] == "org/name" and asked["revision"] == "v2"
    assert not any("bin" in pattern or pattern.startswith("*.py") for pattern in asked["allow_patterns"])


def test_the_demo_checkpoint_is_small_and_of_the_official_layout():
    held = checkpoint.load(DEMO)
    assert sum(file.stat().st_size for file in DEMO.iterdir() if file.suffix == ".safetensors") <= 5e6
    assert held.config["model_type"] == "llada"
    assert "model.transformer.blocks.0.ff_proj.weight" in held.tensors
