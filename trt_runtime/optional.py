"""Imports of what may not be installed: the packages of an extra, and the exporter and the kernels.

The exporter and the kernels are the folders `export` and `plugins` of a checkout. A wheel holds the same
files as the packages `dllm_trt_export` and `dllm_trt_plugins`, because the folders' own names are too general
for site-packages. Their files import one another by relative imports, so they work under either name; code of
yours imports them by the installed name, which a checkout knows too.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from trt_runtime.errors import DllmError
from trt_runtime.system import commands, program

TOOLS, PREFIX = ("export", "plugins"), "dllm_trt_"


def import_optional(module: str, what: str, fix: str) -> Any:
    """Import a module whose packages may be missing. `what` needs it; `fix`: the command that installs them.
    Raises DllmError.

    Modules of the exporter and the kernels are named as in a checkout: 'export.parity.verify'.
    """
    try:
        with program.importing():
            return importlib.import_module(_installed_name(module))
    except ImportError as error:
        raise DllmError(f"{what} needs a package that is missing ({error}): {fix}.") from error
    except (
        Exception
    ) as error:  # of packages that do not fit one another, as pydantic's check of its other half
        if (broken := _package_of(error)) is None:
            raise
        said = " ".join(str(error).split())
        raise DllmError(
            f"{what} needs the package {broken}, which does not load ({type(error).__name__}: {said}): "
            f"install it again, "
            f"{commands.pip()} install --force-reinstall {broken}."
        ) from error


def _installed_name(module: str) -> str:
    """The name under which a module is imported here; a checkout's folder is put on the path if it is
    needed."""
    tool = module.split(".", maxsplit=1)[0]
    if tool not in TOOLS:
        return module
    checkout = commands.checkout()
    if checkout is None or f"{PREFIX}{tool}" in sys.modules:
        return f"{PREFIX}{module}"
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))
    return module


def _package_of(error: BaseException) -> str | None:
    """The installed package whose code raised, None for code of this project."""
    raised = traceback.extract_tb(error.__traceback__)[-1].filename
    _, found, inside = raised.rpartition(f"{os.sep}site-packages{os.sep}")
    name = inside.split(os.sep)[0].removesuffix(".py") if found else ""
    if not name or name.removeprefix(PREFIX) in ("trt_runtime", *TOOLS):
        return None
    from importlib import metadata  # takes milliseconds, which only an error should cost

    return (metadata.packages_distributions().get(name) or [name])[0]


class InstalledName(MetaPathFinder, Loader):
    """Makes `dllm_trt_export...` another name of the modules `export...` of a checkout, and so for the
    kernels: one module, two names."""

    def __init__(self, tool: str) -> None:
        self.tool = tool
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        own = PREFIX + self.tool
        return ModuleSpec(name, self) if name == own or name.startswith(f"{own}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(spec.name.removeprefix(PREFIX))
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It was executed under its first name, which it keeps."""
        module.__spec__ = self._specs.pop(PREFIX + module.__name__)


def know_installed_name(package: str) -> None:
    """For the packages of a checkout, when they are imported: code that imports them by the installed name
    gets the same modules."""
    if package in TOOLS and not any(
        isinstance(finder, InstalledName) and finder.tool == package for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, InstalledName(package))
