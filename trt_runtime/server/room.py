"""The former name of `trt_runtime.serving.room`, for one release."""

from trt_runtime.serving.room import longest_of

__all__ = ["longest_of"]
