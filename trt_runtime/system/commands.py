"""Commands for the user to type, in a form that works for this installation: how to install a missing
package, and what to run next.

A checkout is installed in place (`-e '.[serve]'`), a wheel by its name (`'dllm-trt[serve]'`); suggested
programs exist here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path


def install(*extras: str) -> str:
    """The command that installs optional packages of dllm-trt itself."""
    root, names = checkout(), ",".join(extras)
    return f"{pip()} install " + (
        f"'dllm-trt[{names}]'" if root is None else f"-e {shlex.quote(f'{_shown(root)}[{names}]')}"
    )


def by_driver(kind: str) -> str:
    """The same for TensorRT ('trt', 'rtx'), which has a package per CUDA version: by the major version that
    the driver supports."""
    driver = driver_cuda()
    return install(f"{kind}-cu{12 if driver == 12 else 13}") + (
        "" if driver else f" (a driver of CUDA 12: {kind}-cu12)"
    )


def driver_cuda() -> int:
    """The CUDA major version that the driver supports; 0 if there is none."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value // 1000


def package(*specs: str) -> str:
    """The command that installs packages by name."""
    return f"{pip()} install {shlex.join(specs)}"


def pip() -> str:
    """pip for this Python, in a form that exists here."""
    here = Path(sys.executable).with_name("pip")
    if here.is_file():
        return _program(here)
    if importlib.util.find_spec("pip") is not None:
        return f"{_python()} -m pip"
    if shutil.which("uv"):
        return f"VIRTUAL_ENV={shlex.quote(_shown(Path(sys.prefix)))} uv pip"
    return f"{_python()} -m ensurepip && {_python()} -m pip"


def command(*words: str | Path) -> str:
    """A command of `dllm-trt`, quoted for a shell."""
    script = Path(sys.executable).with_name("dllm-trt")
    program = _program(script) if script.is_file() else f"{_python()} -m trt_runtime.cli"
    return f"{program} {shlex.join(map(str, words))}"


def export(*words: str | Path) -> str:
    """A command of the exporter, quoted for a shell."""
    return command("export", *words)


def checkout() -> Path | None:
    """The checkout that contains this package; None if it was installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    return root if all((root / name).is_file() for name in ("pyproject.toml", "export/__init__.py")) else None


def _python() -> str:
    return _program(Path(sys.executable))


def _program(path: Path) -> str:
    """A program as one would type it here: only its name if that is on the path."""
    on_path = shutil.which(path.name)
    if on_path and os.path.abspath(on_path) == os.path.abspath(path):
        return path.name
    shown = _shown(path)
    return shlex.quote(shown if os.sep in shown else f"./{shown}")


def _shown(path: Path) -> str:
    """A path below the current directory as a relative path, any other unchanged."""
    path, here = Path(os.path.abspath(path)), Path.cwd()
    return (
        str(path.relative_to(here)) if path.is_relative_to(here) and here != Path(here.anchor) else str(path)
    )
