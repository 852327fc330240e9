"""Families: one file per architecture, found by its `model_type` (lower case). See
docs/how-to/add-a-family.md.

An installed package adds a family by an entry point of the group `dllm_trt.families`: the model type, and a
Family.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from trt_runtime.errors import unknown
from trt_runtime.registry import Registry

from .base import Family

_PARTS = ("base", "transformers_family", "transformers_network", "experts_network")
FAMILIES: Registry[Family] = Registry(
    "model type",
    "dllm_trt.families",
    "an instance of export.families.base.Family",
    lambda item: isinstance(item, Family),
)


def names() -> list[str]:
    """The known model types: the modules of this package, and those that installed packages add."""
    own = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _PARTS]
    return sorted({*own, *FAMILIES.names()})


def name_of(model_type: str) -> str:
    """A family's name: its `model_type` in lower case, with underscores."""
    return model_type.lower().replace("-", "_")


def find(model_type: str) -> Family:
    """The family of a `model_type`. Raises DllmError for an unknown one."""
    return _named(family_name(model_type))


def of(config: Mapping[str, Any]) -> tuple[str, Family]:
    """The family of a config.json, and its name: by the classes in `architectures`, else by `model_type` and,
    where two networks have the same, by a key. Raises DllmError for an unknown model type."""
    classes = config.get("architectures")
    named = {item for item in classes if isinstance(item, str)} if isinstance(classes, list) else set()
    for name in names() if named else ():
        if named & set(_named(name).architectures):
            return name, _named(name)
    model_type = name_of(config["model_type"])
    for name in names():
        told_by = _named(name).told_by
        if told_by is not None and told_by[0] == model_type and config.get(told_by[1]) is not None:
            return name, _named(name)
    name = family_name(config["model_type"])
    return name, _named(name)


def family_name(model_type: str) -> str:
    """The name of the family of a `model_type`, which may be one of several. Raises DllmError."""
    name = name_of(model_type)
    if name in names():
        return name
    for own in names():
        if name in map(name_of, _named(own).aliases):
            return own
    raise unknown("model type", model_type, names(), "To add one, write export/families/<model_type>.py.")


def _named(name: str) -> Family:
    """The family of a name that exists."""
    if name not in FAMILIES.names():
        FAMILIES.register(importlib.import_module(f"{__package__}.{name}").FAMILY, name)
    return FAMILIES.find(name)
