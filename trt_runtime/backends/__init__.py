"""Backends: what runs a graph. Found in one lazy table; a missing package says what to install."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from trt_runtime import advice, program
from trt_runtime.backends.base import Backend
from trt_runtime.errors import DllmError, unknown

# name -> module, class, and the extra to install when its import fails
_TABLE = {
    "ort": ("trt_runtime.backends.ort", "OrtBackend", "ort"),
    "tensorrt": ("trt_runtime.backends.tensorrt", "TensorRTBackend", "trt"),
    "tensorrt-rtx": ("trt_runtime.backends.tensorrt", "TensorRTRTXBackend", "rtx"),
    "torch": ("export.reference", "TorchBackend", "reference"),
}


def names() -> list[str]:
    return sorted(_TABLE)


def open_backend(name: str, artifact: Path, **options: Any) -> Backend:
    """Open an artifact on a backend. Options are the backend's own (see its class); raises DllmError."""
    if name not in _TABLE:
        raise unknown("backend", name, _TABLE)
    module, cls, extra = _TABLE[name]
    of_package = module.startswith(f"{__package__}.")
    if extra in ("trt", "rtx"):
        mend = advice.by_driver(extra)
    else:
        mend = advice.install(extra) if of_package else advice.tool("export", extra)
    opener = getattr(import_tool(module, f"the backend '{name}'", mend), cls)
    known = set(inspect.signature(opener).parameters) - {"artifact"}
    if strange := sorted(set(options) - known):
        raise unknown(f"option of the backend '{name}'", strange[0], known)
    backend: Backend = opener(Path(artifact), **options)
    return backend


def import_tool(module: str, what: str, mend: str) -> Any:
    """Import a module that may not be there: an optional package's user, or a tool of the checkout (export/). `mend`: what to do then."""
    checkout = Path(__file__).resolve().parents[2]
    tool = module.split(".", maxsplit=1)[0]  # export or plugins: tools of the checkout, beside this package
    if tool != __package__.split(".")[0] and (checkout / tool / "__init__.py").is_file() and str(checkout) not in sys.path:
        sys.path.append(str(checkout))
    try:
        with program.importing():
            return importlib.import_module(module)
    except ImportError as error:
        raise DllmError(f"{what} needs a package that is missing ({error}): {mend}.") from error
    except Exception as error:  # of packages that do not fit one another, as pydantic's check of its other half
        if (broken := _package_of(error)) is None:
            raise
        said = " ".join(str(error).split())
        raise DllmError(
            f"{what} needs the package {broken}, which does not load ({type(error).__name__}: {said}): install it again, "
            f"{advice.pip()} install --force-reinstall {broken}."
        ) from error


def _package_of(error: BaseException) -> str | None:
    """The installed package whose code raised, None for code of this project."""
    raised = traceback.extract_tb(error.__traceback__)[-1].filename
    _, found, inside = raised.rpartition(f"{os.sep}site-packages{os.sep}")
    name = inside.split(os.sep)[0].removesuffix(".py") if found else ""
    if not name or name in ("trt_runtime", "export", "plugins"):
        return None
    from importlib import metadata  # milliseconds that only an error takes

    return (metadata.packages_distributions().get(name) or [name])[0]
