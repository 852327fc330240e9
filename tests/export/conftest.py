"""Fixtures of the tests of the exporter."""

from __future__ import annotations

import json

import pytest

from trt_runtime.measure import replay

_RECORDED: dict[str, dict] = {}


@pytest.fixture
def recorded_once(monkeypatch):
    """Verification's recordings on the PyTorch reference, made once per checkpoint, dtype and set of cases.
    The reference reads the checkpoint alone, so a fault in an artifact cannot change them."""
    real = replay.record

    def record(backend, cases):
        cases = list(cases)
        files = [(file, file.stat().st_mtime_ns) for file in backend.source.checkpoint.path.iterdir()]
        facts = [files, backend.dtype, backend.manifest.decoding, cases]
        key = json.dumps(facts, default=repr)
        if key not in _RECORDED:
            _RECORDED[key] = real(backend, cases)
        return _RECORDED[key]

    monkeypatch.setattr(replay, "record", record)
