"""Kernels in engines, over the stand-ins: the GPU commits by itself."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import stand_in_cuda
from engine_sizes import SIZES
from places import export_quietly

from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends import cuda
from trt_runtime.backends.tensorrt import store
from trt_runtime.backends.tensorrt.backend import TensorRTBackend
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError
from trt_runtime.measure import replay
from trt_runtime.model import load

rtx = pytest.importorskip("tensorrt_rtx_bindings")


def _with_kernels(gpu, monkeypatch, artifact, out, **sizes):
    """Engines with kernels: compiled for real, put into the parsed network as ordinary layers, and run by
    their references."""
    from plugin_layers import ordinary_layers

    from plugins import tensorrt_networks

    real = tensorrt_networks.replace_statistics
    monkeypatch.setattr(
        tensorrt_networks, "statistics_layer", lambda network, trt, target: ordinary_layers(network)
    )
    monkeypatch.setattr(
        tensorrt_networks,
        "replace_statistics",
        lambda network, trt, mask, make: real(network, rtx, mask, make),
    )
    made = store.build(artifact, out, replace(SIZES, plugins=True, **sizes))
    facts = json.loads((made / "engine.json").read_text())["built_for"]["plugins"]
    gpu.kernels[facts["commit"]["entry"]] = stand_in_cuda.commit_kernel(
        manifests.load(artifact).decoding.mask_token_id
    )
    return made, facts


@pytest.mark.parametrize("count", [2, 7])
def test_goldens_exactly_when_the_gpu_commits(
    gpu, golden_checkpoint, golden_cases, tmp_path, monkeypatch, count
):
    artifact = export_quietly(golden_checkpoint, tmp_path / "artifact", head="logits")
    made, facts = _with_kernels(gpu, monkeypatch, artifact, tmp_path / "engines")
    assert set(facts) == {"commit", "row_statistics"} and (made / "commit.ptx").is_file()
    backend = TensorRTBackend(artifact, engines=tmp_path / "engines", steps_per_sync=count)
    chosen = golden_cases[:: 2 if count == 2 else 5]
    assert [replay.compare(case, replay.replay(backend, case)) for case in chosen] == [None] * len(chosen)


def test_the_gpu_commits_for_a_ragged_batch(gpu, golden_checkpoint, tmp_path, monkeypatch):
    artifact = export_quietly(golden_checkpoint, tmp_path / "artifact")
    _with_kernels(gpu, monkeypatch, artifact, tmp_path / "engines", block_length=8, max_rows=None)
    models = [
        load(artifact, "ort", threads=1),
        load(artifact, "tensorrt", engines=tmp_path / "engines", steps_per_sync=5),
    ]
    prompts = [np.random.default_rng(1).integers(0, 120, length).tolist() for length in (5, 12, 9)]
    for policy in (
        {"threshold": 0.02},
        {"policy": "factor", "factor": 1.5},
        {"policy": "fixed", "steps": 12},
    ):
        config = GenerationConfig(gen_length=28, block_length=8, **policy)
        ours, theirs = (
            [(row.tokens, row.nfe) for row in model.generate(prompts, config)] for model in models
        )
        assert ours == theirs
    with pytest.raises(
        DllmError, match=r"a block has 16 positions, the commit kernel supports 8|no profile of the engines"
    ):
        models[1].generate(prompts, GenerationConfig(gen_length=32, block_length=16, cache="prefix"))


def test_a_changed_kernel_is_not_loaded(gpu, golden_artifact, tmp_path, monkeypatch):
    made, _ = _with_kernels(gpu, monkeypatch, golden_artifact, tmp_path)
    (made / "commit.ptx").write_text((made / "commit.ptx").read_text() + " ")
    with pytest.raises(DllmError, match=r"commit.ptx: missing, or changed"):
        TensorRTBackend(golden_artifact, engines=tmp_path)


def test_a_driver_that_is_too_old_for_a_kernel_is_told_so(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "cuModuleLoadData", lambda image: (gpu.Code.cudaErrorInvalidValue, None))
    with pytest.raises(
        DllmError, match=r"its PTX has version 8.7 .8.7 needs CUDA 12.8., the driver supports CUDA 13.0"
    ):
        cuda.CudaDevice().kernel(b"//\n.version 8.7\n.target sm_90\n", "k")
