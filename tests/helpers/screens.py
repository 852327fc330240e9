"""Stand-ins for a terminal's screen."""

from __future__ import annotations

import io
import unicodedata

from pseudo_terminal import Terminal
from wcwidth import wcwidth


def wrapped(text: str, columns: int) -> list[str]:
    """How a terminal lays a text out: naively, a character at a time."""
    rows = []
    for line in text.split("\n"):
        row, used = "", 0
        for character in line:
            if used + wcwidth(character) > columns:
                rows.append(row)
                row, used = "", 0
            row, used = row + character, used + wcwidth(character)
        rows.append(row)
    return [row.rstrip() for row in rows]


def bare(text: str) -> str:
    return unicodedata.normalize("NFC", "".join(text.split()))


class _Screen(io.StringIO):
    """Standard output on a terminal of pyte's, which can be resized."""

    def __init__(self, columns, lines):
        super().__init__()
        self.terminal, self.size = Terminal(columns, lines), (columns, lines)

    def isatty(self):
        return True

    def write(self, text):
        self.terminal.feed(text.encode())
        return len(text)

    def resize(self, columns, lines):
        self.terminal.screen.resize(lines, columns)
        self.size = (columns, lines)
