"""The command `dllm-trt`."""
