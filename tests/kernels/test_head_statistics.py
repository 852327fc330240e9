"""The kernels of the head with its statistics in Triton's interpreter against their reference, and compiled
for every GPU that is supported."""

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
from plugins import head_statistics
worst, wrong, rows = 0.0, 0, 0
rng = np.random.default_rng(int(sys.argv[1]))
for count, width, vocab, kind, dtype in json.loads(sys.argv[2]):
    types = {"fp32": (np.float32, 1e-5), "fp16": (np.float16, 1e-5)}
    numpy_type, allowed = types[dtype]
    hidden = rng.standard_normal((count, width)).astype(numpy_type)
    head = (rng.standard_normal((vocab, width)) * rng.choice([0.05, 0.5])).astype(numpy_type)
    mask = int(rng.integers(0, vocab))
    exact = kind in ("ties", "equal", "twins")
    if exact:  # small whole numbers: sums are exact, and many are equal
        hidden, head = np.round(hidden), np.round(2 * head)
    elif kind == "mask":  # the mask is best
        head[mask] = 8 * np.sign(hidden.astype(np.float32).sum(0))
    if kind == "equal":
        head[:] = head[0]
    if kind == "twins":  # the best token once more in another tile
        head[: vocab // 2] = head[vocab - vocab // 2 :]
    made = head_statistics.launch(torch.from_numpy(hidden), torch.from_numpy(head), mask)
    got = [value.numpy() for value in made]
    expected = head_statistics.reference(hidden, head, mask)
    # sums in another order may choose the other of two that are nearly equal
    close = np.abs(expected[1] - expected[2]) < 1e-6 * expected[1]
    wrong += int(((got[0] != expected[0]) & ~(close & (not exact))).sum()) + int((got[0] == mask).sum())
    for mine, theirs in zip(got[1:3], expected[1:3]):
        worst = max(worst, float(np.abs(mine - theirs).max()))
    worst = max(worst, float((np.abs(got[3] - expected[3]) / np.maximum(1, expected[3])).max()))
    rows += count
hidden = torch.zeros(3, 32)
hidden[1, 5] = float("nan")
got = [value.numpy() for value in head_statistics.launch(hidden, torch.ones(300, 32), 7)]
nan = [np.isnan(value).tolist() for value in got[1:]]
print(json.dumps({"rows": rows, "wrong": wrong, "worst": worst, "nan": nan}))
"""
KINDS = ("random", "ties", "mask", "equal", "twins")


def _interpreted(seed: int, cases: list) -> dict:
    printed = interpreted(_INTERPRET, str(seed), json.dumps(cases))
    return json.loads(printed)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_kernels_equal_their_reference(dtype):
    """Borders of tiles of rows, of the vocabulary and of the width; ties within a tile and between tiles, the
    mask as the best token, NaN."""
    cases = [
        [count, width, vocab, kind, dtype]
        for kind in KINDS
        for count, width, vocab in ((1, 16, 11), (33, 40, 128), (5, 64, 129), (32, 48, 1000))
    ]
    made = _interpreted(0, cases)
    assert made["rows"] == sum(case[0] for case in cases)
    assert made["wrong"] == 0 and made["worst"] < 2e-5
    assert made["nan"] == [[False, True, False]] * 3


def test_the_reference_is_what_the_statistics_of_the_logits_are():
    from plugins import head_statistics, row_statistics

    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((9, 24)), rng.standard_normal((70, 24))
    for mine, theirs in zip(
        head_statistics.reference(hidden, head, 3), row_statistics.reference(hidden @ head.T, 3), strict=True
    ):
        assert (mine == theirs).all()


@pytest.mark.parametrize("compute_capability", [80, 86, 87, 89, 90, 120])
def test_they_compile_without_a_gpu(compute_capability):
    """For LLaDA-8B's head in bf16 and Dream's in fp16."""
    script = (
        "from plugins.head_statistics import HeadSizes, compiled\n"
        "for sizes in (HeadSizes(126464, 4096, 126336, 'bf16'), HeadSizes(152064, 3584, 151666, 'fp16')):\n"
        f"    for kernel in ('partial', 'merge'): print(compiled(kernel, sizes, {compute_capability}).ptx)"
    )
    printed = compiled(script)
    for name in ("partial_126464_4096_126336_bf16", "merge_152064_3584_151666_fp16"):
        assert printed.count(f".visible .entry dllm_head_{name}(") == 1
    assert printed.count(f".target sm_{compute_capability}") == 4
    # the products of 16-bit numbers run on tensor cores, summed in float32
    assert "bf16.bf16.f32" in printed or "wgmma" in printed
