"""The kernels of attention over the cache in Triton's interpreter against their reference, and compiled for
every GPU that is supported."""

from __future__ import annotations

import json

import numpy as np
import pytest
from triton_processes import compiled, interpreted

pytest.importorskip("triton")
pytest.importorskip("torch")

# the interpreter is chosen when a kernel is defined: a process of its own
_INTERPRET = """
import json, sys
import numpy as np
import torch
from plugins import attention
rng = np.random.default_rng(0)
worst = 0.0
for batch, heads, rows, size, capacity, lengths, dtype in json.loads(sys.argv[1]):
    numpy_type = {"fp32": np.float32, "fp16": np.float16}[dtype]
    query, key, value = (
        rng.standard_normal((batch, heads, count, size)).astype(numpy_type)
        for count in (rows, capacity, capacity)
    )
    kv_len = np.array(lengths, np.int64)
    for b, length in enumerate(lengths):  # what is behind the valid keys must not matter
        key[b, :, length:], value[b, :, length:] = np.nan, np.inf
    got = attention.launch(*map(torch.from_numpy, (query, key, value, kv_len)), size**-0.5).numpy()
    for b, length in enumerate(lengths):
        key[b, :, length:], value[b, :, length:] = 0, 0
    expected = attention.reference(query, key, value, kv_len, size**-0.5)
    assert got.dtype == numpy_type and not np.isnan(got).any()
    assert all((got[b] == 0).all() for b, length in enumerate(lengths) if not length)
    worst = max(worst, float(np.abs(got - expected).max()) / {"fp32": 1e-5, "fp16": 4e-3}[dtype])
query = torch.zeros(1, 2, 3, 16)
query[0, 1, 2, 0] = float("nan")
plain = torch.ones(1, 2, 40, 16)
got = attention.launch(query, plain, plain, torch.tensor([33]), 0.25).isnan().any(-1).flatten().tolist()
print(json.dumps({"worst": worst, "nan": got}))
"""


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_kernels_equal_their_reference(dtype):
    """Borders of tiles of rows, of keys and of parts; unequal lengths, one key, none; sizes that are no power
    of two."""
    cases = [
        [1, 1, 1, 16, 64, [1], dtype],
        [3, 2, 33, 32, 70, [70, 31, 0], dtype],
        [2, 3, 8, 24, 640, [257, 600], dtype],
        [2, 1, 32, 64, 1280, [1280, 255], dtype],
    ]
    printed = interpreted(_INTERPRET, json.dumps(cases))
    made = json.loads(printed)
    assert made["worst"] < 1
    assert made["nan"] == [False] * 5 + [True]


def test_the_reference_is_pytorchs_own_attention():
    import torch

    from plugins import attention

    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, 4, count, 16)) for count in (6, 20, 20))
    kv_len = np.array([20, 13])
    mask = torch.arange(20)[None, None, None] < torch.tensor(kv_len)[:, None, None, None]
    attend = torch.nn.functional.scaled_dot_product_attention
    theirs = attend(*map(torch.from_numpy, (query, key, value)), mask)
    mine = attention.reference(query, key, value, kv_len, 0.25)
    assert np.abs(mine - theirs.numpy()).max() < 1e-12


@pytest.mark.parametrize("compute_capability", [80, 86, 87, 89, 90, 120])
def test_they_compile_without_a_gpu(compute_capability):
    """For LLaDA-8B in bf16 and Dream-7B in fp16, over caches of 1,280 and 4,096."""
    script = (
        "from plugins.attention import AttentionSizes, compiled\n"
        "llada, dream = (32, 128, 1280, 0.0625, 'bf16'), (4, 128, 4096, 0.0625, 'fp16')\n"
        "for sizes in (AttentionSizes(*llada), AttentionSizes(*dream)):\n"
        f"    for kernel in ('attend', 'combine'): print(compiled(kernel, sizes, {compute_capability}).ptx)"
    )
    printed = compiled(script)
    for name in ("attend_32_128_1280_0p0625_bf16", "combine_4_128_4096_0p0625_fp16"):
        assert printed.count(f".visible .entry dllm_attention_{name}(") == 1
    assert printed.count(f".target sm_{compute_capability}") == 4
