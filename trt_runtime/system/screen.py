"""Text that changes in place on a terminal: at most a screen of it is redrawn, finished lines scroll out
once.

    frame = text so far, of which the first `settled` characters never change again
    rows  = the text laid out by the terminal's width; the rows on the screen are the live region
    draw  = write what differs between the region's old rows and its new ones; settled rows scroll out above

Between frames the cursor is at the region's first cell: there it stays with its line when the terminal is
resized, whether or not the terminal wraps its lines anew, and clearing from there on leaves no remains.
"""

from __future__ import annotations

import os
import shutil
import sys
import termios
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TextIO

from wcwidth import wcwidth

PLAIN, DIM, BOLD, BRIGHT = "", "\x1b[2m", "\x1b[1m", "\x1b[1;32m"
_RESET, _CLEAR, _HIDE, _SHOW = "\x1b[0m", "\x1b[J", "\x1b[?25l", "\x1b[?25h"
_TAB = 8

Span = tuple[str, str]  # text, style


@dataclass(frozen=True)
class Cell:
    """A character with its combining characters, its width in columns, and the number of characters of the
    text it was made from."""

    text: str
    style: str
    width: int
    taken: int = 1

    @property
    def is_simple(self) -> bool:
        """Whether every terminal agrees about the width."""
        return len(self.text) == self.width or (len(self.text) == 1 and self.width == 2)


@dataclass(frozen=True)
class ScreenRow:
    """A line of the screen. end: how many characters of the laid-out text are in this row and those above;
    broken: by the width, not by the text."""

    cells: tuple[Cell, ...]
    end: int
    broken: bool

    @property
    def plain(self) -> ScreenRow:
        return ScreenRow(tuple(replace(cell, style=PLAIN) for cell in self.cells), self.end, self.broken)


def is_terminal(out: TextIO) -> bool:
    """Whether lines can be redrawn on `out`."""
    return out.isatty() and os.environ.get("TERM") != "dumb"


def bright() -> str:
    """The style of new text: coloured, unless the user wants no colour (no-color.org)."""
    return BOLD if os.environ.get("NO_COLOR") else BRIGHT


def size_of(out: TextIO) -> tuple[int, int]:
    """Columns and lines of the terminal behind `out`, at this moment."""
    try:
        columns, lines = os.get_terminal_size(out.fileno())
    except (OSError, ValueError, AttributeError):  # not a file, or not a terminal
        columns, lines = 0, 0
    if not (columns and lines):
        columns, lines = shutil.get_terminal_size()
    return max(2, columns), max(1, lines)


@contextmanager
def unechoed() -> Iterator[None]:
    """Inside the block, typed characters are not echoed, because they would appear in the middle of the
    drawing; they stay readable."""
    try:
        number = sys.stdin.fileno()
        before = (
            termios.tcgetattr(number) if os.tcgetpgrp(number) == os.getpgrp() else None
        )  # a background job would be stopped
    except (AttributeError, OSError, ValueError, termios.error):  # not a terminal
        before = None
    if before is None:
        yield
        return
    changed = [*before]
    changed[3] &= ~termios.ECHO
    termios.tcsetattr(number, termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


def clean(text: str) -> str:
    """A text that moves no cursor: control characters other than newlines and tabs are replaced."""
    return "".join(c if c in "\n\t" or wcwidth(c) >= 0 else "\ufffd" for c in text.replace("\r", ""))


def fitted(text: str, columns: int) -> str:
    """The text on one line of at most so many columns, cut at the end."""
    kept, used = "", 0
    for character in clean(text).replace("\n", " ").replace("\t", " "):
        used += wcwidth(character)
        if used > columns:
            return kept
        kept += character
    return kept


def lay_out(spans: Iterable[Span], width: int) -> list[ScreenRow]:
    """The rows of a text on a terminal of `width` columns; at least one."""
    rows, cells, column, end = list[ScreenRow](), list[Cell](), 0, 0

    def close(kept: list[Cell], broken: bool, *next_row: Cell) -> None:
        nonlocal cells, column
        rows.append(ScreenRow(tuple(kept), end, broken))
        cells, column = list(next_row), sum(cell.width for cell in next_row)

    for text, style in spans:
        for character in text:
            cell = _cell(character, style, column, width)
            if character == "\n":
                end += 1
                close(cells, False)
                continue
            if not cell.width and cells:
                column -= cells[-1].width
                cells.append(_joined(cells.pop(), character))
                column += cells[-1].width
                if (
                    column >= width and len(cells) > 1
                ):  # not in the last column, where terminals differ about combining characters
                    moved = cells[-1]
                    end -= moved.taken - 1
                    close(cells[:-1], True, moved)
                    end += moved.taken - 1
            elif column + cell.width > width:
                close(cells, True, _cell(character, style, 0, width))
            else:
                cells.append(cell if cell.width else Cell(" " + character, style, 1))
                column += cells[-1].width
            end += 1
    close(cells, False)
    return rows


def _cell(character: str, style: str, column: int, width: int) -> Cell:
    if character == "\t":
        spaces = min(_TAB - column % _TAB, width)
        return Cell(" " * spaces, style, spaces)
    return Cell(character, style, max(0, wcwidth(character)))


def _joined(cell: Cell, character: str) -> Cell:
    """A cell and what is combined with it; an emoji selector may make it two columns wide."""
    text, width = (
        unicodedata.normalize("NFC", cell.text + character),
        2 if character == "\ufe0f" else cell.width,
    )
    return Cell(text, cell.style, width, cell.taken + 1)


class Live:
    """A text on a terminal that changes until `finish`."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.size = out, size_of(out)
        self.rows: list[ScreenRow] = []  # the live region, as it is on the screen
        self.gone = ""  # the text of the rows that scrolled out

    def show(self, spans: Iterable[Span], settled: int) -> None:
        """Draw the text so far, of which the first `settled` characters never change again."""
        rest = _after(list(spans), self.gone)
        if rest is None:  # the text is not what it was; `finish` sets it right
            return
        self._write(self._moved(rest, settled - len(self.gone))[0])

    def finish(self, text: str) -> None:
        """Leave the final text on the screen, once, and the cursor on the line below it."""
        text = clean(text)
        rest = _after([(text, PLAIN)], self.gone)
        if rest is None:
            rest, self.gone = [(text, PLAIN)], ""
        width, lines = size_of(self.out)
        rows = lay_out(rest, width)
        if not self.gone and len(rows) <= lines and any(row.broken for row in rows):
            # whole on the screen: as the terminal itself would wrap it, so that it is copied without line
            # breaks
            self._write("\r" + _CLEAR + _unbroken(rows, width))
        else:
            drawn, below = self._moved(rest, len(text) + 1)
            self._write(drawn + _down(below))
        self._write("\r\n" + _SHOW)

    def abandon(self) -> None:
        """Give the cursor back below what is drawn."""
        if self.rows:
            self._write(_down(len(self.rows) - 1) + "\r\n" + _SHOW)

    def _moved(self, spans: list[Span], settled: int) -> tuple[str, int]:
        """The escape sequences from the region as it is to these spans, and how many rows of it lie below the
        cursor then."""
        size = size_of(self.out)
        drawn = "" if self.rows else _HIDE
        if size != self.size or not self.rows:
            drawn, self.rows, self.size = drawn + "\r" + _CLEAR, [ScreenRow((), 0, False)], size
        width, lines = size
        rows = lay_out(spans, width)
        finished = sum(row.end < settled for row in rows[:-1])
        leaving = min(finished, max(0, len(rows) - lines))
        rows = [row.plain for row in rows[:leaving]] + rows[leaving : leaving + lines]
        drawn += self._difference(rows, leaving)
        taken = rows[leaving - 1].end if leaving else 0
        self.gone += "".join(text for text, _ in spans)[:taken]
        self.rows = [ScreenRow(row.cells, row.end - taken, row.broken) for row in rows[leaving:]]
        return drawn, len(self.rows) - 1

    def _difference(self, rows: list[ScreenRow], leaving: int) -> str:
        drawn, at = "", 0
        for i, row in enumerate(rows):
            if i >= len(self.rows):
                drawn += _down(i - 1 - at) + "\r\n" + _cells(row.cells)
                at = i
            elif row.cells != self.rows[i].cells:
                drawn += _down(i - at) + _changed(self.rows[i].cells, row.cells)
                at = i
        if len(rows) < len(self.rows):
            drawn += _down(len(rows) - at) + "\r" + _CLEAR
            at = len(rows)
        up = at - leaving
        return drawn + (f"\x1b[{up}A" if up > 0 else _down(-up)) + ("\r" if drawn else "")

    def _write(self, text: str) -> None:
        if text:
            self.out.write(text)
            self.out.flush()


def _down(rows: int) -> str:
    return f"\x1b[{rows}B" if rows > 0 else ""


def _after(spans: list[Span], gone: str) -> list[Span] | None:
    """The spans without the text that is gone; None where they do not begin with it."""
    left: list[Span] = []
    for text, style in spans:
        skipped = min(len(text), len(gone))
        if text[:skipped] != gone[:skipped]:
            return None
        gone = gone[skipped:]
        if text[skipped:]:
            left.append((text[skipped:], style))
    return None if gone else left


def _cells(cells: Iterable[Cell]) -> str:
    drawn, style = "", PLAIN
    for cell in cells:
        if cell.style != style:
            drawn += (_RESET if style else "") + cell.style
            style = cell.style
        drawn += cell.text
    return drawn + (_RESET if style else "")


def _changed(old: tuple[Cell, ...], new: tuple[Cell, ...]) -> str:
    """From an old row to a new one: what differs between their common beginning and their common end."""
    first = 0
    while first < min(len(old), len(new)) and old[first] == new[first]:
        first += 1
    if not all(cell.is_simple for cell in (*old, *new)):
        return "\r\x1b[K" + _cells(new)
    before, after = sum(cell.width for cell in old), sum(cell.width for cell in new)
    last = len(new)
    if before == after:
        while (
            last > first and old[last - len(new) - 1] == new[last - 1] and last - len(new) + len(old) > first
        ):
            last -= 1
    column = sum(cell.width for cell in new[:first])
    start = "\r" + (f"\x1b[{column}C" if column else "")
    # cleared before it is written: behind the last column there is nothing to clear
    return start + ("\x1b[K" if after < before else "") + _cells(new[first:last])


def _unbroken(rows: list[ScreenRow], width: int) -> str:
    """Rows without breaks where the terminal breaks them by itself: where they are full."""
    drawn = ""
    for i, row in enumerate(rows):
        is_full = row.broken and sum(cell.width for cell in row.cells) == width
        drawn += "".join(cell.text for cell in row.cells) + ("" if is_full or i == len(rows) - 1 else "\r\n")
    return drawn
