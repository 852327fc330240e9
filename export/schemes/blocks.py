"""Weights in blocks along their inputs, each with a scale of its own, chosen for the least squared error.
Shape letters: N outputs, K inputs of a layer; G blocks per row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .base import Array

# what the largest magnitude of a block is rounded to, as a fraction of the range: clipping a few large
# numbers gives the others finer steps
_SHARES = (0.85, 0.93, 1.0, 1.07, 1.15, 1.25)
_TINY = 1e-20


def count(inputs: int, block: int) -> int:
    """G: blocks per row, with the last one padded."""
    return -(-inputs // block)


def rounded(
    rows: Iterator[Array],
    shape: tuple[int, int],
    block: int,
    bits: int,
    stored: Callable[[Array], Array] = lambda scale: scale,
) -> tuple[Array, Array]:
    """A weight [N, K] as signed whole numbers int8 [N, G, block] (the last block padded with zeros), and
    their scales float32 [N, G]. stored: converts scales to the values that will be stored."""
    outputs, inputs = shape
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    blocks = count(inputs, block)
    whole, scales, at = (
        np.empty((outputs, blocks, block), np.int8),
        np.empty((outputs, blocks), np.float32),
        0,
    )
    for piece in rows:
        there = slice(at, at := at + len(piece))
        padded = np.zeros((len(piece), blocks * block), np.float32)
        padded[:, :inputs] = piece
        x = padded.reshape(len(piece), blocks, block)
        largest = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(_TINY))
        least = np.full((len(piece), blocks), np.inf, np.float32)
        for share in _SHARES if bits < 8 else (1.0,):
            scale = stored(largest / np.float32(high * share)).astype(np.float32)
            q = np.clip(np.rint(x / scale), low, high)
            error = np.square(q * scale - x).sum(-1)
            better = error < least
            least = np.where(better, error, least)
            whole[there] = np.where(better[..., None], q, whole[there]).astype(np.int8)
            scales[there] = np.where(better, scale[..., 0], scales[there])
    return whole, scales


def packed(whole: Array) -> Array:
    """Numbers of four bits, two per byte along the last axis, the first in the lower half: uint8 [..., n /
    2]."""
    low, high = whole[..., 0::2].astype(np.uint8) & 15, whole[..., 1::2].astype(np.uint8) & 15
    return low | high << 4
