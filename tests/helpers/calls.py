"""Hand-written calls of a backend."""

from __future__ import annotations

import numpy as np

from trt_runtime.artifact import contract
from trt_runtime.decoding.backend import Window


def window(ids, start=0, kv_len=None, rows=None, write_index=None) -> Window:
    ids = np.atleast_2d(np.asarray(ids, np.int64))
    batch, size = ids.shape
    row = np.tile(np.arange(size), (batch, 1))
    rows = row if rows is None else np.asarray(rows, np.int64)
    kv = np.full(batch, start + size) if kv_len is None else np.asarray(kv_len, np.int64)
    return Window(ids, row + start, np.full(batch, start if write_index is None else write_index), kv, rows)


def logits(backend, cache, call, slots=None) -> np.ndarray:
    return backend.run(cache, slots or slice(0, call.input_ids.shape[0]), call, [contract.LOGITS])[
        contract.LOGITS
    ]
