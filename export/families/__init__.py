"""Families: one file an architecture, found by its `model_type` (lower case). See docs/adding-a-model.md."""

from __future__ import annotations

import importlib
import pkgutil

from trt_runtime.errors import unknown

from .base import Family


def names() -> list[str]:
    """The model types that exist: the modules of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def find(model_type: str) -> Family:
    """The family of a config.json's `model_type`. Raises DllmError for an unknown one."""
    if model_type.lower() not in names():
        raise unknown("model type", model_type, names(), "To add one, write export/families/<model_type>.py.")
    family = importlib.import_module(f"{__package__}.{model_type.lower()}").FAMILY
    assert isinstance(family, Family)
    return family
