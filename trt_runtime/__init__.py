"""trt_runtime: decode diffusion LLMs from an exported artifact. See `load`, `Model`, `GenerationConfig`, `DllmError`."""

from __future__ import annotations

from trt_runtime.config import GenerationConfig
from trt_runtime.errors import DllmError
from trt_runtime.model import Model, Result, Update, load

__version__ = "0.1.0"
__all__ = ["DllmError", "GenerationConfig", "Model", "Result", "Update", "load"]
