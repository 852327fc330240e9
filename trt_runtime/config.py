"""The former name of `trt_runtime.decoding.config`, for one release: model repositories of Triton written by
0.1 import it."""

from trt_runtime.decoding.config import *  # noqa: F403 # whatever was public under the former name
