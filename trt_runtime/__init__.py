"""trt_runtime: decode diffusion LLMs from an exported artifact. See `load`, `Model`, `GenerationConfig`, `DllmError`."""

from __future__ import annotations

import os

# ONNX Runtime sends usage data, and writes an identifier into the home directory, unless this is set before it is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from trt_runtime.config import GenerationConfig
from trt_runtime.errors import DllmError
from trt_runtime.model import Model, Result, Update, load

__version__ = "0.1.0"
__all__ = ["DllmError", "GenerationConfig", "Model", "Result", "Update", "load"]
