"""Families with recorded cases of their official code, beyond LLaDA and Dream: decoded exactly in both
lowerings and on the reference, alone and in batches; faults injected into their export are found."""

from __future__ import annotations

import json
import shutil

import pytest
from official import BLOCK_CAUSAL, EXPERTS, FULL, name_of
from places import GOLDENS, export_quietly, refused
from tiny import write_checkpoint

from export import families, pipeline
from export.graph.attention import Attention
from export.parity.verify import verify
from export.pipeline import ExportConfig
from export.quantize import export as quantize
from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.cli import main as cli
from trt_runtime.decoding.policies.schedules import linear_quota, quota
from trt_runtime.measure import replay


@pytest.fixture(scope="module", params=[*FULL, *BLOCK_CAUSAL, *EXPERTS], ids=name_of)
def official(request):
    return request.param


@pytest.fixture(scope="module")
def recorded(official):
    return official.cases()


@pytest.fixture(scope="module")
def artifact(official, tmp_path_factory):
    return official.export(tmp_path_factory.mktemp(official.name) / "artifact")


@pytest.mark.parametrize("lowering", contract.LOWERINGS)
def test_all_recorded_cases_exactly(official, recorded, tmp_path, lowering):
    """Tokens, their order, and every forward with its window; with block-causal attention only the store that
    nobody reads is missing."""
    backend = OrtBackend(official.export(tmp_path / "artifact", lowering=lowering), threads=1)
    assert len(recorded) == official.count
    assert [replay.compare(case, replay.replay(backend, case)) for case in recorded] == [None] * len(recorded)


def test_all_recorded_cases_exactly_on_the_reference(artifact, recorded):
    reference = pytest.importorskip("export.parity.reference").TorchBackend(artifact, threads=1)
    assert [replay.compare(case, replay.replay(reference, case)) for case in recorded] == [None] * len(
        recorded
    )


def test_a_batch_of_all_of_them_is_each_alone(artifact, recorded):
    done = replay.replay_together(OrtBackend(artifact, threads=1), recorded)
    assert [replay.compare(case, made) for case, made in zip(recorded, done, strict=True)] == [None] * len(
        done
    )


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_verification_raises_no_false_alarm(official, tmp_path, dtype, recorded_once):
    stages = list(verify(official.export(tmp_path / "artifact", dtype=dtype)))
    experts = ["experts", *(["experts in fp16"] if dtype == "fp16" else [])] if official in EXPERTS else []
    names = ["weights", "range", "logits", "cache", *experts, "decode"]
    assert [stage.name for stage in stages] == names + ["blocks"] * official.is_block_causal
    assert all(stage.passed for stage in stages), [str(stage) for stage in stages]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a2d_qwen2", {"attention": "full"}),
        ("a2d_llama", {"attention": "full"}),
        ("a2d_qwen2", {"attention": "block_causal"}),
        ("a2d_llama", {"attention": "block_causal"}),
        ("coda", {}),
        ("qwen2", {}),
    ],
)
def test_bodies_without_recorded_cases_agree_with_transformers(tmp_path, name, options, recorded_once):
    path = write_checkpoint(families.find(name), tmp_path / "checkpoint")
    made = export_quietly(path, tmp_path / "artifact", **options)
    facts = manifests.load(made)
    assert facts.model.family == name and all(stage.passed for stage in verify(made))
    assert facts.decoding.first_commit == (name in ("coda", "qwen2"))  # these decode as Dream does


def test_an_autoregressive_qwen2_is_refused(tmp_path):
    """It has no mask token, and nothing else tells it from Open-dCoder."""
    path = write_checkpoint(families.find("qwen2"), tmp_path / "checkpoint", config={"mask_token_id": None})
    refused(path, tmp_path / "out", "which token is the mask", "--mask-token")
    notes = []
    config = ExportConfig(str(path), tmp_path / "out", mask_token="126")
    pipeline.export(config, lambda total: lambda done: None, notes.append)
    assert any("an autoregressive Qwen2 has the same model_type" in note for note in notes)


def test_it_is_quantised(tmp_path):
    """The norms of q and k stay as they are."""
    path = write_checkpoint(
        families.find("a2d_qwen3"), tmp_path / "checkpoint", model={"intermediate_size": 128}
    )
    made, config = tmp_path / "out", quantize.QuantizeConfig("w8a8", gate=False)
    quantize.export(ExportConfig(str(path), made, attention="full"), config, lambda total: lambda done: None)
    failed = [stage.name for stage in verify(made) if not stage.passed]
    assert failed == ["quality"]  # no prompts were given, so the gate was not run


def _norm_after_rotation(monkeypatch):
    """q and k are normed after RoPE: the norm's weight then scales other pairs of numbers."""
    heads, rotate = Attention._heads, Attention._rotate
    held = []

    def without_norm(self, on, h, layer, name, count, rows):
        held.append((layer, name))
        bare = Attention(**{**self.__dict__, "qk_norm": False})
        return heads(bare, on, h, layer, name, count, rows)

    def then_norm(self, on, x, rows, factor=None):
        layer, name = held[-1]
        turned = rotate(self, on, x, rows, factor)
        return on.norm(turned, f"layers.{layer}.{name[0]}_norm")

    monkeypatch.setattr(Attention, "_heads", without_norm)
    monkeypatch.setattr(Attention, "_rotate", then_norm)


def test_a_norm_after_the_rotation_is_found(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        _norm_after_rotation(patch)
        broken = export_quietly(GOLDENS / "a2d_qwen3_tiny", tmp_path / "broken", attention="full")
    assert [stage.name for stage in verify(broken) if not stage.passed][:1] == ["logits"]


def test_a_head_dim_from_the_hidden_size_is_refused(tmp_path):
    """Its weights have other shapes: 4 heads of 32 over a hidden size of 96."""
    path = shutil.copytree(GOLDENS / "a2d_qwen3_tiny", tmp_path / "checkpoint")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"head_dim": config["hidden_size"] // 4}))
    refused(path, tmp_path / "out", "self_attn.q_proj.weight has shape [128, 96]", attention="full")


def test_the_attention_must_be_told_where_config_json_does_not_say(tmp_path, capsys):
    path = GOLDENS / "a2d_qwen3_tiny"
    refused(path, tmp_path / "out", "--attention full", "config.json does not say")
    made = export_quietly(path, tmp_path / "out", attention="full")
    assert manifests.load(made).source["attention"] == "full"
    assert cli.main(["replay", str(made), str(GOLDENS / "a2d_qwen3_cases.json")]) == 0
    said = capsys.readouterr()
    assert "skipped: 25 cases of block-causal attention" in said.err + said.out
    assert "20 cases on ort in fp32: 20 with expectations, 0 mismatches" in said.out
    assert cli.main(["plan", str(path), "--device", "cpu"]) == 0


@pytest.mark.parametrize(("name", "mask"), [("illada", 5), ("a2d_qwen3", 1000)])
def test_the_mask_is_the_published_checkpoints_where_nothing_names_it(tmp_path, name, mask):
    told = next(official.told for official in FULL if official.name == name)
    made = export_quietly(GOLDENS / f"{name}_tiny", tmp_path / "out", **told)
    assert manifests.load(made).decoding.mask_token_id == mask
    given = export_quietly(GOLDENS / f"{name}_tiny", tmp_path / "given", mask_token="7", **told)
    assert manifests.load(given).decoding.mask_token_id == 7


def test_illadas_other_norm_is_refused(tmp_path):
    path = shutil.copytree(GOLDENS / "illada_tiny", tmp_path / "checkpoint")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-5}))
    refused(path, tmp_path / "out", "layer_norm_eps is 1e-05, which is not implemented")


def test_the_linear_schedule_is_the_recorded_one():
    units = json.loads((GOLDENS / "a2d_qwen3_units.json").read_text())["dllm_quota"]
    assert len(units) == 374
    for masked, steps, counts in units:
        assert linear_quota(masked, steps) == [count for count in counts if count], (masked, steps)
    assert linear_quota(4, 3) == [1, 1, 2] and quota(4, 3) == [2, 1, 1]  # 1.4999998 is rounded down


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_tensorrt_rtx_builds_it(tmp_path, dtype):
    pytest.importorskip("tensorrt_rtx_bindings")
    from trt_runtime.backends.tensorrt import store

    path = write_checkpoint(
        families.find("a2d_qwen3"), tmp_path / "checkpoint", model={"num_hidden_layers": 2}
    )
    made = export_quietly(path, tmp_path / "artifact", dtype=dtype, attention="full")
    sizes = store.BuildConfig(
        "tensorrt-rtx", targets=("sm86", "sm89", "sm120"), max_batch=2, max_length=64, block_length=8
    )
    for layout, names in (("shared", ["shared"]), ("split", ["prefix", "refine"])):
        engines = store.build(made, tmp_path / "engines", store.replace(sizes, layout=layout))
        assert sorted(file.stem for file in engines.glob("*.engine")) == names
