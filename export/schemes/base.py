"""What a scheme of quantised linear layers provides: what it stores for each weight, and the nodes of a
layer.

A scheme has three methods: `parts` (names, types and shapes of what it stores in place of a weight, from
shapes alone, so that graphs can be built first), `quantize` (the parts, from the weight, some rows at a
time), and `linear` (the nodes). The decoder asks for layers by name and does not know the scheme.

Shape letters: T tokens (rows of activations), K inputs, N outputs of a layer; its weight is [N, K].
"""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trt_runtime.errors import DllmError

from ..graph.linears import Linears

Array = np.ndarray[Any, Any]
FILE_NAME = "calibration.npz"
_SIDES = ("inputs", "weights")


@dataclass(frozen=True)
class Calibration:
    """Per layer, [K] each: the largest magnitude of its inputs over the calibration canvases, and of its
    weight's columns."""

    inputs: Mapping[str, Array] = field(default_factory=dict)
    weights: Mapping[str, Array] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write it into an artifact, so that the weights can be made again and compared."""
        sides = {side: getattr(self, side) for side in _SIDES}
        np.savez(
            directory / FILE_NAME,
            **{f"{side}/{name}": array for side, arrays in sides.items() for name, array in arrays.items()},
        )

    @classmethod
    def read(cls, artifact: Path) -> Calibration:
        """Read what `write` wrote. Raises DllmError."""
        path = artifact / FILE_NAME
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as file_arrays:
                arrays = [(*name.split("/", 1), file_arrays[name]) for name in file_arrays.files]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DllmError(f"{path}: cannot be read ({error}): export it again or copy it again.") from error
        return cls(*({name: array for where, name, array in arrays if where == side} for side in _SIDES))


@dataclass(frozen=True)
class StoredPart:
    """A stored tensor: its type (export/weights/plan.py, STORED) and shape."""

    dtype: str
    shape: tuple[int, ...]


class Scheme(Linears, ABC):
    """A way of quantising. target: one of manifest.TARGETS; dtypes: the supported types of activations and
    caches."""

    name: ClassVar[str]
    title: ClassVar[str]
    target: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    is_calibrated: ClassVar[bool] = False
    covers_head: ClassVar[bool] = True  # otherwise the head is not quantised
    fuses_experts: ClassVar[bool] = False  # by an operator that computes the chosen ones only

    def __init__(self, dtype: str, calibration: Calibration | None = None) -> None:
        self.dtype, self.calibration = dtype, calibration or Calibration()

    @abstractmethod
    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredPart]:
        """What is stored in place of a layer's weight [N, K], or of experts' [E, N, K]: suffix -> part."""

    @abstractmethod
    def quantize(self, name: str, shape: tuple[int, int], rows: Iterator[Array]) -> dict[str, Array]:
        """The parts of a layer, computed from its weight in pieces of whole rows, float32 [n, K]."""

    def factors(self, name: str) -> tuple[Array | None, Array | None]:
        """Factors for the rows [N] and the columns [K] of a weight, applied before anything else (for a
        vector: to its elements, as rows)."""
        return None, None
