"""A user's prompts with their right answers, which tuning and quantising are measured on."""

from __future__ import annotations

import codecs
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_runtime.errors import DllmError

MATCHES = ("exact", "json")


@dataclass(frozen=True)
class Example:
    """A prompt (text or token ids) and its right answers; None if the file gives none."""

    prompt: str | list[int]
    answers: tuple[str, ...] | None


def read(path: Path) -> list[Example]:
    """JSON lines {"prompt", "answers": [..] or "answer"}, or one prompt per line. In JSON a prompt may be
    token ids. Raises DllmError."""
    return [_example(line, f"{path}: line {number}") for number, line in numbered_lines(path)]


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, with their line numbers. Raises DllmError, also if there
    is none."""
    try:
        data = path.read_bytes()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4096]:
            raise DllmError(
                f"{path}: not UTF-8 text (it is UTF-16 or binary): save it as UTF-8, one prompt or JSON "
                f"object per line."
            )
        lines = split_lines(data.decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DllmError(
            f"{path}: cannot be read ({error}): give a UTF-8 text file, one prompt or JSON object per line."
        ) from error
    if not lines:
        raise DllmError(f"{path}: contains no prompt: give one per line.")
    return lines


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises DllmError, also if there is none."""
    return [line for _, line in numbered_lines(path)]


def split_lines(text: str) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers. Only a line feed ends a line: U+2028 and the like are
    part of a prompt."""
    lines = (line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n"))
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _example(line: str, where: str) -> Example:
    if not line.lstrip().startswith("{"):
        return Example(line, None)
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise DllmError(
            f'{where}: not valid JSON ({error}): expected {{"prompt": "...", "answer": "..."}}.'
        ) from error
    if not isinstance(fields, dict):
        raise DllmError(f'{where}: expected an object {{"prompt": "...", "answer": "..."}}.')
    prompt, answers = (
        fields.get("prompt"),
        fields.get("answers", [fields["answer"]] if "answer" in fields else None),
    )
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not (isinstance(prompt, str) or is_ids) or (
        answers is not None
        and (not isinstance(answers, list) or not all(isinstance(a, str) for a in answers) or not answers)
    ):
        raise DllmError(
            f'{where}: expected {{"prompt": "...", "answers": ["...", ...]}}; the answers are optional.'
        )
    return Example(typing.cast(str | list[int], prompt), None if answers is None else tuple(answers))


def is_right(answer: str, example: Example, match: str) -> bool:
    """Whether an answer is one of an example's right answers. match: one of MATCHES."""
    return any(_is_same(answer, right, match) for right in example.answers or ())


def _is_same(answer: str, right: str, match: str) -> bool:
    """exact: the same text. json: the same value, in any order of keys and with any white space; a repeated
    key makes it invalid."""
    if match == "exact":
        return answer.strip() == right.strip()
    try:
        return bool(json.loads(answer, object_pairs_hook=_unique) == json.loads(right))
    except ValueError:
        return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key is repeated")
    return dict(pairs)
