"""Arithmetic with the same result on every processor, so that an artifact can be made again, and verified, on
another machine."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def power(base: Array | float, exponent: Array | float) -> Array:
    """base ** exponent of float32 numbers, rounded to float32 from float64. The last bit of NumPy's own
    float32 power differs between AVX2 and AVX-512."""
    powers: Array = np.power(
        np.asarray(base, np.float32).astype(np.float64), np.asarray(exponent, np.float32).astype(np.float64)
    )
    return powers.astype(np.float32)
