"""The kernels that stand in the place of layers of a network, against their NumPy references and against what
the graphs compute without them: the head with its statistics, and attention over the caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def head(settings: Any, rows: int, milliseconds: Callable[..., float]) -> dict[str, Any]:
    """LLaDA-8B's head with random weights: the kernels, and the float32 product with the statistics of its
    logits."""
    from plugins import head_statistics, row_statistics

    vocab, width = (1001, 48) if settings.is_twin else (126_464, 4096)
    dtype = torch.float32 if settings.is_twin else torch.bfloat16
    mask = vocab - 3
    hidden = torch.randn(rows, width, device=settings.device).to(dtype)
    weights = (torch.randn(vocab, width, device=settings.device) * 2 / width**0.5).to(dtype)
    wide = weights.float()
    got = [value.cpu().numpy() for value in head_statistics.launch(hidden, weights, mask)]
    some = slice(0, min(rows, 16))
    expected = head_statistics.reference(hidden[some].float().cpu().numpy(), wide.cpu().numpy(), mask)
    apart = np.abs(expected[1] - expected[2]) > 1e-5 * expected[1]
    wrong = int((got[0][some] != expected[0])[apart].sum())
    error = max(
        float(np.abs(mine[some] - theirs).max()) for mine, theirs in zip(got[1:3], expected[1:3], strict=True)
    )
    if wrong or not error < 1e-4:
        raise SystemExit(f"the kernels of the head are wrong: {wrong} tokens, {error} of a probability")
    plain = lambda: row_statistics.launch(hidden.float() @ wide.T, mask)  # noqa: E731
    return {
        "rows": rows,
        "vocabulary": vocab,
        "hidden": width,
        "error": error,
        "ms": milliseconds(
            lambda: head_statistics.launch(hidden, weights, mask), settings.repeats, settings.device, 4
        ),
        "plain_ms": milliseconds(plain, settings.repeats, settings.device, 4),
    }


def attention(settings: Any, batch: int, milliseconds: Callable[..., float]) -> dict[str, Any]:
    """A refine step's attention of LLaDA-8B's size over random caches: the kernels, and PyTorch's attention
    over whole caches with a mask."""
    from plugins import attention as kernel

    heads, rows, size, capacity = (2, 5, 16, 70) if settings.is_twin else (32, 32, 128, 1280)
    dtype = torch.float32 if settings.is_twin else torch.bfloat16
    query, key, value = (
        torch.randn(batch, heads, count, size, device=settings.device).to(dtype)
        for count in (rows, capacity, capacity)
    )
    lengths = torch.arange(batch, device=settings.device) * (capacity // 2) // batch + capacity // 2 + 1
    got = kernel.launch(query, key, value, lengths, size**-0.5).float().cpu().numpy()
    arrays = (tensor.float().cpu().numpy() for tensor in (query, key, value))
    expected = kernel.reference(*arrays, lengths.cpu().numpy(), size**-0.5)
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    if not error < (1e-5 if settings.is_twin else 2e-2):
        raise SystemExit(f"the kernels of attention are wrong by {error} of the largest value, batch {batch}")
    mask = torch.arange(capacity, device=settings.device) < lengths[:, None]
    plain = torch.nn.functional.scaled_dot_product_attention
    return {
        "batch": batch,
        "heads": heads,
        "rows": rows,
        "head_dim": size,
        "capacity": capacity,
        "error": error,
        "ms": milliseconds(
            lambda: kernel.launch(query, key, value, lengths, size**-0.5),
            settings.repeats,
            settings.device,
            16,
        ),
        "plain_ms": milliseconds(
            lambda: plain(query, key, value, mask[:, None, None]), settings.repeats, settings.device, 16
        ),
    }
