"""Hostile and damaged artifacts: every one is refused with a line that says what to do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from trt_runtime.artifact import manifest as manifests
from trt_runtime.errors import DllmError


@pytest.fixture
def artifact(golden_artifact, tmp_path):
    return shutil.copytree(golden_artifact, tmp_path / "artifact")


def edit(artifact, change) -> None:
    path = artifact / "manifest.json"
    read = json.loads(path.read_text())
    change(read)
    path.write_text(json.dumps(read))


def refused(artifact, *said: str, **options) -> None:
    with pytest.raises(DllmError) as error:
        manifests.load(artifact, **options)
    assert all(part in str(error.value) for part in said), str(error.value)


def test_a_manifest_survives_writing_and_unknown_keys(artifact):
    before = manifests.load(artifact, check_hashes=True)
    edit(artifact, lambda m: m.update(future={"a": 1}) or m["model"].update(flavour="new"))
    assert manifests.load(artifact) == before
    manifests.write(before, artifact)
    assert manifests.load(artifact) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(format="gguf"), ("format is 'gguf'", "not the manifest")),
        (lambda m: m.update(format_version=3), ("format_version is 3", "reads up to 2", "update dllm-trt")),
        (lambda m: m.update(format_version="1"), ("format_version is '1'",)),
        (lambda m: m.update(format_version=True), ("format_version is True",)),
        (lambda m: m.pop("model"), ("missing model",)),
        (lambda m: m["model"].pop("head_dim"), ("model: missing head_dim",)),
        (lambda m: m["model"].update(num_layers="4"), ("num_layers", "is '4', expected int")),
        (lambda m: m["model"].update(num_layers=4.0), ("num_layers", "is 4.0, expected int")),
        (lambda m: m["model"].update(num_layers=True), ("num_layers", "is True, expected int")),
        (lambda m: m["model"].update(dtype="fp8"), ("model.dtype is 'fp8'",)),
        (lambda m: m.update(model=[]), ("expected an object",)),
        (lambda m: m["decoding"].update(eos_token_ids=["end"]), ("eos_token_ids", "expected int")),
        (lambda m: m["model"].update(num_layers=0), ("num_layers is 0",)),
        (lambda m: m["decoding"].update(mask_token_id=9999), ("token id 9999 is outside the vocabulary",)),
        (lambda m: m["decoding"].update(eos_token_ids=[1000]), ("a mask token that is not an end token",)),
        (lambda m: m["decoding"].update(logit_shift=100), ("logit_shift 100",)),
        (lambda m: m.update(head="none"), ("head is 'none'",)),
        (lambda m: m["graphs"].pop("refine"), ("graphs has no 'refine'",)),
        (
            lambda m: m["graphs"]["refine"].update(file="other.onnx"),
            ("the file of graph 'refine' is not listed",),
        ),
        (lambda m: m["files"].update({"../x": {"size": 1, "sha256": "0"}}), ("'../x' leaves the artifact",)),
        (
            lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": "0"}}),
            ("'/etc/passwd' leaves the artifact",),
        ),
        (lambda m: m["files"].update({"a\\b": {"size": 1, "sha256": "0"}}), ("leaves the artifact",)),
        (lambda m: m.update(tokenizer="../../tokenizer"), ("leaves the artifact",)),
        (
            lambda m: m["files"].update(ghost={"size": 1, "sha256": "0"}),
            ("ghost: missing", "export it again"),
        ),
    ],
)
def test_manifests_that_are_refused(artifact, change, said):
    edit(artifact, change)
    refused(artifact, *said)


def test_files_that_were_changed(artifact):
    weights = artifact / "weights.data"
    data = weights.read_bytes()
    weights.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    manifests.load(artifact)  # sizes alone do not show it
    refused(artifact, "weights.data: SHA-256 is", "changed after export", check_hashes=True)
    weights.write_bytes(data[:-1])
    refused(artifact, f"{len(data) - 1} bytes, the manifest says {len(data)}", "copy it again")
    weights.unlink()
    weights.symlink_to(artifact / "prefix.onnx")  # what a link leads to is checked as a file would be
    refused(artifact, "bytes, the manifest says", "copy it again")
    weights.unlink()
    weights.symlink_to(artifact / "nothing")
    refused(artifact, "is a broken link")


def test_what_is_no_artifact(artifact, tmp_path):
    refused(tmp_path / "none", "not an artifact", "manifest.json")
    (artifact / "manifest.json").write_text("{")
    refused(artifact, "not readable as JSON")
    (artifact / "manifest.json").write_text("[]")
    refused(artifact, "format is 'list'")
    (artifact / "manifest.json").unlink()
    refused(artifact, "interrupted export")


def test_measured_numbers_that_are_not_finite_leave_the_manifest_readable(artifact):
    manifest = manifests.load(artifact)
    stages = {"logits": {"worst": float("inf"), "others": [float("nan"), 1.0]}}
    manifests.write(replace(manifest, verified={"passed": False, "stages": stages}), artifact)
    read = manifests.load(artifact).verified["stages"]["logits"]
    assert read == {"worst": "not finite (inf)", "others": ["not finite (nan)", 1.0]}


def test_version_1_manifests_load(artifact):
    """A manifest as version 1 wrote it, kept in the tests: newer code must go on reading it."""
    from places import ROOT

    read = json.loads((ROOT / "tests/data/manifest-v1.json").read_text())
    manifest = manifests.parse(read, "manifest-v1.json")
    assert manifest.model.num_layers == 4 and manifest.decoding.mask_token_id == 1000
