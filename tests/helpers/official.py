"""Checkpoints whose official decoding was recorded, and how they are exported."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from places import GOLDENS, export_quietly

from trt_runtime.measure import recordings
from trt_runtime.measure.case_fields import Case


@dataclass(frozen=True)
class Official:
    """name: of its files; count: of the recorded cases of its kind of attention; told: options of its
    export."""

    name: str
    count: int
    told: dict = field(default_factory=dict)
    is_block_causal: bool = False

    @property
    def checkpoint(self) -> Path:
        return GOLDENS / f"{self.name}_tiny"

    @property
    def file(self) -> Path:
        return GOLDENS / f"{self.name}_cases.json"

    def recording(self) -> dict:
        """The file of recorded cases, as it stands."""
        return json.loads(self.file.read_text())

    def cases(self) -> list[Case]:
        """Those with its kind of attention, as ours."""
        return [case for case in recordings.read_cases(self.file) if self.keeps(case)]

    def keeps(self, case: Case) -> bool:
        """Whether a case, as it is recorded or as ours, is of its kind of attention."""
        if "api" in case and case["api"] in ("mdlm", "bd3lm"):
            return (case["api"] == "bd3lm") == self.is_block_causal
        is_block_causal = recordings.has_block_causal_attention(case)
        return not recordings.has_full_attention(case) if self.is_block_causal else not is_block_causal

    def export(self, out: Path, **options) -> Path:
        return export_quietly(self.checkpoint, out, **self.told, **options)


FULL = [Official("illada", 21), Official("a2d_qwen3", 20, {"attention": "full"})]
BLOCK_CAUSAL = [
    Official("sdar", 59, {}, True),
    Official("fastdllm_v2", 60, {}, True),
    Official("a2d_qwen3", 25, {"attention": "block_causal"}, True),
]
EXPERTS = [
    Official("lladamoe", 48),
    Official("rnd1", 19),
    Official("llada2", 44, {}, True),
    Official("llada21", 40, {}, True),
]
BY_NAME = {official.name: official for official in BLOCK_CAUSAL}


def name_of(official: Official) -> str:
    """For the ids of parametrised tests."""
    return f"{official.name}-{'block-causal' if official.is_block_causal else 'full'}"
