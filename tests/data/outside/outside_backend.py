"""A backend of somebody else's: ONNX Runtime's, with a count of its forwards by role."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from trt_runtime.backends.ort import OrtBackend
from trt_runtime.backends.spec import CPU, BackendSpec, Layout
from trt_runtime.decoding.backend import Cache, Stats, Window


class Counting(OrtBackend):
    """counts: forwards by role. `threads` as OrtBackend has it."""

    name = "counting"

    def __init__(self, artifact: Path, *, threads: int | None = None) -> None:
        super().__init__(artifact, threads=threads)
        self.counts: Counter[str] = Counter()

    def _forward(self, role: str, cache: Cache, slots: slice, window: Window, want_logits: bool) -> Stats:
        self.counts[role] += 1
        return super()._forward(role, cache, slots, window, want_logits)


SPEC = BackendSpec(
    "counting",
    "outside_backend:Counting",
    lambda: "pip install outside",
    ("threads",),
    devices=(CPU,),
    is_concurrent=True,
    layouts=(Layout("counting, one session", "counting", on_cpu=True),),
)
