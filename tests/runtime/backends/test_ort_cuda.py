"""ONNX Runtime's CUDA path without a GPU: the CPU provider under CUDA's name, over the stand-in for CUDA. And
that nothing falls back."""

from __future__ import annotations

import re

import numpy as np
import pytest
import stand_in_cuda
from places import export_quietly

from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends import cuda
from trt_runtime.backends.ort import OrtCudaBackend, open_ort, session
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError
from trt_runtime.measure import replay
from trt_runtime.model import load
from trt_runtime.system import commands


@pytest.fixture
def gpu(monkeypatch):
    made = stand_in_cuda.Cuda()
    monkeypatch.setattr(cuda, "_bindings", lambda: (made, made))
    monkeypatch.setattr(OrtCudaBackend, "provider", "CPUExecutionProvider")
    monkeypatch.setattr(OrtCudaBackend, "place", "cpu")
    return made


@pytest.mark.parametrize("count", [1, 4])
def test_all_goldens_exactly(gpu, golden_artifact, golden_cases, count):
    from plugins import commit

    mask = manifests.load(golden_artifact).decoding.mask_token_id
    for columns in (8, 16, 32, 64):
        name = f"dllm_commit_{mask}_{commit.constants(mask, columns)['BLOCK']}"
        gpu.kernels[name] = stand_in_cuda.commit_kernel(mask)
    backend = open_ort(golden_artifact, threads=1, device="cuda", steps_per_sync=count)
    chosen = golden_cases[:: 3 if count == 1 else 2]
    assert [replay.compare(case, replay.replay(backend, case)) for case in chosen] == [None] * len(chosen)
    assert (backend._commit is not None) == (count > 1)


def test_float32_is_computed_in_float32(gpu, golden_artifact, monkeypatch):
    """ONNX Runtime's default on CUDA is TF32: on an H100 a case of the demo was then decoded differently."""
    asked, real = [], session.ort.InferenceSession
    monkeypatch.setattr(
        session.ort,
        "InferenceSession",
        lambda model, options, providers: asked.extend(providers) or real(model, options),
    )
    open_ort(golden_artifact, device="cuda")
    assert asked and all(options == {"use_tf32": "0"} for _, options in asked)


def test_rows_in_later_slots(gpu, golden_artifact):
    from plugins import commit

    mask = manifests.load(golden_artifact).decoding.mask_token_id
    gpu.kernels[f"dllm_commit_{mask}_{commit.constants(mask, 32)['BLOCK']}"] = stand_in_cuda.commit_kernel(
        mask
    )
    prompts = [np.random.default_rng(2).integers(0, 120, length).tolist() for length in (5, 12, 9)]
    made = []
    for options in ({}, {"device": "cuda"}, {"device": "cuda", "steps_per_sync": 3}):
        results = load(golden_artifact, "ort", threads=1, **options).generate(
            prompts, GenerationConfig(gen_length=24, block_length=8, threshold=0.02)
        )
        made.append([(row.tokens, row.nfe) for row in results])
    assert made[0] == made[1] == made[2]


def test_without_a_cuda_provider_it_is_an_error_and_not_the_cpu(golden_artifact, monkeypatch):
    with pytest.raises(
        DllmError, match=re.escape(f"uninstall onnxruntime, then {commands.install('ort-gpu')}.")
    ):
        open_ort(golden_artifact, device="cuda")
    real = (
        session.ort.InferenceSession
    )  # onnxruntime-gpu without a driver: a warning, and a session on the CPU
    monkeypatch.setattr(
        session.ort, "InferenceSession", lambda model, options, providers: real(model, options)
    )
    monkeypatch.setattr(
        session.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(
        DllmError,
        match="opened the model on CPUExecutionProvider instead of CUDA: its CUDA provider did not load",
    ):
        open_ort(golden_artifact, device="cuda")


def test_what_cuda_does_not_take(gpu, golden_checkpoint, golden_artifact, tmp_path):
    legacy = export_quietly(golden_checkpoint, tmp_path / "legacy", lowering="legacy")
    with pytest.raises(DllmError, match=r"uses the legacy lowering, .* --lowering modern"):
        open_ort(legacy, device="cuda")
    with pytest.raises(DllmError, match=r"unknown device of ONNX Runtime 'gpu'"):
        open_ort(golden_artifact, device="gpu")


def test_work_that_is_left_to_the_cpu_is_an_error(gpu, golden_artifact, monkeypatch):
    """A session that has the provider, and nodes for which the provider has no kernels."""
    backend = open_ort(golden_artifact, device="cuda")
    monkeypatch.setattr(OrtCudaBackend, "provider", "CUDAExecutionProvider")
    with pytest.raises(
        DllmError,
        match=r"would run \d+ Attention, .*\d+ TensorScatter.* of the model on the CPU: .* a newer "
        r"onnxruntime-gpu",
    ):
        backend._check_placement()


def test_the_memory_of_a_cache_is_used_again(gpu, golden_artifact):
    backend = open_ort(golden_artifact, device="cuda")
    cache = backend.new_cache(2, 30)
    held = cache.buffers
    assert cache.capacity == 64
    del cache
    assert backend.new_cache(2, 50).buffers is held
    assert backend.new_cache(3, 50).buffers is not held
