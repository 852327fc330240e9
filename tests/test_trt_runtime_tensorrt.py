"""The TensorRT backend over stand-ins for CUDA and TensorRT (stand_ins.py): everything but the GPU itself."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import stand_ins
from conftest import export_quietly
from test_export_graphs import window

from trt_runtime import cases, cuda, engine, replay
from trt_runtime.backends import open_backend
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.backends.tensorrt import TensorRTBackend
from trt_runtime.engine import BuildConfig
from trt_runtime.errors import DllmError

rtx = pytest.importorskip("tensorrt_rtx_bindings")
SIZES = BuildConfig(max_batch=4, max_length=256, block_length=64, max_rows=256)


@pytest.fixture
def gpu(monkeypatch):
    return stand_ins.install(monkeypatch, rtx)[0]


@pytest.mark.parametrize("layout", engine.LAYOUTS)
@pytest.mark.parametrize("lowering", ["modern", "legacy"])
def test_all_goldens_exactly(gpu, golden_checkpoint, golden_cases, tmp_path, layout, lowering):
    artifact = export_quietly(golden_checkpoint, tmp_path / "artifact", lowering=lowering)
    engine.build(artifact, tmp_path / "engines", replace(SIZES, layout=layout))
    backend = TensorRTBackend(artifact, engines=tmp_path / "engines")
    chosen = golden_cases[:: 1 if (layout, lowering) == ("shared", "modern") else 6]
    assert [replay.compare(case, replay.replay(backend, case)) for case in chosen] == [None] * len(chosen)
    assert (gpu.launches > 0) == (lowering == "modern")
    backend.close()
