"""The TensorRT backend over stand-ins for CUDA and TensorRT (stand_ins.py): everything but the GPU itself."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import stand_in_cuda
import stand_ins
from calls import window
from places import export_quietly
from tiny import write_checkpoint

from export import families
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends import cuda, open_backend
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.backends.tensorrt import backend as tensorrt_backend
from trt_runtime.backends.tensorrt import builder, engines, store
from trt_runtime.backends.tensorrt.backend import TensorRTBackend, TensorRTRTXBackend
from trt_runtime.backends.tensorrt.engines import Engines
from trt_runtime.backends.tensorrt.store import BuildConfig
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.scheduler import Scheduler
from trt_runtime.errors import DllmError
from trt_runtime.measure import replay
from trt_runtime.model import load

rtx = pytest.importorskip("tensorrt_rtx_bindings")
SIZES = BuildConfig(max_batch=4, max_length=256, block_length=64, max_rows=256)


@pytest.fixture
def gpu(monkeypatch):
    return stand_ins.install(monkeypatch, rtx)[0]


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


@pytest.fixture
def tiny_engines(gpu, tiny_artifact, tmp_path):
    store.build(
        tiny_artifact, tmp_path / "engines", replace(SIZES, max_length=64, max_rows=None, block_length=8)
    )
    return tmp_path / "engines"


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


def test_a_step_that_comes_again_is_one_launch(gpu, tiny_artifact, tiny_engines):
    backend = TensorRTBackend(tiny_artifact, engines=tiny_engines)
    cache, step = backend.new_cache(1, 64), window(np.arange(5)[None], 9, [30])
    for repeat, launches in enumerate((0, 0, 1, 2)):
        step.input_ids[:] = repeat  # new tokens go through the recorded copy
        backend.refine(cache, slice(0, 1), step)
        assert gpu.launches == launches
    plain = TensorRTBackend(tiny_artifact, engines=tiny_engines, cuda_graphs=False)
    other = plain.new_cache(1, 64)
    assert (
        plain.refine(other, slice(0, 1), step).confidence == plain.refine(other, slice(0, 1), step).confidence
    ).all()
    assert gpu.launches == 2


def test_memory_goes_back(gpu, tiny_artifact, tiny_engines):
    import gc

    before = gpu.left
    backend = TensorRTBackend(tiny_artifact, engines=tiny_engines)
    cache = backend.new_cache(2, 64)
    backend.refine(cache, slice(0, 1), window(np.arange(5)[None], 9, [30]))
    taken = before - gpu.left
    assert taken > 4 * 2 * 2 * 64 * 4
    backend.close()
    del backend, cache
    gc.collect()
    assert gpu.left == before


def test_what_the_engines_cannot_do_is_said(gpu, tiny_artifact, tiny_engines, tmp_path):
    backend = TensorRTBackend(tiny_artifact, engines=tiny_engines)
    with pytest.raises(
        DllmError, match="a canvas of 65 tokens: the engines hold 64: build them with --max-length 65"
    ):
        backend.new_cache(1, 65)
    cache = backend.new_cache(8, 64)
    with pytest.raises(
        DllmError, match=r"a refine call of 5 rows by 8 positions, 8 of them asked for: .* larger --max-batch"
    ):
        backend.refine(cache, slice(0, 5), window(np.zeros((5, 8), np.int64)))
    with pytest.raises(DllmError, match=r"a prefix call of 1 rows by 30 positions, 30 of them"):
        backend.prefix(cache, slice(0, 1), window(np.zeros((1, 30), np.int64)))
    gpu.left = 1 << 12
    with pytest.raises(
        DllmError, match=r"could not allocate .* GiB on the GPU .*cudaErrorMemoryAllocation.*: use a smaller batch"
    ):
        backend.new_cache(8, 64)
    with pytest.raises(
        DllmError, match=r"no engines of this artifact for this machine .there are none.: build them"
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
        DllmError, match="a canvas of 192 tokens: the engines hold 64: build them with --max-length 192"
    ):
        Scheduler(backend, 2, 128)
    store.build(artifact, tmp_path / "longer", BuildConfig(max_length=192, block_length=8))
    Scheduler(TensorRTBackend(artifact, engines=tmp_path / "longer"), 2, 128)


def test_a_driver_that_is_older_than_the_bindings_is_named_with_the_remedy(gpu, monkeypatch):
    code = stand_in_cuda.enum.IntEnum("Code", {"cudaErrorInsufficientDriver": 35})
    monkeypatch.setattr(gpu, "cudaGetDeviceCount", lambda: (code.cudaErrorInsufficientDriver, None))
    monkeypatch.setattr(gpu, "cudaDriverGetVersion", lambda: (gpu.Code.cudaSuccess, 12040))
    monkeypatch.setattr(cuda, "bindings_major", lambda: 13)
    with pytest.raises(
        DllmError,
        match=r"cuda-bindings is of CUDA 13, the driver runs CUDA 12: .*cuda-bindings<13.*trt-cu12 and "
        r"rtx-cu12",
    ):
        cuda.CudaDevice()
    monkeypatch.setattr(cuda, "bindings_major", lambda: 12)
    with pytest.raises(DllmError, match="and a driver; 'dllm-trt doctor' says what is there"):
        cuda.CudaDevice()


def test_engines_of_something_else_are_not_opened(gpu, tiny_artifact, tiny_engines, monkeypatch):
    (directory,) = (path.parent for path in tiny_engines.glob("*/engine.json"))
    facts = json.loads((directory / "engine.json").read_text())
    for name, value in (("version", "10.16.1"), ("gpu", {"name": "another"}), ("files", {})):
        changed = facts | {"built_for": facts["built_for"] | {name: value}}
        (directory / "engine.json").write_text(json.dumps(changed))
        with pytest.raises(DllmError, match=f"{directory.name} is of another {name}"):
            TensorRTBackend(tiny_artifact, engines=tiny_engines)
    (directory / "engine.json").write_text(json.dumps(facts))
    engine_file = directory / "shared.engine"
    engine_file.write_bytes(engine_file.read_bytes() + b" ")

    def opened(*_):
        raise AssertionError("an engine was deserialised before its hash was checked")

    monkeypatch.setattr(Engines, "_open", opened)
    with pytest.raises(DllmError, match="was changed since it was built"):
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
        DllmError, match="GPU 0 was asked for, this machine has 0: install NVIDIA's cuda-bindings"
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


def test_the_backend_is_found_by_its_name(gpu, tiny_artifact, tiny_engines):
    assert open_backend("tensorrt", tiny_artifact, engines=tiny_engines).name == "tensorrt"
    with pytest.raises(DllmError, match="unknown option of the backend 'tensorrt' 'threads'"):
        open_backend("tensorrt", tiny_artifact, threads=2)


def _with_kernels(gpu, monkeypatch, artifact, out, **sizes):
    """Engines with kernels: compiled for real, put into the parsed network as ordinary layers, and run by
    their references."""
    from plugin_layers import ordinary_layers

    from plugins import tensorrt_plugins

    real = tensorrt_plugins.replace_statistics
    monkeypatch.setattr(
        tensorrt_plugins, "plugin_layer", lambda network, trt, target: ordinary_layers(network)
    )
    monkeypatch.setattr(
        tensorrt_plugins,
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
def test_all_goldens_exactly_when_the_gpu_commits(
    gpu, golden_checkpoint, golden_cases, tmp_path, monkeypatch, count
):
    artifact = export_quietly(golden_checkpoint, tmp_path / "artifact", head="logits")
    made, facts = _with_kernels(gpu, monkeypatch, artifact, tmp_path / "engines")
    assert set(facts) == {"commit", "row_statistics"} and (made / "commit.ptx").is_file()
    backend = TensorRTBackend(artifact, engines=tmp_path / "engines", steps_per_sync=count)
    chosen = golden_cases[:: 1 if count == 2 else 5]
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
        DllmError, match=r"a block of 16 positions: the commit kernel takes 8|no profile of the engines"
    ):
        models[1].generate(prompts, GenerationConfig(gen_length=32, block_length=16, cache="prefix"))


def test_a_changed_kernel_is_not_loaded(gpu, golden_artifact, tmp_path, monkeypatch):
    made, _ = _with_kernels(gpu, monkeypatch, golden_artifact, tmp_path)
    (made / "commit.ptx").write_text((made / "commit.ptx").read_text() + " ")
    with pytest.raises(DllmError, match=r"commit.ptx: is missing or was changed"):
        TensorRTBackend(golden_artifact, engines=tmp_path)


def test_tensorrt_8_6_runs_the_legacy_lowering(monkeypatch, golden_checkpoint, golden_cases, tmp_path):
    """fp16 goldens through the older names and int32 tensors; what the graph computes in float32 is pinned;
    cuBLAS and cuDNN are off."""
    gpu = stand_in_cuda.Cuda()
    package = stand_ins.tensorrt86(gpu, rtx)
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
    with pytest.raises(DllmError, match=r"which tensorrt reads from 10.16 on; installed is 8.6.1"):
        store.build(modern, tmp_path / "no", SIZES)
    package.__version__ = "8.5.2"
    with pytest.raises(DllmError, match=r"tensorrt 8.5.2 is too old, 8.6 is the oldest"):
        store.build(artifact, tmp_path / "no", SIZES)


@pytest.mark.parametrize(("package", "version", "expected"), [
    ("tensorrt", "8.6.1", {"types are constraints", "may be missing"}), ("tensorrt", "10.13.3.9", {"TF32"}),
    ("tensorrt", "10.16.1.11", {"TF32", "taken apart"}), ("tensorrt", "11.4.0.106", {"TF32", "taken apart"}),
    ("tensorrt-rtx", "1.7.1.116", {"TF32", "taken apart", "the caller allocates"}),
])  # fmt: skip
def test_workarounds_are_of_their_versions(package, version, expected):
    from types import SimpleNamespace

    found = builder.workarounds(package, SimpleNamespace(__version__=version))
    assert len(found) == len(expected) and all(any(end in item.why for end in expected) for item in found)


def test_the_memory_of_a_cache_and_its_recorded_steps_are_used_again(gpu, tiny_artifact, tiny_engines):
    backend, step = TensorRTBackend(tiny_artifact, engines=tiny_engines), window(np.arange(5)[None], 9, [30])
    for _ in range(3):
        backend.refine(backend.new_cache(1, 64), slice(0, 1), step)
    assert gpu.launches == 1
    fresh = TensorRTBackend(tiny_artifact, engines=tiny_engines)
    alone = fresh.refine(fresh.new_cache(1, 64), slice(0, 1), step)
    used = backend.new_cache(1, 64)
    backend.prefix(used, slice(0, 1), window(np.arange(40)[None], rows=np.arange(8)[None]))
    del used
    again = backend.new_cache(1, 64)
    full = window(np.arange(20)[None], rows=np.arange(8)[None])
    clean = fresh.new_cache(1, 64)
    assert (
        backend.prefix(again, slice(0, 1), full).confidence
        == fresh.prefix(clean, slice(0, 1), full).confidence
    ).all()
    later = window(np.arange(5)[None], 9, [20])
    assert (
        backend.refine(again, slice(0, 1), later).confidence
        == fresh.refine(clean, slice(0, 1), later).confidence
    ).all()
    assert np.isfinite(alone.confidence).all()


def test_a_recorded_step_has_a_context_that_nothing_else_changes(gpu, tiny_artifact, tiny_engines):
    """Two windows of different sizes in turn: each is recorded and replayed from a context of its own (the
    stand-in checks it)."""
    backend, oracle = (
        TensorRTBackend(tiny_artifact, engines=tiny_engines),
        OrtBackend(tiny_artifact, threads=1),
    )
    caches = [item.new_cache(1, 64) for item in (backend, oracle)]
    for repeat in range(5):
        for size in (5, 3):
            step = window((np.arange(size) + repeat)[None], 9, [30])
            mine, theirs = (
                item.refine(cache, slice(0, 1), step)
                for item, cache in zip((backend, oracle), caches, strict=True)
            )
            assert np.abs(mine.confidence - theirs.confidence).max() < 1e-5
    assert gpu.launches == 6


def test_a_step_that_cannot_be_recorded_is_run_as_it_stands(
    gpu, tiny_artifact, tiny_engines, monkeypatch, caplog
):
    backend = TensorRTBackend(tiny_artifact, engines=tiny_engines)
    monkeypatch.setattr(
        gpu, "cudaGraphInstantiate", lambda graph, flags: (gpu.Code.cudaErrorInvalidValue, None)
    )
    cache, step = backend.new_cache(1, 64), window(np.arange(5)[None], 9, [30])
    made = [backend.refine(cache, slice(0, 1), step).confidence for _ in range(5)]
    assert gpu.launches == 0 and all((one == made[0]).all() for one in made) and gpu.executions == 5
    assert len(backend.unrecorded) == 1
    assert len([line for line in caplog.messages if "1 rows by 5 positions cannot be recorded" in line]) == 1


def test_nothing_is_bound_while_a_step_is_recorded(gpu, tiny_artifact, tiny_engines, monkeypatch):
    """Shapes and addresses are set before: setting them inside a capture may be refused, and changes nothing
    that is replayed."""
    for name in ("set_input_shape", "set_tensor_address"):
        real = getattr(stand_ins.Context, name)

        def outside(self, *given, real=real):
            assert self.cuda.captured is None, "bound inside a capture"
            return real(self, *given)

        monkeypatch.setattr(stand_ins.Context, name, outside)
    backend = TensorRTBackend(tiny_artifact, engines=tiny_engines)
    cache, step = backend.new_cache(1, 64), window(np.arange(5)[None], 9, [30])
    for _ in range(3):
        backend.refine(cache, slice(0, 1), step)
    assert gpu.launches == 1


def test_steps_that_are_long_unused_give_their_contexts_back(gpu, tiny_artifact, tiny_engines, monkeypatch):
    monkeypatch.setattr(tensorrt_backend, "_MOST_STEPS", 2)
    backend, oracle = (
        TensorRTBackend(tiny_artifact, engines=tiny_engines),
        OrtBackend(tiny_artifact, threads=1),
    )
    caches = [item.new_cache(1, 64) for item in (backend, oracle)]
    for _ in range(3):
        for size in (3, 4, 5):
            step = window(np.arange(size)[None], 9, [30])
            mine, theirs = (
                item.refine(cache, slice(0, 1), step)
                for item, cache in zip((backend, oracle), caches, strict=True)
            )
            assert np.abs(mine.confidence - theirs.confidence).max() < 1e-5
    assert len([step for step in caches[0].buffers.steps.values() if step is not None]) == 2


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


@pytest.fixture
def on_rtx(gpu, monkeypatch):
    """TensorRT-RTX over the stand-ins."""
    package = stand_ins.tensorrt_rtx(gpu, rtx)
    monkeypatch.setattr(store, "load", lambda backend: package)
    return gpu


def test_tensorrt_rtx_records_by_itself_and_keeps_what_it_compiled(on_rtx, tiny_artifact, tmp_path):
    config = replace(SIZES, backend="tensorrt-rtx", max_length=64)
    made = store.build(tiny_artifact, tmp_path, config)
    assert "REQUIRE_USER_ALLOCATION" in json.loads((made / "shared.engine").read_text())["flags"]
    oracle = OrtBackend(tiny_artifact, threads=1)
    for start in range(2):
        backend = TensorRTRTXBackend(tiny_artifact, engines=tmp_path)
        caches = [item.new_cache(2, 64) for item in (backend, oracle)]
        full, step = window(np.arange(40)[None], rows=np.arange(8)[None]), window(np.arange(5)[None], 9, [30])
        for item, cache in zip((backend, oracle), caches, strict=True):
            item.prefix(cache, slice(0, 1), full)
        for _ in range(4):
            mine, theirs = (
                item.refine(cache, slice(0, 1), step)
                for item, cache in zip((backend, oracle), caches, strict=True)
            )
            assert np.abs(mine.confidence - theirs.confidence).max() < 1e-5
        known = [step.context for step in caches[0].buffers.steps.values() if step is not None]
        assert [context.graphs for context in known] == ["WHOLE_GRAPH_CAPTURE"]
        assert {context.graphs for held in backend._engines.all for context in held.contexts.values()} == {
            "DISABLED"
        }
        assert on_rtx.launches == 0 and on_rtx.captured is None
        del known, caches, mine, theirs
        backend.close()
        (kept,) = made.glob("*.runtime-cache")
        assert kept.read_bytes() == b"k" * (
            start + 1
        )  # the second run began with what the first had compiled
    kept.write_bytes(b"damaged")
    backend = TensorRTRTXBackend(tiny_artifact, engines=tmp_path)
    backend.refine(backend.new_cache(1, 64), slice(0, 1), step)
    backend.close()
    assert kept.read_bytes() == b"k"


def test_engines_on_a_disk_that_cannot_be_written_are_used_all_the_same(
    on_rtx, tiny_artifact, tmp_path, monkeypatch
):
    store.build(tiny_artifact, tmp_path, replace(SIZES, backend="tensorrt-rtx", max_length=64))
    monkeypatch.setattr(
        engines.atomic, "replace", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    backend = TensorRTRTXBackend(tiny_artifact, engines=tmp_path)
    backend.refine(backend.new_cache(1, 64), slice(0, 1), window(np.arange(5)[None], 9, [30]))
    backend.close()


def test_fp32_engines_compute_in_fp32(gpu, golden_checkpoint, tmp_path):
    for dtype in ("fp32", "fp16"):
        artifact = export_quietly(golden_checkpoint, tmp_path / dtype, dtype=dtype)
        made = store.build(artifact, tmp_path / "engines", replace(SIZES, max_length=64))
        assert ("no TF32" in json.loads((made / "shared.engine").read_text())["flags"]) == (dtype == "fp32")


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
    with pytest.raises(DllmError, match=r"is of another max_batch \(1, asked for is 2\)"):
        TensorRTBackend(tiny_artifact, engines=tmp_path, batch=2, length=100)
    with pytest.raises(DllmError, match=r"plugins \(it has none\)"):
        TensorRTBackend(tiny_artifact, engines=tmp_path, steps_per_sync=2)


def test_options_of_newer_versions_are_refused(gpu, tiny_artifact, tmp_path, monkeypatch):
    package = store.load("tensorrt")
    for version, option, least in (("10.9.0", "plugins", "10.16"), ("8.6.1", "strip", "10.0")):
        monkeypatch.setattr(package, "__version__", version)
        with pytest.raises(DllmError, match=f"--{option} needs TensorRT {least}, installed is {version}"):
            store.build(tiny_artifact, tmp_path, replace(SIZES, **{option: True}))


def test_a_driver_that_is_too_old_for_a_kernel_is_told_so(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "cuModuleLoadData", lambda image: (gpu.Code.cudaErrorInvalidValue, None))
    with pytest.raises(
        DllmError, match=r"its PTX is of version 8.7 .8.7 needs CUDA 12.8., the driver runs CUDA 13.0"
    ):
        cuda.CudaDevice().kernel(b"//\n.version 8.7\n.target sm_90\n", "k")


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
