"""Weights: converted where the plan says, in little memory, linked or copied, with their largest magnitudes;
full-size graphs."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys

import cpu_without
import numpy as np
import pytest
from places import ROOT, export_quietly, refused
from tiny import random_tensors, write_checkpoint, write_sparse

from export import families, pipeline
from export.checkpoint import huggingface as checkpoint
from export.families.base import ConfigReader
from export.graph import roles
from export.pipeline import ExportConfig, read
from export.weights import plan as weights
from export.weights.sources import NUMPY_DTYPES
from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.backend import Window
from trt_runtime.measure import cases, replay

LLADA = families.find("llada")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_weights_arrive_converted_and_where_the_plan_says(tiny, tmp_path, dtype):
    path = tiny()
    artifact = export_quietly(path, tmp_path / "out", dtype=dtype)
    source = read(str(path))
    data = (artifact / "weights.data").read_bytes()
    tensors = random_tensors(LLADA, LLADA.tiny_config())
    planned = weights.plan(source.decoder, LLADA, source.checkpoint, dtype)
    assert sum(weight.source_name in tensors for weight in planned) == len(tensors)
    for weight in planned:
        got = np.frombuffer(data[weight.offset : weight.offset + weight.size], NUMPY_DTYPES[weight.dtype])
        if weight.source_name in tensors:
            expected = tensors[weight.source_name].astype(NUMPY_DTYPES[dtype])
            assert (got.reshape(weight.shape) == expected).all()
        assert weight.offset % weights.ALIGNMENT == 0


def test_fp16_that_would_overflow_is_refused_with_the_tensor_named(tiny, tmp_path):
    def grow(tensors):
        tensors["model.transformer.blocks.2.up_proj.weight"][5, 7] = 1e5

    path = tiny(change=grow)
    refused(path, tmp_path / "out", "blocks.2.up_proj.weight", "100000", "bf16", dtype="fp16")
    assert export_quietly(path, tmp_path / "out", dtype="bf16").is_dir()


def test_the_largest_magnitude_of_every_tensor_is_in_the_manifest(tiny_checkpoint, tmp_path):
    source = read(str(tiny_checkpoint))
    for dtype, mode in (("fp32", "copy"), ("bf16", "copy"), ("fp32", "link")):
        maxima = manifests.load(
            export_quietly(tiny_checkpoint, tmp_path / f"{dtype}-{mode}", dtype=dtype, weights=mode)
        ).weight_maxima
        names = {source.family.tensor_name(name): name for name in maxima}
        assert set(names) == set(source.checkpoint.tensors)
        for stored, name in names.items():
            assert maxima[name] == pytest.approx(
                float(np.abs(source.checkpoint.tensors[stored].open()).max()), rel=1e-7
            )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_number_are_refused(tiny, tmp_path, bad):
    def damage(tensors):
        tensors["model.transformer.blocks.1.up_proj.weight"][90, 3] = bad

    path = tiny(change=damage)
    for dtype, mode in (("fp32", "copy"), ("bf16", "copy"), ("fp32", "link")):
        refused(
            path,
            tmp_path / "out",
            "blocks.1.up_proj.weight",
            "NaN or infinite values",
            "damaged",
            dtype=dtype,
            weights=mode,
        )


def test_weights_near_the_range_of_fp16_are_warned_about(tiny, tmp_path, capsys):
    from export import cli

    path = tiny(
        change=lambda tensors: tensors["model.transformer.blocks.2.up_proj.weight"].__setitem__((5, 7), -3e4)
    )
    command = ["--checkpoint", str(path), "--out", str(tmp_path / "out"), "--dtype", "fp16", "--verify", "no"]
    assert cli.main(command) == 0
    said = capsys.readouterr().err
    assert (
        "layers.2.up_proj has the value 30000, close to fp16's largest" in said
        and "prefer DTYPE=bf16" in said
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_linked_weights_give_the_same_logits_and_take_no_room(tiny_checkpoint, tmp_path, shards):
    family = families.find(read(str(tiny_checkpoint)).checkpoint.config["model_type"])
    path = write_checkpoint(family, tmp_path / "sharded", shards=shards)
    copied, linked = (export_quietly(path, tmp_path / mode, weights=mode) for mode in weights.MODES)
    manifest = manifests.load(linked, check_hashes=True)
    for file in path.glob("*.safetensors"):
        assert file.samefile(linked / file.name) and file.name in manifest.files
    assert (linked / "weights.data").stat().st_size == (copied / "weights.data").stat().st_size - sum(
        -(-stored.size // weights.ALIGNMENT) * weights.ALIGNMENT
        for stored in read(str(path)).checkpoint.tensors.values()
    )
    rows = np.arange(20)[None]
    call = Window(rows % 7, rows, np.zeros(1, np.int64), np.array([20]), rows)
    first, second = (
        backend.prefix(backend.new_cache(1, 20), slice(0, 1), call, want_logits=True).logits
        for backend in (OrtBackend(copied, threads=1), OrtBackend(linked, threads=1))
    )
    assert (first == second).all()
    recorded = replay.record(OrtBackend(copied, threads=1), cases.random_cases(manifest, 6))["cases"]
    backend = OrtBackend(linked, threads=1)
    assert [replay.compare(case, replay.replay(backend, case)) for case in recorded] == [None] * 6


def test_a_link_that_cannot_be_made_becomes_a_copy_and_a_conversion_is_refused(tiny, tmp_path, monkeypatch):
    path = tiny()

    def no_link(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    artifact = export_quietly(path, tmp_path / "copied", weights="link")
    assert not (artifact / "model.safetensors").samefile(path / "model.safetensors")
    assert (
        OrtBackend(artifact, threads=1).manifest.files["model.safetensors"].size
        == (path / "model.safetensors").stat().st_size
    )
    refused(
        path,
        tmp_path / "out",
        "is fp32, and --weights link cannot convert it to bf16",
        dtype="bf16",
        weights="link",
    )


@pytest.mark.parametrize("mode", weights.MODES)
def test_memory_stays_small_whatever_the_size(tmp_path, mode):
    """A checkpoint of 1.3 GB, of which one tensor alone has 520 MB: the process stays under 250 MB."""
    config = LLADA.tiny_config() | {
        "d_model": 1024,
        "n_heads": 8,
        "n_kv_heads": 8,
        "mlp_hidden_size": 4096,
        "n_layers": 2,
        "vocab_size": 256_000,
        "embedding_size": 256_000,
    }
    path = write_sparse(LLADA, tmp_path / "checkpoint", config, "bf16")
    script = f"""
import sys
from pathlib import Path
from export.pipeline import ExportConfig, export
config = ExportConfig({str(path)!r}, Path({str(tmp_path / "out")!r}), dtype="bf16", weights={mode!r})
export(config, lambda total: lambda done: None)
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 250
    assert sum(file.size for file in manifests.load(tmp_path / "out").files.values()) > 1.05e9
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("preset", "lowering", "billions", "kv_heads"),
    [
        ("llada-8b", "modern", 8.02, 32),
        ("llada-8b", "legacy", 8.02, 32),
        ("dream-7b", "modern", 7.62, 4),
        ("dream-7b", "legacy", 7.62, 4),
        ("illada-8b", "modern", 7.62, 8),
        ("a2d-qwen3-0.6b", "modern", 0.60, 8),
        ("sdar-8b", "modern", 8.19, 8),
        ("sdar-8b", "legacy", 8.19, 8),
        ("fast-dllm-v2-7b", "modern", 7.62, 4),
        ("coda-1.7b", "modern", 2.03, 8),
    ],
)
def test_graphs_of_full_size_models_pass_the_checker_by_path(tmp_path, preset, lowering, billions, kv_heads):
    """Real shapes, all layers, 16 GB of weights that are never read (the files are sparse)."""
    from random_checkpoint import PRESETS

    config, dtype = PRESETS[preset]
    path = write_sparse(families.find(config["model_type"]), tmp_path / "checkpoint", config, dtype)
    told = {"attention": "full"} if preset.startswith("a2d") else {}
    source, made = read(str(path), **told), tmp_path / "graphs"
    made.mkdir()
    parameters = sum(math.prod(stored.shape) for stored in source.checkpoint.tensors.values())
    assert round(parameters / 1e9, 2) == billions
    planned = weights.plan(source.decoder, source.family, source.checkpoint, dtype)
    for role in contract.ROLES:
        pipeline._write_graph(
            role, source, ExportConfig(str(path), made, dtype, lowering=lowering), planned, made
        )
    with open(made / weights.FILE_NAME, "wb") as file:
        file.truncate(planned[-1].offset + planned[-1].size)
    pipeline._check_graphs(made, [weights.FILE_NAME])
    assert all((made / f"{role}.onnx").stat().st_size < 1_000_000 for role in contract.ROLES)
    assert roles.dims_of(source.decoder, dtype).num_kv_heads == kv_heads
    assert checkpoint.load(path).config == config and ConfigReader(config, "").config == config


@pytest.mark.parametrize("sets", sorted(cpu_without.SETS))
def test_rotation_tables_and_powers_are_the_same_on_every_processor(sets):
    code = (
        "import hashlib; import numpy as np; from export.schemes import portable; r = "
        "np.random.default_rng(0).random(1 << 16, np.float32) * 9;print(hashlib.sha256(portable.power(r, "
        "0.5).tobytes() + portable.power(r, 0.3).tobytes()).hexdigest()); from dataclasses import replace; "
        "from export import families; from export.weights import plan as weights; from export.families.base "
        "import ConfigReader;f = families.find('llada'); c = f.decoder(ConfigReader(f.tiny_config(), "
        "'c'));print(*(hashlib.sha256(t.tobytes()).hexdigest() for base in (1e4, 5e5, 1e6) for size in (64, "
        "96, 128) for t in weights.rope_tables(replace(c, attention=replace(c.attention, rope_theta=base, "
        "head_dim=size), max_length=4096))))"
    )
    here = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    made = subprocess.run(
        [sys.executable, "tools/cpu_without.py", sets, "--", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if made.returncode == cpu_without.UNABLE:
        pytest.skip(f"this machine has no CPUID faulting, or no gcc: {made.stderr.strip()}")
    assert made.stdout == here
