"""The commit kernel in Triton's interpreter against its reference, bit for bit, and compiled for every GPU
that is supported."""

from __future__ import annotations

import json
import re

import pytest
from triton_processes import compiled, interpreted

pytest.importorskip("triton")
pytest.importorskip("torch")

_INTERPRET = """
import json
import numpy as np
import torch
from plugins import commit
from trt_runtime.decoding import device_commit as steps
from trt_runtime.decoding.policies.base import CommitRule
rng, MASK, wrong, rows, stopped, committed = np.random.default_rng(1), 126336, 0, 0, 0, 0
shapes = [(1, 0, 3, 4), (8, 0, 12, 8), (32, 0, 8, 4), (32, 9, 8, 3), (33, 3, 4, 2), (100, 1, 2, 1)]
for columns, extra, batch, repeats in shapes:
    for _ in range(repeats):
        ids = rng.integers(0, 1000, (batch, columns + extra))
        ids[rng.random(ids.shape) < rng.choice([0.1, 0.6, 1.0])] = MASK
        token = rng.integers(0, 126464, (batch, columns))
        confidence = rng.random((batch, columns)).astype(np.float32)
        if rng.random() < 0.4:
            confidence = np.round(confidence * 8) / 8  # ties, and confidences on the threshold
        if rng.random() < 0.4:
            confidence[rng.integers(batch), rng.integers(columns)] = rng.choice([np.nan, np.inf])
        if rng.random() < 0.4:
            token[rng.integers(batch), rng.integers(columns)] = MASK
        rules = [
            CommitRule(
                rng.choice(["fixed", "threshold", "factor"]),
                int(rng.integers(1, columns + 1)),
                float(rng.choice([0.25, 0.5, 0.9, 1.5])),
                int(rng.integers(0, 40)),
                int(rng.integers(1, 12)),
                int(rng.integers(0, 4)),
            )
            for _ in range(batch)
        ]
        held = steps.commit_arrays(rules, columns)
        arrays = (ids, token, confidence, held.plan, held.value, held.state, held.committed)
        mine = [torch.from_numpy(array.copy()) for array in arrays]
        for _ in range(3):
            commit.launch(*mine, MASK)
            commit.reference(ids, token, confidence, held, MASK)
            got = (mine[0], mine[5], mine[6])
            wrong += sum(int((a.numpy() != b).sum()) for a, b in zip(got, (ids, held.state, held.committed)))
        rows += batch
        stopped += int((held.state[:, 1] < 0).sum())
        committed += int((held.committed >= 0).sum())
print(json.dumps({"wrong": wrong, "rows": rows, "stopped": stopped, "committed": committed}))
"""


def test_the_kernel_equals_its_reference():
    """All three rules, ties, blocks shorter than their columns, windows longer than their block, NaN, the
    mask proposed."""
    printed = interpreted(_INTERPRET)
    made = json.loads(printed)
    assert made["wrong"] == 0 and made["rows"] > 150 and made["stopped"] > 3 and made["committed"] > 400


@pytest.mark.parametrize("compute_capability", [80, 86, 87, 89, 90, 120])
def test_it_compiles_without_a_gpu(compute_capability):
    script = (
        f"from plugins import commit; k = commit.compiled(126336, 32, {compute_capability}); "
        f"print(k.threads, k.shared); print(k.ptx)"
    )
    printed = compiled(script)
    assert printed.startswith("32 ") and f".target sm_{compute_capability}" in printed
    (declared,) = re.findall(r"\.entry dllm_commit_126336_32\((.*?)\)", printed, re.S)
    assert [line.split()[1] for line in declared.strip().splitlines()] == [".u64"] * 7 + [".u32"] * 2
