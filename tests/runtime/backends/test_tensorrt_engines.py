"""Engines found, opened and refused, over the stand-ins."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import stand_in_cuda
import stand_ins
from engine_sizes import SIZES

from trt_runtime.backends import cuda
from trt_runtime.backends.tensorrt import builder, store
from trt_runtime.backends.tensorrt.backend import TensorRTBackend
from trt_runtime.backends.tensorrt.engines import Engines
from trt_runtime.errors import DllmError

rtx = pytest.importorskip("tensorrt_rtx_bindings")


def test_a_driver_that_is_older_than_the_bindings_is_named_with_the_remedy(gpu, monkeypatch):
    code = stand_in_cuda.enum.IntEnum("Code", {"cudaErrorInsufficientDriver": 35})
    monkeypatch.setattr(gpu, "cudaGetDeviceCount", lambda: (code.cudaErrorInsufficientDriver, None))
    monkeypatch.setattr(gpu, "cudaDriverGetVersion", lambda: (gpu.Code.cudaSuccess, 12040))
    monkeypatch.setattr(cuda, "bindings_major", lambda: 13)
    with pytest.raises(
        DllmError,
        match=r"cuda-bindings is for CUDA 13, but the driver supports CUDA 12: .*cuda-bindings<13.*trt-cu12 "
        r"and rtx-cu12",
    ):
        cuda.CudaDevice()
    monkeypatch.setattr(cuda, "bindings_major", lambda: 12)
    with pytest.raises(DllmError, match="and a driver; 'dllm-trt doctor' lists what is installed"):
        cuda.CudaDevice()


def test_engines_of_something_else_are_not_opened(gpu, tiny_artifact, tiny_engines, monkeypatch):
    (directory,) = (path.parent for path in tiny_engines.glob("*/engine.json"))
    facts = json.loads((directory / "engine.json").read_text())
    for name, value in (("version", "10.16.1"), ("gpu", {"name": "another"}), ("files", {})):
        changed = facts | {"built_for": facts["built_for"] | {name: value}}
        (directory / "engine.json").write_text(json.dumps(changed))
        with pytest.raises(DllmError, match=f"{directory.name}, mismatch: {name}"):
            TensorRTBackend(tiny_artifact, engines=tiny_engines)
    (directory / "engine.json").write_text(json.dumps(facts))
    engine_file = directory / "shared.engine"
    engine_file.write_bytes(engine_file.read_bytes() + b" ")

    def opened(*_):
        raise AssertionError("an engine was deserialised before its hash was checked")

    monkeypatch.setattr(Engines, "_open", opened)
    with pytest.raises(DllmError, match="changed since it was built"):
        TensorRTBackend(tiny_artifact, engines=tiny_engines)


def test_stripped_engines_get_their_weights_back(gpu, tiny_artifact, tmp_path):
    made = store.build(tiny_artifact, tmp_path, replace(SIZES, strip=True, inspect=True, max_length=64))
    facts = json.loads((made / "shared.engine").read_text())
    assert {"STRIP_PLAN", "REFIT_IDENTICAL"} <= set(facts["flags"]) and "DETAILED" in facts["verbosity"]
    assert json.loads((made / "shared.layers.json").read_text())["Layers"] == []
    backend = TensorRTBackend(tiny_artifact, engines=tmp_path)
    assert not backend._engines.all[0].engine.stripped


def test_the_timing_cache_serves_the_next_build(gpu, tiny_artifact, tmp_path):
    store.build(tiny_artifact, tmp_path, replace(SIZES, layout="split", max_length=64))
    (held,) = tmp_path.glob("timing.cache-11.4.0.106-sm90")
    assert held.read_bytes() == b"++"
    store.build(tiny_artifact, tmp_path, replace(SIZES, max_length=64))
    assert held.read_bytes() == b"+++"
    held.write_bytes(b"of another GPU")  # is refused, and a new one begun
    store.build(tiny_artifact, tmp_path, replace(SIZES, max_length=128))
    assert held.read_bytes() == b"+"


def test_a_machine_without_a_gpu_is_told_so(monkeypatch, tiny_artifact, tmp_path):
    """The real cuda-python, which says why on a machine without a driver; the stand-in, with no device; no
    package at all."""
    made, _ = stand_ins.install(monkeypatch, rtx)
    made.devices = 0
    with pytest.raises(
        DllmError, match="GPU 0 was requested, but this machine has 0: install NVIDIA's cuda-bindings"
    ):
        cuda.CudaDevice()
    with pytest.raises(DllmError, match="engines are built on the GPU that runs them: GPU 0"):
        store.build(tiny_artifact, tmp_path, SIZES)
    monkeypatch.undo()
    monkeypatch.setattr(
        cuda.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name))
    )
    with pytest.raises(
        DllmError, match=r"a package that is missing .cuda.bindings.runtime.: install NVIDIA's cuda-bindings"
    ):
        cuda.CudaDevice()


@pytest.mark.parametrize(("package", "version", "expected"), [
    ("tensorrt", "8.6.1", {"types are constraints", "may be missing"}), ("tensorrt", "10.13.3.9", {"TF32"}),
    ("tensorrt", "10.16.1.11", {"TF32", "decomposed"}), ("tensorrt", "11.4.0.106", {"TF32", "decomposed"}),
    ("tensorrt-rtx", "1.7.1.116", {"TF32", "decomposed", "the caller allocates"}),
])  # fmt: skip
def test_workarounds_are_of_their_versions(package, version, expected):
    from types import SimpleNamespace

    found = builder.workarounds(package, SimpleNamespace(__version__=version))
    assert len(found) == len(expected) and all(any(end in item.why for end in expected) for item in found)


def test_an_engine_is_read_in_pieces(gpu, tiny_artifact, tiny_engines, monkeypatch):
    """It is never whole in host memory; a TensorRT that knows no stream reader gets the bytes."""
    most = []
    monkeypatch.setattr(store, "PIECE", 100)
    real = stand_ins.pieces
    monkeypatch.setattr(
        stand_ins, "pieces", lambda reader: (most.append(len(piece)) or piece for piece in real(reader))
    )
    backend = TensorRTBackend(tiny_artifact, engines=tiny_engines)
    size = (backend.directory / "shared.engine").stat().st_size
    assert max(most) == 100 and sum(most) == size and len(most) == -(-size // 100)
    backend.close()
    most.clear()
    package = store.load("tensorrt")
    monkeypatch.delattr(package, "IStreamReaderV2")
    TensorRTBackend(tiny_artifact, engines=tiny_engines).close()
    assert not most


def test_the_engines_that_fit_best_are_taken(gpu, tiny_artifact, tmp_path, monkeypatch):
    built = {}
    for name, sizes in (
        ("long", {"max_batch": 1, "max_length": 192}),
        ("wide", {"max_batch": 4, "max_length": 64}),
        ("short", {"max_batch": 1, "max_length": 64}),
    ):
        built[name] = store.build(
            tiny_artifact, tmp_path, replace(SIZES, max_rows=None, block_length=8, **sizes)
        )
    assert TensorRTBackend(tiny_artifact, engines=tmp_path).directory == built["wide"]
    assert TensorRTBackend(tiny_artifact, engines=tmp_path, length=100).directory == built["long"]
    with pytest.raises(DllmError, match=r"mismatch: max_batch \(1, requested: 2\)"):
        TensorRTBackend(tiny_artifact, engines=tmp_path, batch=2, length=100)
    with pytest.raises(DllmError, match=r"plugins \(none built\)"):
        TensorRTBackend(tiny_artifact, engines=tmp_path, steps_per_sync=2)


def test_options_of_newer_versions_are_refused(gpu, tiny_artifact, tmp_path, monkeypatch):
    package = store.load("tensorrt")
    for version, option, least in (("10.9.0", "plugins", "10.16"), ("8.6.1", "strip", "10.0")):
        monkeypatch.setattr(package, "__version__", version)
        with pytest.raises(DllmError, match=f"--{option} needs TensorRT {least} or newer, got {version}"):
            store.build(tiny_artifact, tmp_path, replace(SIZES, **{option: True}))
