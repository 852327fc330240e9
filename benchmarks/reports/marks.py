"""Generated text in a document, between two marks."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def insert(document: Path, begin: str, end: str, generated: str) -> None:
    """Replace the text between the two marks of a document. Exits with an error unless each occurs once."""
    text = document.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(
            f"error: {document}: has {begin} {text.count(begin)} times and {end} {text.count(end)} times, "
            f"expected once each: put them where the table goes."
        )
    before, after = text.split(begin)[0], text.split(end)[1]
    document.write_text(f"{before}{begin}\n{generated}\n{end}{after}", encoding="utf-8")
