"""What a lowering has to know of the heads that attend."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Heads:
    """scale: of the scores, as far as queries are not scaled already. head_dim: D. group: query heads of a KV
    head. dtype: of queries, keys and values. softmax_type: of the mask, and of softmax."""

    scale: float
    head_dim: int
    group: int
    dtype: ir.DataType
    softmax_type: ir.DataType
