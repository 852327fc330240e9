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
from typing import Any

from trt_runtime.errors import DllmError
from trt_runtime.system import commands, program
from trt_runtime.system.names import PREFIX, TOOLS


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
    except Exception as error:  # of packages that do not fit one another, such as pydantic and pydantic-core
        if (broken := _package_of(error)) is None:
            raise
        said = " ".join(str(error).split())
        raise DllmError(
            f"{what} needs the package {broken}, but importing it failed ({type(error).__name__}: {said}): "
            f"install it again, {commands.pip()} install --force-reinstall {broken}."
        ) from error


def _installed_name(module: str) -> str:
    """The name under which a module can be imported here; a checkout's folder is put on the path if
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
    """The installed package whose code raised; None for code of this project."""
    raised = traceback.extract_tb(error.__traceback__)[-1].filename
    _, separator, inside = raised.rpartition(f"{os.sep}site-packages{os.sep}")
    name = inside.split(os.sep)[0].removesuffix(".py") if separator else ""
    if not name or name.removeprefix(PREFIX) in ("trt_runtime", *TOOLS):
        return None
    from importlib import metadata  # takes milliseconds, which only an error should cost

    return (metadata.packages_distributions().get(name) or [name])[0]
