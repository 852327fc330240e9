"""The ONNX Runtime backend: caches in place, weights held once, calls checked."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from calls import window
from places import ROOT

from trt_runtime.backends import open_backend
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError


def test_caches_are_written_in_place_and_only_in_the_window(golden_backend):
    """The arrays that were bound hold the new rows afterwards, and every other row and slot keeps its
    bits."""
    cache = golden_backend.new_cache(3, 30)
    rng = np.random.default_rng(0)
    for array in cache.buffers.arrays.values():
        array[:] = rng.standard_normal(array.shape)
    before = {name: array.copy() for name, array in cache.buffers.arrays.items()}
    places = {name: array.ctypes.data for name, array in cache.buffers.arrays.items()}
    golden_backend.refine(cache, slice(1, 2), window(rng.integers(0, 1000, (1, 5)), 8, [30]))
    for name, array in cache.buffers.arrays.items():
        assert array.ctypes.data == places[name]
        changed = (array != before[name]).any(axis=(1, 3))
        assert changed.tolist() == [[slot == 1 and 8 <= row < 13 for row in range(30)] for slot in range(3)]


_LOGGED_RUN = """
import sys, numpy as np
from pathlib import Path
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.backend import Window
backend = OrtBackend(Path(sys.argv[1]), threads=1)
cache = backend.new_cache(2, 24)
if sys.argv[2] == "copying":
    binding = backend._binding(cache, slice(0, 2), ("token", "confidence", "runner_up", "entropy"))
    for name in backend._returned:
        binding.bind_output(name, "cpu")
row = np.tile(np.arange(24), (2, 1))
window = Window(row, row, np.zeros(2, np.int64), np.array([24, 20]), row)
backend.prefix(cache, slice(0, 2), window)
"""


@pytest.mark.parametrize(("mode", "copies"), [("in-place", False), ("copying", True)])
def test_no_step_copies_a_cache(golden_artifact, mode, copies):
    """ONNX Runtime logs a warning whenever TensorScatter copies its cache: none with our binding, some
    without it."""
    done = subprocess.run(
        [sys.executable, "-c", _LOGGED_RUN, str(golden_artifact), mode],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "DLLM_ORT_LOG": "1"},
        check=True,
    )
    assert ("copying past_cache" in done.stderr) == copies, done.stderr


def test_one_session_holds_the_weights_once(tmp_path):
    """Resident memory of a process that decodes a 76 MB model in both roles: two sessions would hold 150 MB
    of weights."""
    from places import export_quietly
    from random_checkpoint import PRESETS, write

    small = PRESETS["llada-140m"][0] | {
        "n_layers": 4,
        "d_model": 512,
        "n_heads": 8,
        "n_kv_heads": 8,
        "mlp_hidden_size": 1536,
        "vocab_size": 4000,
        "embedding_size": 4000,
        "mask_token_id": 3999,
        "eos_token_id": 3998,
        "pad_token_id": 3998,
    }
    write(small, tmp_path / "checkpoint")
    artifact = export_quietly(tmp_path / "checkpoint", tmp_path / "artifact")
    script = """
import resource, sys
import numpy, onnxruntime, tokenizers, trt_runtime as rt
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
begin = peak()
model = rt.load(sys.argv[1], threads=1)
config = rt.GenerationConfig(gen_length=32, block_length=16, threshold=0.9, stop_at_eos=False)
result = model.generate([[5] * 40], config)[0]
print([begin, peak(), result.prefix_passes, result.refine_steps])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(artifact)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    begin, end, prefix_passes, refine_steps = json.loads(done.stdout)
    weights = (artifact / "weights.data").stat().st_size / 2**20
    assert weights > 60 and prefix_passes > 0 and refine_steps > 0
    # the mapped file and ONNX Runtime's packed copy of it; a second session would pack another
    assert end - begin < 2.6 * weights + 25, (begin, end, weights)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_ids": np.array([[1, 2, 9999]])}, "input_ids: values 1 to 9999, expected 0 to 1023"),
        ({"input_ids": np.array([[-1, 2, 3]])}, "input_ids: values -1"),
        ({"input_ids": np.array([[1, 2, 3]], np.int32)}, "int32 [1, 3], expected int64 [1, 3]"),
        ({"position_ids": np.array([[0, 1]])}, "position_ids: int64 [1, 2], expected int64 [1, 3]"),
        ({"position_ids": np.array([[0, 1, 512]])}, "position_ids: values 0 to 512"),
        ({"write_index": np.array([8])}, "write_index: values 8 to 8, expected 0 to 7"),
        ({"kv_len": np.array([0])}, "kv_len: values 0 to 0, expected 1 to 10"),
        ({"kv_len": np.array([11])}, "kv_len: values 11"),
        ({"logit_rows": np.array([[3]])}, "logit_rows: values 3 to 3, expected 0 to 2"),
        ({"logit_rows": np.zeros((1, 0), np.int64)}, "with no empty axis"),
    ],
)
def test_calls_are_checked_before_the_engine_sees_them(golden_backend, change, said):
    call = replace(window([1, 2, 3], kv_len=[10]), **change)
    with pytest.raises(DllmError) as error:
        golden_backend.refine(golden_backend.new_cache(1, 10), slice(0, 1), call)
    assert said in str(error.value)


def test_slots_and_roles_are_checked(golden_backend):
    cache, call = golden_backend.new_cache(2, 10), window([1, 2, 3], 1, [10])
    with pytest.raises(DllmError, match="slots 2:3 of a cache with 2 slots"):
        golden_backend.refine(cache, slice(2, 3), call)
    with pytest.raises(DllmError, match=r"prefix pass: write_index is \[1\]"):
        golden_backend.prefix(cache, slice(0, 1), call)


def test_statistics_that_are_no_numbers_are_an_error(tmp_path):
    """Weights that overflow would decode to garbage silently: the first forward says so instead."""
    from places import export_quietly
    from tiny import write_checkpoint

    from export import families

    def damage(tensors):
        tensors["model.transformer.ln_f.weight"][:] = 3e38

    checkpoint = write_checkpoint(families.find("llada"), tmp_path / "checkpoint", change=damage)
    backend = OrtBackend(export_quietly(checkpoint, tmp_path / "artifact"), threads=1)
    with pytest.raises(DllmError, match="is NaN or infinite"):
        backend.prefix(backend.new_cache(1, 4), slice(0, 1), window([1, 2, 3, 4]))


def test_backends_that_cannot_open(golden_artifact, golden_checkpoint, tmp_path):
    from places import export_quietly

    with pytest.raises(DllmError, match="unknown backend 'orth': did you mean 'ort'"):
        open_backend("orth", golden_artifact)
    bf16 = export_quietly(golden_checkpoint, tmp_path / "bf16", dtype="bf16")
    with pytest.raises(DllmError, match="dtype is bf16, which ONNX Runtime does not support on a CPU"):
        open_backend("ort", bf16)
    lies = tmp_path / "lies"
    lies.mkdir()
    for file in golden_artifact.iterdir():
        (lies / file.name).write_bytes(file.read_bytes())
    for key, value in (
        ("num_layers", 5),
        ("num_kv_heads", 1),
        ("head_dim", 16),
        ("dtype", "fp16"),
        ("vocab_size", 2000),
    ):
        facts = json.loads((golden_artifact / "manifest.json").read_text())
        facts["model"][key] = value
        (lies / "manifest.json").write_text(json.dumps(facts))
        with pytest.raises(DllmError, match="come from different exports"):
            open_backend("ort", lies)
    (golden_copy := tmp_path / "broken").mkdir()
    for file in golden_artifact.iterdir():
        (golden_copy / file.name).write_bytes(file.read_bytes())
    graph = golden_copy / "refine.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    with pytest.raises(DllmError, match=r"refine\.onnx: not a valid ONNX graph"):
        open_backend("ort", golden_copy)


@pytest.mark.parametrize("spin", [False, True])
def test_threads_spin_only_where_that_is_asked_for(tiny_artifact, spin, capsys):
    backend = OrtBackend(tiny_artifact, threads=1, spin=spin)
    options = backend._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == str(int(spin))
    words = ["generate", str(tiny_artifact), "--ids", "1,2", "--gen-length", "4"]
    assert cli.main([*words, *(["--spin"] if spin else [])]) == 0
    assert cli.main([*words, "--spin", "--backend", "tensorrt"]) == 1
    assert "--spin needs --backend ort" in capsys.readouterr().err
