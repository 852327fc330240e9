"""Fixtures of the tests that evaluate."""

from __future__ import annotations

import os
import sys
import warnings

import pytest


@pytest.fixture
def offline(monkeypatch):
    """No network, and no warnings of lm-eval and datasets."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # both read the variable at import; without this, a missing dataset is requested again and again
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    os.environ.pop("HF_ALLOW_CODE_EVAL", None)


@pytest.fixture(autouse=True)
def no_list_of_packages(monkeypatch):
    """lm-eval runs `pip list` for a part of its results that dllm-trt drops: a second per evaluation."""
    if evaluator := sys.modules.get("lm_eval.evaluator"):
        monkeypatch.setattr(evaluator, "add_env_info", lambda storage: None)
