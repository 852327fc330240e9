"""A cache plan of somebody else's: the cache is rebuilt in every forward, which is what decoding without one
comes to."""

from __future__ import annotations

from typing import ClassVar

from trt_runtime.decoding.cache_plan import CachePlan, Forward, RowView, prefix_pass


class Always(CachePlan):
    """A prefix pass each time, over the block and all after it."""

    name: ClassVar[str] = "always"

    def next_forward(self, row: RowView) -> Forward:
        return prefix_pass(
            row, row.first_candidates if row.opens_block else row.inside, row.after(self.suffix)
        )
