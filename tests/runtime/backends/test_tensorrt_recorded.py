"""Steps recorded as CUDA graphs, and memory that is used again, over the stand-ins."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import stand_in_engine
import stand_ins
from calls import window
from engine_sizes import SIZES

from trt_runtime.backends.ort import OrtBackend
from trt_runtime.backends.tensorrt import engines, recorded, store
from trt_runtime.backends.tensorrt.backend import TensorRTBackend, TensorRTRTXBackend

rtx = pytest.importorskip("tensorrt_rtx_bindings")


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
        real = getattr(stand_in_engine.Context, name)

        def outside(self, *given, real=real):
            assert self.cuda.captured is None, "bound inside a capture"
            return real(self, *given)

        monkeypatch.setattr(stand_in_engine.Context, name, outside)
    backend = TensorRTBackend(tiny_artifact, engines=tiny_engines)
    cache, step = backend.new_cache(1, 64), window(np.arange(5)[None], 9, [30])
    for _ in range(3):
        backend.refine(cache, slice(0, 1), step)
    assert gpu.launches == 1


def test_steps_that_are_long_unused_give_their_contexts_back(gpu, tiny_artifact, tiny_engines, monkeypatch):
    monkeypatch.setattr(recorded, "_MOST_STEPS", 2)
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
