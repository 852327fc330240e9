"""Polygraphy's data loader: the recorded calls of a role, as `dllm-trt polygraphy` wrote them.

polygraphy run refine.onnx ... --data-loader-script load_windows.py:load_refine
"""

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def load(role):
    """One feed a recorded call. Caches come in the dtype of the graph; NumPy has no bfloat16, so those come
    as torch tensors."""
    dtype = json.loads((HERE / "facts.json").read_text())["dtype"]
    for file in sorted((HERE / "windows").glob(f"{role}-*.npz")):
        with np.load(file) as arrays:
            yield {
                name: _cast(arrays[name], dtype) if name.startswith("cache_") else arrays[name]
                for name in arrays.files
            }


def _cast(array, dtype):
    if dtype == "fp16":
        return array.astype(np.float16)
    if dtype == "bf16":
        import torch

        return torch.from_numpy(array).to(torch.bfloat16)
    return array


def load_prefix():
    return load("prefix")


def load_refine():
    return load("refine")


load_data = load_refine
