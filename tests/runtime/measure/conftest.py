"""Fixtures of the tests that evaluate."""

from __future__ import annotations

import os
import warnings

import pytest


@pytest.fixture
def offline(monkeypatch):
    """No network, and no warnings of lm-eval and datasets."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    os.environ.pop("HF_ALLOW_CODE_EVAL", None)
