"""Verification: passes on an intact export, fails on a broken one, and says at which stage."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")

from conftest import DEMO, GOLDENS, export_quietly

from export import cli as export_cli
from export import weights
from export.lowering import modern
from export.verify import verify
from trt_runtime import cli
from trt_runtime import manifest as manifests
from trt_runtime.errors import DllmError


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_an_intact_export_is_verified_and_the_manifest_says_so(tmp_path, dtype):
    artifact = export_quietly(DEMO, tmp_path / "artifact", dtype=dtype)
    assert manifests.load(artifact).verified is None
    stages = list(verify(artifact))
    assert [stage.name for stage in stages] == ["weights", "logits", "cache", "decode"]
    assert all(stage.passed for stage in stages), [str(stage) for stage in stages]
    verified = manifests.load(artifact, check_hashes=True).verified
    assert verified["passed"] and "transformers" in verified["against"]
    assert verified["stages"]["decode"]["cases"] == 12
    assert ("fp32 twin" in verified["backend"]) == (dtype == "bf16")
    if dtype == "fp32":
        assert verified["stages"]["decode"]["exact"] + verified["stages"]["decode"]["ambiguous"] == 12


def _export_with(monkeypatch, tmp_path, target, name, replacement):
    monkeypatch.setattr(target, name, replacement)
    return export_quietly(GOLDENS / "llada_tiny", tmp_path / "broken")


def _failing(artifact) -> list[str]:
    return [stage.name for stage in verify(artifact) if not stage.passed]


def test_a_wrong_rope_base_is_caught(monkeypatch, tmp_path):
    real = weights.rope_tables

    def wrong(config):
        from dataclasses import replace

        return real(replace(config, rope_theta=config.rope_theta * 1.05))

    assert "logits" in _failing(_export_with(monkeypatch, tmp_path, weights, "rope_tables", wrong))


def test_a_wrong_scale_is_caught(monkeypatch, tmp_path):
    real = modern.attention

    def wrong(*values, head_dim, group):
        return real(*values, head_dim=head_dim * 1.02, group=group)

    assert "logits" in _failing(_export_with(monkeypatch, tmp_path, modern, "attention", wrong))


def test_swapped_tensors_are_caught(monkeypatch, tmp_path):
    from export.families.llada import Llada

    real, swapped = Llada.tensor_name, {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def wrong(self, weight):
        head, _, leaf = weight.rpartition(".")
        return real(self, f"{head}.{swapped[leaf]}" if leaf in swapped and "layers.2" in head else weight)

    monkeypatch.setattr(Llada, "tensor_name", wrong)
    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "broken")
    monkeypatch.setattr(Llada, "tensor_name", real)
    assert "logits" in _failing(artifact)


def test_a_cache_written_at_the_wrong_row_is_caught(monkeypatch, tmp_path):
    real = modern.write_cache

    def wrong(op, cache, update, write_index):
        return real(op, cache, update, op.Mul(write_index, 0))

    failing = _failing(_export_with(monkeypatch, tmp_path, modern, "write_cache", wrong))
    assert "logits" in failing and "decode" in failing


def test_a_changed_weight_is_caught_before_anything_runs(tmp_path):
    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "artifact")
    data = np.memmap(artifact / "weights.data", np.uint8, "r+")
    data[100_000] ^= 1
    data.flush()
    with pytest.raises(DllmError, match=r"weights\.data: SHA-256"):
        list(verify(artifact))


def test_the_command_verifies_and_fails_loudly(tmp_path, capsys, monkeypatch):
    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "artifact")
    assert cli.main(["verify", str(artifact)]) == 0
    said = capsys.readouterr().out
    assert said.count("ok  ") == 4 and "verified: the result is in the manifest" in said
    assert "yes, against transformers" in _info(artifact, capsys)
    real = modern.attention
    monkeypatch.setattr(modern, "attention", lambda *a, head_dim, group: real(*a, head_dim=head_dim * 2, group=group))
    command = ["--checkpoint", str(GOLDENS / "llada_tiny"), "--out", str(tmp_path / "broken"), "--verify", "yes"]
    assert export_cli.main(command) == 1
    assert "NOT VERIFIED: do not deploy" in capsys.readouterr().out
    assert "FAILED" in _info(tmp_path / "broken", capsys)


def _info(artifact, capsys) -> str:
    assert cli.main(["info", str(artifact)]) == 0
    return capsys.readouterr().out


def test_the_wrong_checkpoint_is_refused(tmp_path, capsys):
    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "artifact")
    assert cli.main(["verify", str(artifact), "--checkpoint", str(DEMO)]) == 1
    assert "is not the one that" in capsys.readouterr().err
    moved = shutil.copytree(artifact, tmp_path / "moved")
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["source"]["checkpoint"] = str(tmp_path / "gone")
    (moved / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["verify", str(moved)]) == 1
    assert "no such directory" in capsys.readouterr().err
