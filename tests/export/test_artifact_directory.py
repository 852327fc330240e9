"""Where an export writes: what it may replace, and that nothing half-written is ever left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from places import ROOT, export_quietly
from tiny import write_sparse

from export import families
from export.pipeline import ExportConfig, export
from trt_runtime.artifact import manifest as manifests
from trt_runtime.errors import DllmError

LLADA = families.find("llada")


def test_target_directories(tiny, tmp_path):
    path, out = tiny(), tmp_path / "out"
    (out / "work").mkdir(parents=True)
    with pytest.raises(DllmError, match="is not an artifact: choose another OUT"):
        export_quietly(path, out)
    assert (out / "work").is_dir()
    (out / "work").rmdir()
    export_quietly(path, out)
    with pytest.raises(DllmError, match="--overwrite"):
        export_quietly(path, out)
    before = manifests.load(out)
    export_quietly(path, out, overwrite=True, dtype="fp16")
    assert before.model.dtype == "fp32" and manifests.load(out).model.dtype == "fp16"


def test_nothing_but_an_artifact_is_ever_replaced(tiny, tmp_path):
    """A directory with some other manifest.json, with files of the user's, or with the checkpoint in it is
    left alone."""
    path, out = tiny(), tmp_path / "out"
    web = tmp_path / "web"
    web.mkdir()
    (web / "manifest.json").write_text('{"name": "an extension"}')
    export_quietly(path, out)
    (out / "notes.txt").write_text("mine")
    inside = tmp_path / "holder"
    export_quietly(path, inside)
    shutil.copytree(path, inside / "checkpoint")
    (path / "manifest.json").write_text("{}")
    for target, source in ((web, path), (out, path), (inside, inside / "checkpoint"), (path, path)):
        before = {file: file.read_bytes() for file in target.rglob("*") if file.is_file()}
        with pytest.raises(DllmError, match="choose another OUT"):
            export_quietly(source, target, overwrite=True)
        assert {file: file.read_bytes() for file in target.rglob("*") if file.is_file()} == before


def test_an_artifact_moves_and_the_same_export_is_the_same_bytes(tiny, tmp_path):
    path = tiny()
    first, second = (export_quietly(path, tmp_path / name) for name in ("a", "b"))
    assert manifests.load(first).files == manifests.load(second).files
    first.rename(tmp_path / "moved")
    from trt_runtime.backends.ort import OrtBackend

    OrtBackend(tmp_path / "moved").close()


def test_an_error_in_the_middle_leaves_the_old_artifact(tiny, tmp_path, monkeypatch):
    path, out = tiny(), tmp_path / "out"
    export_quietly(path, out)
    before = manifests.load(out, check_hashes=True)

    def explode(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(ExportConfig(str(path), out, overwrite=True), lambda total: explode)
    assert manifests.load(out, check_hashes=True) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "out"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_killed_export_leaves_no_half_artifact(tmp_path, signum):
    """A large enough model that the signal comes while the weights stream."""
    config = {
        "d_model": 512,
        "n_heads": 8,
        "n_kv_heads": 8,
        "mlp_hidden_size": 4096,
        "n_layers": 8,
        "vocab_size": 60000,
        "embedding_size": 60000,
    }
    path = tmp_path / "checkpoint"
    full = LLADA.tiny_config() | config
    write_sparse(LLADA, path, full)
    command = [
        sys.executable,
        "-m",
        "export",
        "--checkpoint",
        str(path),
        "--out",
        str(tmp_path / "out"),
        "--verify",
        "no",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not list(tmp_path.glob(".out.partial-*/artifact/weights.data")) and time.time() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signum)
    assert process.wait(30) in (130, 143)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]
