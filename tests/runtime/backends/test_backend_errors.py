"""A backend's own failure and the user's error are different classes: only the first is caught as such."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
from calls import window

from trt_runtime.backends.tensorrt.recorded import Recorder
from trt_runtime.decoding.backend import Backend, Stats
from trt_runtime.errors import BackendError, DllmError


def test_a_session_that_fails_and_numbers_that_are_none_are_the_backends(golden_backend, monkeypatch):
    cache, call = golden_backend.new_cache(1, 8), window(np.arange(8)[None])
    monkeypatch.setattr(
        golden_backend,
        "_session",
        SimpleNamespace(
            run_with_iobinding=lambda binding: (_ for _ in ()).throw(
                RuntimeError("cudaErrorIllegalAddress\nmore")
            ),
            io_binding=golden_backend._session.io_binding,
        ),
    )
    with pytest.raises(
        BackendError, match=r"ONNX Runtime failed in the refine graph: cudaErrorIllegalAddress$"
    ):
        golden_backend.forward("prefix", cache, slice(0, 1), call)
    nan = np.full((1, 8), np.nan, np.float32)
    with pytest.raises(BackendError, match="a confidence"):
        Backend._finite(Stats(np.zeros((1, 8), np.int64), nan, nan, nan))


def test_inputs_outside_the_contract_are_the_callers(golden_backend):
    cache, call = golden_backend.new_cache(1, 8), window(np.arange(8)[None])
    for role, said in (
        ("prefil", "unknown role 'prefil': did you mean 'prefix'"),
        ("refine", "slots 0:2 of a cache with 1 slots"),
    ):
        with pytest.raises(DllmError, match=said) as error:
            golden_backend.forward(role, cache, slice(0, 2), call)
        assert not isinstance(error.value, BackendError)


@pytest.mark.parametrize(
    ("error", "is_caught"),
    [(BackendError("cudaErrorStreamCaptureUnsupported"), True), (DllmError("yours"), False)],
)
def test_a_step_that_cannot_be_recorded_is_run_layer_by_layer_and_an_error_of_the_users_is_told(
    error, is_caught, tmp_path, caplog
):
    def record(work):
        raise error

    engines = SimpleNamespace(
        records_itself=False, context=lambda *_: "shared", new_context=lambda *_, recorded: "own"
    )
    device = SimpleNamespace(record=record, synchronize=lambda: None)
    recorder, steps, ran = Recorder(engines, device, tmp_path, is_on=True), OrderedDict(), []
    call = SimpleNamespace(engine=None, profile=0, key=("refine", 0, (1, 8, 8)), shape=(1, 8, 8))
    recorder.queue(call, steps, "key", lambda context: None, ran.append)
    if is_caught:
        for _ in range(2):
            recorder.queue(call, steps, "key", lambda context: None, ran.append)
        assert ran == ["shared", "own", "own"] and recorder.unrecorded == {call.key}
        assert "cannot be recorded as a CUDA graph" in caplog.text
    else:
        with pytest.raises(DllmError, match="yours"):
            recorder.queue(call, steps, "key", lambda context: None, ran.append)
