"""The TensorRT backend over stand-ins for CUDA and TensorRT (stand_ins.py): everything but the GPU itself."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import stand_in_cuda
import stand_in_tensorrt86
from calls import window
from engine_sizes import SIZES
from places import export_quietly
from tiny import write_checkpoint

from export import families
from trt_runtime.backends import cuda, open_backend
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.backends.tensorrt import store
from trt_runtime.backends.tensorrt.backend import TensorRTBackend
from trt_runtime.backends.tensorrt.store import BuildConfig
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.scheduler import Scheduler
from trt_runtime.errors import DllmError
from trt_runtime.measure import replay
from trt_runtime.model import load

rtx = pytest.importorskip("tensorrt_rtx_bindings")


@pytest.mark.parametrize("layout", store.ENGINE_LAYOUTS)
@pytest.mark.parametrize("lowering", ["modern", "legacy"])
def test_all_goldens_exactly(gpu, golden_checkpoint, golden_cases, tmp_path, layout, lowering):
    artifact = export_quietly(golden_checkpoint, tmp_path / "artifact", lowering=lowering, head="logits")
    store.build(artifact, tmp_path / "engines", replace(SIZES, layout=layout))
    backend = TensorRTBackend(artifact, engines=tmp_path / "engines")
    chosen = golden_cases[:: 1 if (layout, lowering) == ("shared", "modern") else 6]
    assert [replay.compare(case, replay.replay(backend, case)) for case in chosen] == [None] * len(chosen)
    assert (gpu.launches > 0) == (lowering == "modern")
    backend.close()


@pytest.mark.parametrize("layout", store.ENGINE_LAYOUTS)
@pytest.mark.parametrize("lowering", ["modern", "legacy"])
def test_batches_larger_than_the_engines_take_are_split(gpu, golden_checkpoint, tmp_path, lowering, layout):
    """Five ragged rows by engines for two at a time, in slots beyond the first: the same tokens as on ONNX
    Runtime."""
    artifact = export_quietly(golden_checkpoint, tmp_path / "artifact", lowering=lowering)
    store.build(
        artifact,
        tmp_path,
        replace(SIZES, max_batch=2, max_length=64, max_rows=None, block_length=8, layout=layout),
    )
    models = [load(artifact, "ort", threads=1), load(artifact, "tensorrt", engines=tmp_path)]
    assert models[1].backend.max_batch == 2
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 120, length).tolist() for length in (5, 12, 9, 3, 7)]
    for cache in ("prefix", "dual"):
        config = GenerationConfig(gen_length=24, block_length=8, cache=cache, threshold=0.02)
        ours, theirs = (
            [(row.tokens, row.nfe) for row in model.generate(prompts, config)] for model in models
        )
        assert ours == theirs


def test_logits_come_only_when_they_are_wanted(gpu, tiny_artifact, tiny_engines):
    """And a step that is recorded with them is another than the one without."""
    backend, oracle = (
        TensorRTBackend(tiny_artifact, engines=tiny_engines),
        OrtBackend(tiny_artifact, threads=1),
    )
    caches, rng = [item.new_cache(2, 64) for item in (backend, oracle)], np.random.default_rng(0)
    full = window(rng.integers(0, 120, (2, 30)), kv_len=[30, 24], rows=np.tile(np.arange(8), (2, 1)))
    for item, cache in zip((backend, oracle), caches, strict=True):
        assert item.prefix(cache, slice(0, 2), full).logits is None
    for repeat in range(6):
        step = window(
            rng.integers(0, 120, (2, 5)), 9, [30, 24], rows=np.tile(np.arange(3 + repeat % 2), (2, 1))
        )
        made = [
            item.refine(cache, slice(0, 2), step, want_logits=repeat % 2 == 0)
            for item, cache in zip((backend, oracle), caches, strict=True)
        ]
        for name in ("confidence", "runner_up", "entropy", "logits"):
            mine, theirs = (getattr(stats, name) for stats in made)
            assert (mine is None and theirs is None) or np.abs(mine - theirs).max() < 1e-5
        assert (made[0].token == made[1].token).all() and (made[0].logits is None) == (repeat % 2 == 1)


def test_what_the_engines_cannot_do_is_said(gpu, tiny_artifact, tiny_engines, tmp_path):
    backend = TensorRTBackend(tiny_artifact, engines=tiny_engines)
    with pytest.raises(
        DllmError, match="the canvas has 65 tokens, the engines support 64: build them with --max-length 65"
    ):
        backend.new_cache(1, 65)
    cache = backend.new_cache(8, 64)
    with pytest.raises(
        DllmError, match=r"fits a refine call of 5 rows, 8 positions, statistics of 8: .* larger --max-batch"
    ):
        backend.refine(cache, slice(0, 5), window(np.zeros((5, 8), np.int64)))
    with pytest.raises(DllmError, match=r"a prefix call of 1 rows, 30 positions, statistics of 30"):
        backend.prefix(cache, slice(0, 1), window(np.zeros((1, 30), np.int64)))
    gpu.left = 1 << 12
    with pytest.raises(
        DllmError,
        match=r"could not allocate .* GiB on the GPU .*cudaErrorMemoryAllocation.*: use a smaller batch",
    ):
        backend.new_cache(8, 64)
    with pytest.raises(
        DllmError, match=r"no engines of this artifact for this machine .none were built.: build them"
    ):
        TensorRTBackend(tiny_artifact, engines=tmp_path / "nowhere")


@pytest.mark.parametrize("longest", [128, 4096])
def test_serving_starts_with_the_documented_engines(gpu, tmp_path, longest):
    """As deploy/Dockerfile.gpu builds and serves: no length is given. The slots take what the engines hold
    less the scheduler's spare rows, and never more than the model; a request is answered."""
    from fastapi.testclient import TestClient

    from trt_runtime.serving.answers import ServeOptions
    from trt_runtime.serving.app import create_app

    checkpoint = write_checkpoint(
        families.find("llada"), tmp_path / "checkpoint", model={"max_sequence_length": longest}
    )
    artifact = export_quietly(checkpoint, tmp_path / "artifact")
    made = store.build(artifact, tmp_path / "engines", BuildConfig(max_batch=8))
    capacity = json.loads((made / "engine.json").read_text())["built_for"]["capacity"]
    assert capacity == {128: 192, 4096: 2048}[longest]
    with load(artifact, "tensorrt", engines=tmp_path / "engines") as model:
        app = create_app(model, ServeOptions("tiny", slots=8))
        assert app.state.worker.max_length == {128: 128, 4096: 2048 - 64}[longest]
        with TestClient(app, base_url="http://localhost") as client:
            answer = client.post(
                "/v1/completions", json={"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 16}
            )
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] > 0
            too_long = client.post(
                "/v1/completions", json={"model": "tiny", "prompt": [5] * 5000, "max_tokens": 16}
            )
            assert (
                too_long.status_code == 400
                and str(app.state.worker.max_length) in too_long.json()["error"]["message"]
            )


def test_the_length_that_a_message_asks_for_can_be_built(gpu, tmp_path):
    """A server that asks for the model's longest canvas needs spare rows beyond it: the engines may have
    them."""
    checkpoint = write_checkpoint(families.find("llada"), tmp_path / "checkpoint")
    artifact = export_quietly(checkpoint, tmp_path / "artifact")
    store.build(artifact, tmp_path / "engines", BuildConfig(max_length=64, block_length=8))
    backend = TensorRTBackend(artifact, engines=tmp_path / "engines")
    with pytest.raises(
        DllmError, match="the canvas has 192 tokens, the engines support 64: build them with --max-length 192"
    ):
        Scheduler(backend, 2, 128)
    store.build(artifact, tmp_path / "longer", BuildConfig(max_length=192, block_length=8))
    Scheduler(TensorRTBackend(artifact, engines=tmp_path / "longer"), 2, 128)


def test_the_backend_is_found_by_its_name(gpu, tiny_artifact, tiny_engines):
    assert open_backend("tensorrt", tiny_artifact, engines=tiny_engines).name == "tensorrt"
    with pytest.raises(DllmError, match="unknown option of the backend 'tensorrt' 'threads'"):
        open_backend("tensorrt", tiny_artifact, threads=2)


def test_tensorrt_8_6_runs_the_legacy_lowering(monkeypatch, golden_checkpoint, golden_cases, tmp_path):
    """fp16 goldens through the older names and int32 tensors; what the graph computes in float32 is pinned;
    cuBLAS and cuDNN are off."""
    gpu = stand_in_cuda.Cuda()
    package = stand_in_tensorrt86.tensorrt86(gpu, rtx)
    monkeypatch.setattr(cuda, "_bindings", lambda: (gpu, gpu))
    monkeypatch.setattr(store, "load", lambda backend: package)
    artifact = export_quietly(
        golden_checkpoint, tmp_path / "artifact", lowering="legacy", dtype="fp16", head="logits"
    )
    made = store.build(artifact, tmp_path / "engines", SIZES)
    assert set(json.loads((made / "shared.engine").read_text())["flags"]) == {
        "FP16",
        "OBEY_PRECISION_CONSTRAINTS",
    }
    layers = package.last_network.layers.values()
    pinned = [layer.precision for layer in layers if layer.precision is not None]
    assert pinned.count(rtx.float32) > 20 and pinned.count(rtx.float16) > 20
    assert all(layer.types[0] == layer.precision for layer in layers if layer.precision is not None)
    assert package.Settings.sources_set == 1 << 4
    assert len(json.loads((made / "engine.json").read_text())["built_for"]["workarounds"]) == 2
    backend, oracle = TensorRTBackend(artifact, engines=tmp_path / "engines"), OrtBackend(artifact, threads=1)
    chosen = golden_cases[::5]
    for case in replay.record(oracle, chosen)["cases"]:
        assert replay.compare(case, replay.replay(backend, case)) is None
    with pytest.raises(DllmError, match=r"has no bf16 networks: export with DTYPE=fp16"):
        store.build(
            export_quietly(golden_checkpoint, tmp_path / "bf16", lowering="legacy", dtype="bf16"),
            tmp_path / "no",
            SIZES,
        )
    modern = export_quietly(golden_checkpoint, tmp_path / "modern", dtype="fp16")
    with pytest.raises(DllmError, match=r"which needs tensorrt 10.16 or newer, got 8.6.1"):
        store.build(modern, tmp_path / "no", SIZES)
    package.__version__ = "8.5.2"
    with pytest.raises(DllmError, match=r"tensorrt 8.5.2 is too old, expected 8.6 or newer"):
        store.build(artifact, tmp_path / "no", SIZES)


def test_fp32_engines_compute_in_fp32(gpu, golden_checkpoint, tmp_path):
    for dtype in ("fp32", "fp16"):
        artifact = export_quietly(golden_checkpoint, tmp_path / dtype, dtype=dtype)
        made = store.build(artifact, tmp_path / "engines", replace(SIZES, max_length=64))
        assert ("no TF32" in json.loads((made / "shared.engine").read_text())["flags"]) == (dtype == "fp32")


def test_another_thread_uses_the_same_gpu(gpu, monkeypatch):
    import threading

    set_to = []
    monkeypatch.setattr(
        gpu,
        "cudaSetDevice",
        lambda index: set_to.append((threading.get_ident(), index)) or (gpu.Code.cudaSuccess,),
    )
    device = cuda.CudaDevice()
    other = threading.Thread(target=lambda: device.allocate(16))
    other.start()
    other.join()
    device.allocate(16)
    # every time: the number of a thread that has ended is given to another one
    assert (
        {index for _, index in set_to} == {0}
        and len(set_to) >= 3
        and other.ident in {thread for thread, _ in set_to}
    )
