"""Checkpoint -> artifact: `dllm-trt export`, `python -m export` or `make export`."""

from trt_runtime.optional import (
    know_installed_name,
)  # trt_runtime before any onnxruntime: it turns its telemetry off

know_installed_name(__name__)
