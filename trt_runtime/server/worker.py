"""The former name of `trt_runtime.serving.worker`, for one release."""

from trt_runtime.serving.worker import Event, Job, Worker

__all__ = ["Event", "Job", "Worker"]
