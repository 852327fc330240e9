"""The commit kernel of plugins/commit.py on a GPU: loaded from PTX that was compiled ahead of time, with its
arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from trt_runtime.backends import cuda
from trt_runtime.decoding import device_commit as steps
from trt_runtime.decoding.device_commit import CommitArrays
from trt_runtime.decoding.policies.base import CommitRule
from trt_runtime.errors import DllmError

_KINDS = {"plan": np.int32, "value": np.float64, "state": np.int32, "committed": np.int32}


@dataclass(frozen=True)
class Running:
    """A call's arrays in pinned memory, and their addresses on the device."""

    arrays: CommitArrays
    addresses: dict[str, int]
    used: int


class CommitKernel:
    """The kernel for blocks of up to `columns` positions. facts: entry, threads, shared and columns, as in
    engine.json."""

    def __init__(self, device: cuda.CudaDevice, facts: dict[str, Any], ptx: bytes, max_batch: int) -> None:
        self.device, self.max_batch, self.columns, self._facts = (
            device,
            max_batch,
            int(facts["columns"]),
            facts,
        )
        self._kernel = device.kernel(ptx, facts["entry"])
        self._arena = device.arena(cuda.Arena.size_of(self._tensors(max_batch, 2 * self.columns)))

    def begin(self, rules: Sequence[CommitRule], columns: int) -> Running:
        """Queue the upload of a call's plan, for statistics [B, columns]. Raises DllmError for blocks larger
        than the kernel supports."""
        most = max(rule.limit for rule in rules)
        if most > self.columns:
            raise DllmError(
                f"a block has {most} positions, the commit kernel supports {self.columns}: build the engines "
                f"with --block-length {most}."
            )
        planned = steps.commit_arrays(rules, columns)
        arrays, addresses, used = self._arena.place(self._tensors(len(rules), columns))
        for name, array in arrays.items():
            array[...] = getattr(planned, name)
        self.device.upload(self._arena.device.address, self._arena.host[:used])
        return Running(CommitArrays(**arrays), addresses, used)

    def queue(self, running: Running, ids: int, rows: int, token: int, confidence: int) -> None:
        """Queue a commit over windows [B, rows] at address `ids`, from statistics at `token` and
        `confidence`."""
        batch, columns = running.arrays.committed.shape
        addresses = [ids, token, confidence, *(running.addresses[item.name] for item in fields(CommitArrays))]
        self._kernel.queue(batch, self._facts["threads"], self._facts["shared"], addresses, (rows, columns))

    def end(self, running: Running) -> None:
        """Queue the download of what was committed."""
        self.device.download(self._arena.host[: running.used], self._arena.device.address)

    @staticmethod
    def _tensors(batch: int, columns: int) -> cuda.Tensors:
        shapes = {"plan": (batch, 4), "value": (batch,), "state": (batch, 2), "committed": (batch, columns)}
        return {name: (np.dtype(kind), shapes[name]) for name, kind in _KINDS.items()}
