"""Checkpoint -> artifact. A tool of the checkout: `python -m export --help`."""

import trt_runtime  # noqa: F401  (before any onnxruntime: it turns its telemetry off)
