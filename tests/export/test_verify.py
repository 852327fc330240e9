"""Verification: passes on an intact export, fails on a broken one, and says at which stage."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from places import DEMO, GOLDENS, export_quietly
from tiny import write_checkpoint

from export import cli as export_cli
from export import families
from export.graph.decoder import Decoder
from export.graph.lowering import modern
from export.parity.report import memory_needed
from export.parity.verify import bisect, verify
from export.weights import plan as weights
from trt_runtime.artifact import manifest as manifests
from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError
from trt_runtime.measure import tune

pytestmark = pytest.mark.usefixtures("recorded_once")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_an_intact_export_is_verified_and_the_manifest_says_so(tmp_path, dtype):
    artifact = export_quietly(DEMO, tmp_path / "artifact", dtype=dtype)
    assert manifests.load(artifact).verified is None
    stages = list(verify(artifact))
    assert [stage.name for stage in stages] == ["weights", "range", "logits", "cache", "decode"]
    assert all(stage.passed for stage in stages), [str(stage) for stage in stages]
    verified = manifests.load(artifact, check_hashes=True).verified
    assert verified["passed"] and "transformers" in verified["against"]
    assert verified["stages"]["decode"]["cases"] == 12
    assert ("fp32 twin" in verified["backend"]) == (dtype == "bf16")
    if dtype == "fp32":
        assert (
            verified["stages"]["decode"]["decisions"] > 100 and verified["stages"]["decode"]["ambiguous"] < 20
        )


@pytest.mark.parametrize(
    ("relative", "passes"), [(2.0**-23, True), (-(2.0**-23), True), (1e-4, False), (np.nan, False)]
)
def test_rotation_tables_may_differ_in_the_last_bit_of_their_frequencies(
    golden_checkpoint, monkeypatch, tmp_path, relative, passes
):
    """As another processor computes them: an artifact travels."""

    def other(config):
        frequency = config.attention.rope_theta ** -(
            np.arange(0, size := config.attention.head_dim, 2) / size
        ) * (1 + relative)
        angles = np.outer(np.arange(config.max_length), frequency)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "rope_tables", other)
        artifact = export_quietly(golden_checkpoint, tmp_path / "a")
    stage = next(iter(verify(artifact)))
    assert (stage.name, stage.passed) == ("weights", passes), str(stage)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_no_false_alarm_on_a_golden_checkpoint(golden_checkpoint, tmp_path, dtype):
    _passes(export_quietly(golden_checkpoint, tmp_path / "artifact", dtype=dtype))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_no_false_alarm_on_a_tiny_one(tiny_checkpoint, tmp_path, dtype):
    _passes(export_quietly(tiny_checkpoint, tmp_path / "artifact", dtype=dtype))


def _passes(artifact):
    assert [s.passed for s in verify(artifact)] == [True] * 5
    assert all(row.passed for rows in bisect(artifact).values() for row in rows)


def test_values_that_are_no_number_are_counted(golden_checkpoint, monkeypatch, tmp_path):
    real = Decoder._layer

    def wrong(self, i, *arguments, **options):
        x, written = real(self, i, *arguments, **options)
        return (self.op.Sqrt(x) if i == 2 else x), written

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "_layer", wrong)
        artifact = export_quietly(golden_checkpoint, tmp_path / "broken")
    rows = bisect(artifact)["prefix pass, refine graph"]
    assert [row.bad_values > 0 for row in rows[:3]] == [False, False, True] and not rows[2].passed


def _outlier(family, value):
    """A model whose layer 1 has one large MLP unit: its weights are fine, its activations are `value` times
    as large."""

    def change(tensors):
        tensors[family.tensor_name("layers.1.up_proj")][3] *= value
        tensors[family.tensor_name("layers.1.down_proj")][:, 3] /= value

    return change


def test_fp16_is_warned_about_and_refused_by_what_activations_need(tiny_checkpoint, tmp_path, capsys):
    family = families.find(json.loads((tiny_checkpoint / "config.json").read_text())["model_type"])
    usual = _range_of(family, tmp_path / "usual", 1e3) / 1e3  # what the unit gives per unit of its size
    for largest, passed, said in (
        (3e4, True, "is close to the limit of fp16's range"),
        (2e5, False, "leaves fp16's range"),
    ):
        checkpoint = write_checkpoint(
            family, tmp_path / f"c{largest:g}", change=_outlier(family, largest / usual)
        )
        stage = _range_stage(export_quietly(checkpoint, tmp_path / f"a{largest:g}", dtype="fp16"))
        assert stage.passed == passed and said in stage.advice
        assert "layers.1.mlp.down_proj (input)" in stage.advice and "DTYPE=bf16" in stage.advice
        assert _range_stage(export_quietly(checkpoint, tmp_path / f"b{largest:g}", dtype="bf16")).passed
    quiet = _range_stage(export_quietly(tiny_checkpoint, tmp_path / "quiet", dtype="fp16"))
    assert quiet.passed and not quiet.advice


def _range_stage(artifact):
    return next(stage for stage in verify(artifact) if stage.name == "range")


def _range_of(family, path, value) -> float:
    checkpoint = write_checkpoint(family, path, change=_outlier(family, value))
    stage = _range_stage(export_quietly(checkpoint, path.with_name(path.name + "-artifact")))
    assert stage.measured["in"] == "layers.1.mlp.down_proj (input)"
    return stage.measured["largest activation"]


def test_a_changed_weight_is_caught_before_anything_runs(tmp_path):
    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "artifact")
    data = np.memmap(artifact / "weights.data", np.uint8, "r+")
    data[100_000] ^= 1
    data.flush()
    with pytest.raises(DllmError, match=r"weights\.data: SHA-256"):
        list(verify(artifact))


def _reseal(artifact, **change):
    """Hashes fixed after an edit by hand, and facts changed: what only a comparison with the checkpoint can
    find."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    for name in manifest["files"]:
        data = artifact / name
        manifest["files"][name] = {"size": data.stat().st_size, "sha256": manifests.sha256_of(data)}
    for key, value in change.items():
        group, _, item = key.partition("__")
        manifest[group][item] = value
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    return artifact


@pytest.mark.parametrize(
    "change",
    [
        {"decoding__eos_token_ids": [3, 4]},
        {"model__max_length": 100_000},
        {"model__num_heads": 2},
        {"model__parameters": 5},
        {"decoding__defaults": {"gen_length": 7}},
        {"decoding__pad_token_id": 3},
        {"model__family": "other"},
    ],
)
def test_facts_that_are_not_the_checkpoints_are_found(tmp_path, change):
    artifact = _reseal(export_quietly(GOLDENS / "llada_tiny", tmp_path / "a"), **change)
    assert "decode" in _failing(artifact)


def _failing(artifact) -> list[str]:
    return [stage.name for stage in verify(artifact) if not stage.passed]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_graph_that_was_changed_by_hand_is_found(tmp_path, dtype):
    """Also a bf16 one, which cannot run here, and one under another name than usual."""
    import onnx

    artifact = export_quietly(GOLDENS / "dream_tiny", tmp_path / "a", dtype=dtype)
    for role in ("prefix", "refine"):
        other = shutil.copytree(artifact, tmp_path / role)
        model = onnx.load(other / f"{role}.onnx", load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = 0.5
        (other / f"{role}.onnx").write_bytes(model.SerializeToString())
        assert _failing(_reseal(other))[:1] == (["weights"] if dtype == "bf16" else ["logits"])
        moved = shutil.copytree(other, tmp_path / f"{role}-moved")
        shutil.copyfile(artifact / f"{role}.onnx", moved / f"{role}.onnx")
        (moved / "evil.onnx").write_bytes(model.SerializeToString())
        manifest = json.loads((moved / "manifest.json").read_text())
        manifest["graphs"][role]["file"] = "evil.onnx"
        manifest["files"]["evil.onnx"] = {"size": 0, "sha256": ""}
        (moved / "manifest.json").write_text(json.dumps(manifest))
        assert _failing(_reseal(moved))


def test_graphs_with_another_mask_token_and_damaged_ones_are_refused(tmp_path):
    """Their statistics would propose the mask; nothing hangs."""
    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "a")
    config = json.loads((GOLDENS / "llada_tiny" / "config.json").read_text()) | {"mask_token_id": 999}
    other = shutil.copytree(GOLDENS / "llada_tiny", tmp_path / "checkpoint")
    (other / "config.json").write_text(json.dumps(config))
    wrong = export_quietly(other, tmp_path / "b")
    for role in ("prefix", "refine"):
        mixed = shutil.copytree(artifact, tmp_path / role)
        shutil.copyfile(wrong / f"{role}.onnx", mixed / f"{role}.onnx")
        with pytest.raises(DllmError, match="the graph does not belong to this artifact"):
            list(verify(_reseal(mixed)))
        (mixed / f"{role}.onnx").write_bytes(b"no graph")
        with pytest.raises(DllmError, match=r"not a valid ONNX graph|cannot open"):
            list(verify(_reseal(mixed)))


def test_a_model_too_large_to_verify_here_is_exported_and_says_so(tmp_path, capsys, monkeypatch):
    """A user with an 8 B model and 16 GiB must not be killed by the verification after the export."""
    command = ["--checkpoint", str(GOLDENS / "llada_tiny"), "--out", str(tmp_path / "a"), "--overwrite"]
    monkeypatch.setattr(export_cli, "meminfo", lambda key: 1_000_000)
    assert export_cli.main(command) == 0
    assert "not verified: it would take about" in capsys.readouterr().out
    assert manifests.load(tmp_path / "a").verified is None
    assert export_cli.main([*command, "--verify", "yes"]) == 0
    assert manifests.load(tmp_path / "a").verified["passed"]
    facts = replace(manifests.load(tmp_path / "a").model, parameters=8_000_000_000, dtype="bf16")
    assert 55e9 < memory_needed(facts) < 75e9


def test_the_command_verifies_and_fails_loudly(tmp_path, capsys, monkeypatch):
    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "artifact")
    assert cli.main(["verify", str(artifact)]) == 0
    said = capsys.readouterr().out
    assert said.count("ok  ") == 5 and "verified: the result is in the manifest" in said
    assert "yes, against transformers" in _info(artifact, capsys)
    real = modern.attention
    monkeypatch.setattr(
        modern, "attention", lambda *a: real(*a[:-1], replace(a[-1], scale=a[-1].scale * 2**-0.5))
    )
    command = [
        "--checkpoint",
        str(GOLDENS / "llada_tiny"),
        "--out",
        str(tmp_path / "broken"),
        "--verify",
        "yes",
    ]
    assert export_cli.main(command) == 1
    assert "NOT VERIFIED: do not deploy" in capsys.readouterr().out
    assert "FAILED" in _info(tmp_path / "broken", capsys)


def _info(artifact, capsys) -> str:
    assert cli.main(["info", str(artifact)]) == 0
    return capsys.readouterr().out


def test_the_wrong_checkpoint_is_refused(tmp_path, capsys):
    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "artifact")
    assert cli.main(["verify", str(artifact), "--checkpoint", str(DEMO)]) == 1
    assert "differs from the one that" in capsys.readouterr().err
    moved = shutil.copytree(artifact, tmp_path / "moved")
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["source"]["checkpoint"] = str(tmp_path / "gone")
    (moved / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["verify", str(moved)]) == 1
    assert "no such directory" in capsys.readouterr().err


def test_what_was_tuned_is_no_fact_of_the_checkpoint(tmp_path):
    """A tuned artifact is verified as before, and keeps what was tuned; a changed fact beside it is still
    found."""
    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "artifact")
    tune.write(artifact, {"policy": "eb", "gamma": 0.05, "block_length": 16, "cache": "prefix"})
    assert all(stage.passed for stage in verify(artifact))
    held = manifests.load(artifact)
    assert held.verified["passed"] and held.decoding.tuned["gamma"] == 0.05
    manifests.write(
        replace(held, decoding=replace(held.decoding, pad_token_id=held.decoding.pad_token_id - 1)), artifact
    )
    stages = {stage.name: stage for stage in verify(artifact)}
    assert not stages["decode"].passed and "pad_token_id" in str(stages["decode"])
