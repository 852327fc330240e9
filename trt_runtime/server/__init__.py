"""The former name of `trt_runtime.serving`, for one release: model repositories of Triton written by 0.1
import its modules."""
