"""The former name of `trt_runtime.serving.metrics`, for one release."""

from trt_runtime.serving.metrics import Metrics

__all__ = ["Metrics"]
