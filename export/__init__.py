"""Checkpoint -> artifact: `dllm-trt export`, `python -m export` or `make export`."""

# trt_runtime before any onnxruntime: it turns its telemetry off
from trt_runtime.system.names import know_installed_name

know_installed_name(__name__)
