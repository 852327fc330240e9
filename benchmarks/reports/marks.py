"""Where made text goes in a document: between two marks."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def insert(document: Path, begin: str, end: str, made: str) -> None:
    """Put `made` between the two marks of a document."""
    text = document.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(
            f"error: {document}: has not the marks {begin} and {end} once each: put them where the table "
            f"goes."
        )
    before, after = text.split(begin)[0], text.split(end)[1]
    document.write_text(f"{before}{begin}\n{made}\n{end}{after}", encoding="utf-8")
