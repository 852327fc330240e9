"""Files of recorded cases in every format: how they are read as today's cases, and answered in their own
form.

Format 1: recordings of Fast-dLLM's v1 code, and what earlier versions recorded. Format 2: recordings of the
official code of later models. Format 3: what this version records. Which official loop recorded a case of
format 1 or 2, and how it differs from ours: official/.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trt_runtime.artifact.manifest import BLOCK_CAUSAL, FULL
from trt_runtime.errors import DllmError
from trt_runtime.measure import case_fields
from trt_runtime.measure.case_fields import Case
from trt_runtime.measure.official import families_of, loop_of
from trt_runtime.measure.official.base import unread

FORMAT = 3


@dataclass(frozen=True)
class CaseFile:
    """The cases of a file. cases: in today's form; recorded: the same as they were written; format: that they
    were written in; skipped: how many are of other families; unread: fields that nothing here knows, and how
    many cases have them; beside: other lists of cases in the file, which are not replayed, and their
    lengths."""

    cases: list[Case]
    recorded: list[Case]
    format: int
    skipped: int = 0
    unread: dict[str, int] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)

    def answer(self, case: Case, result: Case) -> Case:
        """The result of one of the cases in the form of the file."""
        if self.format == FORMAT:
            return result
        number = next(i for i, own in enumerate(self.cases) if own is case)
        return loop_of(self.recorded[number]).answer(case, result)


def read_file(path: Path, family: str | None = None) -> CaseFile:
    """A file of cases: {"format": ..., "cases": [...]} or a plain list, which has format 1. family: cases of
    other families are left out, unread. Raises DllmError, which names the case."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DllmError(f"{path}: not readable as JSON ({error}): give a file of recorded cases.") from error
    cases = read.get("cases") if isinstance(read, dict) else read
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases) or not cases:
        raise DllmError(
            f'{path}: contains no cases: expected {{"cases": [...]}} (record some with replay --record).'
        )
    written = read.get("format", 1) if isinstance(read, dict) else 1
    if type(written) is not int or not 1 <= written <= FORMAT:
        raise DllmError(
            f"{path}: format is {str(written)[:40]}, expected 1 to {FORMAT}: update dllm-trt, or record the "
            f"cases again."
        )
    own, today = [], []
    for number, case in enumerate(cases):
        try:
            if family is None or family in (families_of(case) or (family,)):
                own.append(case)
                today.append(as_case(case, written, family))
        except DllmError as error:
            raise DllmError(f"{path}: case {case.get('id', f'number {number}')}: {error}") from error
    beside = read.items() if isinstance(read, dict) else ()
    return CaseFile(
        today,
        own,
        written,
        len(cases) - len(own),
        dict(Counter(name for case in own for name in unread(case))),
        {key: len(value) for key, value in beside if key.endswith("_cases") and isinstance(value, list)},
    )


def read_cases(path: Path) -> list[Case]:
    """The cases of a file. Raises DllmError."""
    return read_file(path).cases


def as_case(case: Case, written: int, family: str | None = None) -> Case:
    """A case of a file in today's form, of a model of `family`. Raises DllmError if it is not valid; the
    message does not name the case."""
    ours = case if written == FORMAT else loop_of(case).read(case)
    if family is not None or "family" in ours:
        ours = {**ours, "family": family or families_of(case)[0]}
    case_fields.check(ours)
    return ours


def has_block_causal_attention(case: Case) -> bool:
    """Whether a case says that it was recorded with block-causal attention."""
    return case.get("attention") == BLOCK_CAUSAL or case.get("mode") in ("block", "block_dual")


def has_full_attention(case: Case) -> bool:
    """Whether a case says that it was recorded with full attention."""
    return case.get("attention") == FULL or case.get("mode") in ("prefix", "dual")


def described(file: CaseFile) -> list[str]:
    """What a user should know about what was not read, a line each."""
    lines: list[str] = []

    def counted(items: dict[str, Any]) -> str:
        return ", ".join(f"{name} ({count})" for name, count in items.items())

    if file.unread:
        lines.append(f"not read: fields of cases that no loop here has: {counted(file.unread)}")
    if file.beside:
        lines.append(f"not replayed: {counted(file.beside)}; only 'cases' are")
    return lines
