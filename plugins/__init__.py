"""GPU kernels (Triton), each with its NumPy reference. Every graph is correct without them. Needs triton
3.6."""

from trt_runtime.system.names import know_installed_name

know_installed_name(__name__)
