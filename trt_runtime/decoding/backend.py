"""The interface of a backend: it runs both roles over caches that stay on its device.

The public methods check the inputs (names, dtypes, shapes, ranges) and that the outputs are finite; a
subclass only runs the graph. Shape letters: B rows of the call, S rows of the window, R rows asked for, C
capacity, V vocabulary.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from trt_runtime.artifact.manifest import Manifest
from trt_runtime.decoding import device_commit as steps
from trt_runtime.decoding.device_commit import Committed
from trt_runtime.decoding.policies.base import CommitRule, Floats, Ints, RowStats
from trt_runtime.errors import BackendError, DllmError, unknown


@dataclass(frozen=True)
class Window:
    """Inputs of a call, int64: input_ids and position_ids [B, S], write_index and kv_len [B], logit_rows [B,
    R]; row_len [B, S] with block-causal attention, whose graphs take it in place of kv_len. is_checked: the
    same as in an earlier call to the same role and cache, but for the tokens and fewer logit_rows: only the
    tokens are checked."""

    input_ids: Ints
    position_ids: Ints
    write_index: Ints
    kv_len: Ints
    logit_rows: Ints
    row_len: Ints | None = None
    is_checked: bool = False


@dataclass(frozen=True)
class Stats:
    """Outputs of a call: token int64 [B, R], the others float32 [B, R]; logits float32 [B, R, V] if
    requested."""

    token: Ints
    confidence: Floats
    runner_up: Floats
    entropy: Floats
    logits: Floats | None = None

    def row(self, index: int, count: int) -> RowStats:
        """The first `count` statistics of a row (the rest is padding)."""
        arrays = (self.token, self.confidence, self.runner_up, self.entropy)
        return RowStats(*(array[index, :count] for array in arrays))

    def part(self, rows: Ints) -> Stats:
        """The statistics of some rows, without logits."""
        return Stats(self.token[rows], self.confidence[rows], self.runner_up[rows], self.entropy[rows])


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of `batch` slots of `capacity` rows each. `buffers` belong to the backend that made
    it."""

    batch: int
    capacity: int
    buffers: Any


def widened(array: np.ndarray[Any, Any], dtype: str) -> Floats:
    """Numbers of a cache in float32. dtype: of contract.DTYPES; bf16 is stored as uint16."""
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else array.astype(np.float32)


def narrowed(array: Floats, dtype: str) -> np.ndarray[Any, Any]:
    """The reverse, rounded to nearest, ties to even."""
    if dtype != "bf16":
        return array.astype({"fp32": np.float32, "fp16": np.float16}[dtype])
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def pooled(cache: Cache, pool: dict[tuple[int, int], Any]) -> Cache:
    """Let the buffers of `cache` return to `pool` (keyed by batch and capacity) when it is released, because
    allocating GPU memory is slow; returns `cache`. The pool keeps the buffers of one cache. Old rows stay
    masked until they are written again, so reused buffers need no zeroing."""
    key, buffers = (cache.batch, cache.capacity), cache.buffers

    def keep() -> None:
        pool.clear()
        pool[key] = buffers

    weakref.finalize(cache, keep).atexit = False
    return cache


class Backend(ABC):
    """An artifact opened on a device. One call at a time, unless `is_concurrent`."""

    name: ClassVar[str]
    manifest: Manifest
    max_batch: int | None = None  # rows per call; None: any number

    is_on_cpu: bool = False
    is_concurrent: bool = False  # whether several threads may call it, each with caches of its own
    steps_per_sync: int = 1  # refine steps before the host synchronises and sees what they committed

    @property
    def steps_per_look(self) -> int:
        """The former name of steps_per_sync."""
        return self.steps_per_sync

    @steps_per_look.setter
    def steps_per_look(self, steps: int) -> None:
        self.steps_per_sync = steps

    @property
    def gives_logits(self) -> bool:
        """Whether a call can return logits: always with --head logits, otherwise if the backend has them
        anyway."""
        return self.manifest.head == "logits"

    @abstractmethod
    def new_cache(self, batch: int, capacity: int) -> Cache:
        """A cache for `batch` rows of up to `capacity` positions, which lives as long as the object."""

    def resized(self, cache: Cache, capacity: int) -> Cache | None:
        """A cache of another capacity with the same slots and their first rows, for a backend on which masked
        rows cost time; None on other backends and for engines of a fixed capacity. The old cache must not be
        used afterwards."""
        return None

    def copy_slot(self, cache: Cache, source: int, slots: slice) -> bool:
        """Copy the rows of the slot `source` to `slots`. False if the backend cannot."""
        return False

    def read_cache(self, cache: Cache, slots: slice) -> dict[str, Floats]:
        """Keys and values of `slots`, float32 [B, H, C, D] by the names of contract.cache_names, for
        comparisons. Raises DllmError if the backend cannot."""
        raise DllmError(f"the backend {self.name} does not support read_cache: use another backend.")

    def write_cache(self, cache: Cache, slots: slice, arrays: Mapping[str, Floats]) -> None:
        """Write what `read_cache` returned into the cache, rounded to its dtype. Raises DllmError if the
        backend cannot."""
        raise DllmError(f"the backend {self.name} does not support write_cache: use another backend.")

    @abstractmethod
    def close(self) -> None:
        """Free the model. The backend must not be used afterwards."""

    @abstractmethod
    def _forward(self, role: str, cache: Cache, slots: slice, window: Window, want_logits: bool) -> Stats: ...

    def forward(
        self, role: str, cache: Cache, slots: slice, window: Window, *, want_logits: bool = False
    ) -> Stats:
        """One forward by the graph of `role`, of the manifest's graphs. `slots`: the contiguous range of
        slots that the B rows of the call occupy. Raises DllmError for inputs outside the contract,
        BackendError if the device fails.

        prefix: the windows are whole canvases, written to the cache from row 0 and attending to themselves.
        refine: the windows' keys and values are written at write_index, then attend to the cache up to
        kv_len.
        """
        tokens = window.input_ids
        if not window.is_checked or tokens.min() < 0 or tokens.max() >= self.manifest.model.vocab_size:
            if role not in self.manifest.graphs:
                raise unknown("role", role, self.manifest.graphs)
            if role == "prefix" and window.write_index.any():
                raise DllmError(f"prefix pass: write_index is {window.write_index.tolist()}, expected zeros.")
            self._check(cache, slots, window, want_logits)
        return self._finite(self._forward(role, cache, slots, window, want_logits))

    def prefix(self, cache: Cache, slots: slice, window: Window, *, want_logits: bool = False) -> Stats:
        """A prefix pass: `forward` by the prefix graph."""
        return self.forward("prefix", cache, slots, window, want_logits=want_logits)

    def refine(self, cache: Cache, slots: slice, window: Window, *, want_logits: bool = False) -> Stats:
        """A refine step: `forward` by the refine graph."""
        return self.forward("refine", cache, slots, window, want_logits=want_logits)

    def refine_steps(
        self, cache: Cache, slots: slice, window: Window, rules: Sequence[CommitRule]
    ) -> Committed:
        """Up to `steps_per_sync` refine steps, each followed by its commit, with one rule per row. Each
        window begins with the row's block.

        Column j of `logit_rows` is the row whose statistics belong to position j of the block. A row whose
        block has no mask left is idle; idle steps do not count as its forwards. No more steps are run than
        the row with the most masks can need.
        """
        if len(rules) != len(window.input_ids) or any(
            not 0 < rule.limit <= window.logit_rows.shape[1] for rule in rules
        ):
            raise DllmError(
                f"{len(rules)} rules for {len(window.input_ids)} rows: expected one rule per row, each of 1 "
                f"to R positions."
            )
        self._check(cache, slots, window, want_logits=False)
        return self._refine_steps(cache, slots, window, rules)

    def _refine_steps(
        self, cache: Cache, slots: slice, window: Window, rules: Sequence[CommitRule]
    ) -> Committed:
        """The default: step by step on the host. A device may override it."""
        ids, arrays = window.input_ids.copy(), steps.commit_arrays(rules, window.logit_rows.shape[1])
        mask = self.manifest.decoding.mask_token_id
        for _ in range(steps.needed(rules, ids, mask, self.steps_per_sync)):
            stats = self._forward("refine", cache, slots, replace(window, input_ids=ids), want_logits=False)
            steps.commit(ids, stats.token, stats.confidence, arrays, mask)
        return steps.finished(arrays, rules, ids)

    def _check(self, cache: Cache, slots: slice, window: Window, want_logits: bool) -> None:
        model = self.manifest.model
        batch, rows = slots.stop - slots.start, window.input_ids.shape[-1]
        if not 0 <= slots.start < slots.stop <= cache.batch:
            raise DllmError(
                f"slots {slots.start}:{slots.stop} of a cache with {cache.batch} slots: expected a range "
                f"within it, not empty."
            )
        shapes = {
            "input_ids": (batch, rows),
            "position_ids": (batch, rows),
            "write_index": (batch,),
            "kv_len": (batch,),
            "logit_rows": (batch, window.logit_rows.shape[-1]),
        }
        limits = {
            "input_ids": (0, model.vocab_size - 1),
            "position_ids": (0, model.max_length - 1),
            "write_index": (0, cache.capacity - rows),
            "kv_len": (1, cache.capacity),
            "logit_rows": (0, rows - 1),
        }
        if self.manifest.decoding.is_block_causal:
            if window.row_len is None:
                raise DllmError("row_len is missing, which graphs with block-causal attention take.")
            shapes["row_len"], limits["row_len"] = shapes["input_ids"], limits["kv_len"]
        for name, shape in shapes.items():
            array = getattr(window, name)
            if array.dtype != np.int64 or array.shape != shape or 0 in shape:
                raise DllmError(
                    f"{name}: {array.dtype} {list(array.shape)}, expected int64 {list(shape)} with no empty "
                    f"axis."
                )
            low, high = limits[name]
            if array.min() < low or array.max() > high:
                raise DllmError(f"{name}: values {array.min()} to {array.max()}, expected {low} to {high}.")
        if want_logits and not self.gives_logits:
            raise DllmError("logits were requested, but the artifact has none: export it with --head logits.")

    @staticmethod
    def _finite(stats: Stats) -> Stats:
        for name in ("confidence", "runner_up", "entropy"):
            # a sum of finite numbers of this size is finite
            if not math.isfinite(getattr(stats, name).sum(dtype=np.float64)):
                raise BackendError(
                    f"the model returned a {name} that is NaN or infinite: the weights are damaged or "
                    "overflow in this dtype: check them with 'dllm-trt verify', or export with DTYPE=bf16 or "
                    "fp32."
                )
        return stats
