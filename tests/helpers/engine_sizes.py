"""Engine sizes that are large enough for every recorded case."""

from __future__ import annotations

from trt_runtime.backends.tensorrt.store import BuildConfig

SIZES = BuildConfig(max_batch=4, max_length=256, block_length=64, max_rows=256)
