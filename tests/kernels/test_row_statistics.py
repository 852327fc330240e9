"""The kernel of row statistics in Triton's interpreter against its reference, and compiled for every GPU that
is supported."""

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
from plugins import row_statistics
worst, wrong, rows = 0.0, 0, 0
rng = np.random.default_rng(int(sys.argv[1]))
for vocab, count, repeats in json.loads(sys.argv[2]):
    for _ in range(repeats):
        logits = (rng.normal(size=(count, vocab)) * rng.choice([0.1, 4.0, 40.0])).astype(np.float32)
        mask = int(rng.integers(0, vocab))
        kind = rng.integers(0, 5)
        if kind == 0:
            logits = np.round(logits)  # ties
        elif kind == 1:
            logits[:, mask] = 99.0  # the mask is best
        elif kind == 2:
            logits[:] = 1.5  # all equal
        elif kind == 3:
            logits[rng.random(logits.shape) < 0.3] = -np.inf
            logits[:, (mask + 1) % vocab] = 0.0
        got = [value.numpy() for value in row_statistics.launch(torch.from_numpy(logits), mask)]
        expected = row_statistics.reference(logits, mask)
        wrong += int((got[0] != expected[0]).sum()) + int((got[0] == mask).sum())
        pairs = zip(got[1:3], expected[1:3])
        worst = max(worst, *(float(np.abs(mine - theirs).max()) for mine, theirs in pairs))
        worst = max(worst, float((np.abs(got[3] - expected[3]) / np.maximum(1, expected[3])).max()))
        rows += count
logits = np.zeros((3, 5000), np.float32)
logits[1, 4321] = np.nan
got = [value.numpy() for value in row_statistics.launch(torch.from_numpy(logits), 7)]
nan = [np.isnan(value).tolist() for value in got[1:]]
print(json.dumps({"rows": rows, "wrong": wrong, "worst": worst, "nan": nan}))
"""


def _interpreted(seed: int, sizes: list[tuple[int, int, int]]) -> dict:
    printed = interpreted(_INTERPRET, str(seed), json.dumps(sizes))
    return json.loads(printed)


@pytest.mark.parametrize(
    ("seed", "sizes"),
    [
        (0, [(11, 60, 5), (1000, 20, 3), (4096, 6, 3), (4097, 6, 3), (20_000, 4, 2)]),
        (1, [(126_464, 3, 2), (152_064, 3, 2)]),
    ],
    ids=["small rows", "the vocabularies of LLaDA and Dream"],
)
def test_the_kernel_equals_its_reference(seed, sizes):
    """Ties, the mask as the best token, equal rows, -inf, block borders, NaN."""
    made = _interpreted(seed, sizes)
    assert made["rows"] == sum(count * repeats for _, count, repeats in sizes)
    assert made["wrong"] == 0 and made["worst"] < 1e-5
    assert made["nan"] == [[False, True, False]] * 3


def test_the_reference_is_what_the_graphs_return(golden_backend):
    """On real logits of a graph: the same token, and statistics to rounding."""
    from calls import window

    from plugins import row_statistics

    call = window(np.random.default_rng(2).integers(0, 1000, (2, 30)))
    stats = golden_backend.prefix(golden_backend.new_cache(2, 30), slice(0, 2), call, want_logits=True)
    token, *others = row_statistics.reference(stats.logits.reshape(60, -1), 1000)
    assert (token == stats.token.reshape(-1)).all()
    for mine, theirs in zip(others, (stats.confidence, stats.runner_up, stats.entropy), strict=True):
        assert np.abs(mine - theirs.reshape(-1)).max() < 1e-4


@pytest.mark.parametrize("compute_capability", [80, 86, 87, 89, 90, 120])
def test_it_compiles_without_a_gpu(compute_capability):
    script = (
        f"from plugins import row_statistics; print(row_statistics.compiled(152_064, 7, "
        f"{compute_capability}).ptx)"
    )
    printed = compiled(script)
    assert printed.count(".visible .entry dllm_row_statistics_152064_7") == 1
    assert f".target sm_{compute_capability}" in printed
