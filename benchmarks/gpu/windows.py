"""Inputs of every backend in report.py, built with NumPy alone: the packed Python of TensorRT 8.6 has no
torch."""

from __future__ import annotations

import numpy as np

from trt_runtime.artifact.manifest import Manifest
from trt_runtime.decoding.backend import Window
from trt_runtime.decoding.blocks import row_len_of


def windows(manifest: Manifest, batch: int, canvas: int, block: int, seed: int = 0) -> tuple[Window, Window]:
    """A prefix pass and a refine step over random tokens. The second half of the canvas is masked; the block
    is its beginning."""
    rng, mask = np.random.default_rng(seed), manifest.decoding.mask_token_id
    allowed = np.setdiff1d(np.arange(min(manifest.model.vocab_size, 50_000)), [mask])
    start = canvas // 2
    ids = rng.choice(allowed, (batch, canvas)).astype(np.int64)
    ids[:, start:] = mask
    rows = np.arange(start, start + block)
    lengths, shift = np.full(batch, canvas), manifest.decoding.logit_shift
    positions, steps = np.tile(np.arange(canvas), (batch, 1)), np.tile(rows, (batch, 1))
    full = Window(
        ids,
        positions,
        np.zeros(batch, np.int64),
        lengths,
        np.tile(rows - shift, (batch, 1)),
        row_len_of(manifest.decoding, positions, lengths),
    )
    some = ids[:, rows].copy()
    some[:, ::3] = rng.choice(allowed, some[:, ::3].shape)  # as if a third were committed
    at = np.tile(np.maximum(np.arange(block) - shift, 0), (batch, 1))
    seen = row_len_of(manifest.decoding, steps, lengths)
    return full, Window(some, steps, np.full(batch, start), lengths, at, seen)
