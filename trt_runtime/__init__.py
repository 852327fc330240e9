"""trt_runtime: decode diffusion LLMs from an exported artifact. See `load`, `Model`, `GenerationConfig`,
`DllmError`.

The names are imported when they are first used, so that a command line begins at once and can be interrupted
from then on.
"""

from __future__ import annotations

import os

# ONNX Runtime sends usage data and writes an identifier into the home directory, unless this is set before it
# is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

TYPE_CHECKING = False  # the same in `typing`, whose import takes longer than all of this file
if TYPE_CHECKING:
    from typing import Any

    from trt_runtime.decoding.config import GenerationConfig
    from trt_runtime.errors import DllmError
    from trt_runtime.model import Model, load
    from trt_runtime.result import Result, Update

__version__ = "0.2.0"
__all__ = ["DllmError", "GenerationConfig", "Model", "Result", "Update", "load"]
# the others are in model
_HOMES = {
    "GenerationConfig": "decoding.config",
    "DllmError": "errors",
    "Result": "result",
    "Update": "result",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    value = globals()[name] = getattr(
        importlib.import_module(f"{__name__}.{_HOMES.get(name, 'model')}"), name
    )
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
