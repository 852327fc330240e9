"""A call of an engine: the engine and profile for it, and the addresses of its small tensors.

All inputs and outputs of a call except the caches are in one arena of pinned memory and its copy on the GPU,
so that one transfer moves all of them. Shape letters as in contract.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_runtime.artifact.contract import TensorSpec
from trt_runtime.backends import cuda
from trt_runtime.backends.tensorrt import store
from trt_runtime.backends.tensorrt.engines import Engines, OpenEngine
from trt_runtime.decoding.backend import Window
from trt_runtime.errors import DllmError

Arrays = dict[str, npt.NDArray[Any]]
Shape = tuple[int, int, int]  # B, S, R of a call


@dataclass(frozen=True)
class Call:
    """A call whose inputs are in pinned memory.

    engine, profile: where it runs; shape: as it is run. inputs, outputs: arrays in pinned memory by name;
    input_addresses, output_addresses: their addresses on the GPU. input_bytes, output_bytes: the bytes of
    each arena in use.
    """

    engine: OpenEngine
    profile: int
    shape: Shape
    inputs: Arrays
    input_addresses: dict[str, int]
    input_bytes: int
    outputs: Arrays
    output_addresses: dict[str, int]
    output_bytes: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self.engine.name, self.profile, self.shape


class Calls:
    """Prepares calls of the engines, one at a time: they share two arenas, as large as the largest profile
    needs."""

    def __init__(self, engines: Engines, device: cuda.CudaDevice, trt: Any) -> None:
        self._engines, self._device, self._trt = engines, device, trt
        self.inputs, self.outputs = self._arena(outputs=False), self._arena(outputs=True)

    def prepare(self, role: str, window: Window) -> Call:
        """Choose an engine and a profile, and write the inputs into pinned memory. Raises DllmError if no
        profile fits the call."""
        self._device.enter()
        batch, positions = window.input_ids.shape
        asked = window.logit_rows.shape[1]
        engine, profile = self._choose(role, (batch, positions, asked))
        shape = (batch, positions, self._asked_for(role, engine.profiles[profile].asked[2], positions, asked))
        call = Call(
            engine,
            profile,
            shape,
            *self.inputs.place(self._small(engine.inputs, engine, shape)),
            *self.outputs.place(self._small(engine.outputs, engine, shape)),
        )
        call.inputs["logit_rows"][...] = 0
        call.inputs["logit_rows"][:, :asked] = window.logit_rows
        for name in call.inputs.keys() - {"logit_rows"}:
            call.inputs[name][...] = getattr(window, name)
        return call

    @staticmethod
    def _asked_for(role: str, most: int, positions: int, asked: int) -> int:
        """The number of positions with statistics, rounded up (the rest repeats position 0): with fewer
        shapes, recorded steps are reused more often."""
        return most if role == "refine" and most <= positions else min(1 << (asked - 1).bit_length(), most)

    def _choose(self, role: str, shape: Shape) -> tuple[OpenEngine, int]:
        """The engine with the narrowest profile for a call of `shape`."""
        fitting = [
            (profile.rows[2], index, engine)
            for engine in self._engines.all
            if engine.role == role or engine.name == store.SHARED
            for index, profile in enumerate(engine.profiles)
            if all(n <= most for n, most in zip(shape, profile.largest, strict=True))
        ]
        if not fitting:
            asked = "{} rows, {} positions, statistics of {}".format(*shape)
            raise DllmError(
                f"no profile of the engines in {self._engines.directory.name} fits a {role} call of {asked}: "
                "build them with a larger --max-batch, --max-length, --block-length or --max-rows."
            )
        _, index, engine = min(fitting, key=lambda item: item[0])
        return engine, index

    def _small(
        self, specs: list[TensorSpec], engine: OpenEngine, shape: Shape
    ) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Element type and shape of each tensor that is not a cache. TensorRT 8 has int32 where the graph has
        int64."""
        sizes = dict(zip("BSR", shape, strict=True))
        return {
            spec.name: (
                np.dtype(self._trt.nptype(engine.engine.get_tensor_dtype(spec.name))),
                tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes),
            )
            for spec in specs
            if not is_cache(spec)
        }

    def _arena(self, outputs: bool) -> cuda.Arena:
        """Memory for the small inputs or outputs in the largest shapes of the profiles."""
        sizes = [
            cuda.Arena.size_of(
                self._small(engine.outputs if outputs else engine.inputs, engine, profile.largest)
            )
            for engine in self._engines.all
            for profile in engine.profiles
        ]
        return self._device.arena(max(sizes))


def is_cache(spec: TensorSpec) -> bool:
    """Whether an input or output is a cache."""
    return "." in spec.name
