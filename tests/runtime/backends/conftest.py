"""Fixtures of the GPU backends: stand-ins for CUDA and TensorRT, and engines of the tiny artifacts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import stand_ins
from engine_sizes import SIZES

from trt_runtime.backends.tensorrt import store


@pytest.fixture
def gpu(monkeypatch):
    """The stand-in for CUDA, with TensorRT's; skips the test where TensorRT-RTX is not installed, which lends
    it its names."""
    return stand_ins.install(monkeypatch, pytest.importorskip("tensorrt_rtx_bindings"))[0]


@pytest.fixture
def tiny_engines(gpu, tiny_artifact, tmp_path):
    store.build(
        tiny_artifact, tmp_path / "engines", replace(SIZES, max_length=64, max_rows=None, block_length=8)
    )
    return tmp_path / "engines"
