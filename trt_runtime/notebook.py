"""A result as HTML for a notebook: blocks, and tokens coloured by the confidence with which they were
committed.

Styles are inline and colours are translucent, so that it is readable on light and dark pages. It loads
nothing from elsewhere, and the model's text is escaped.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trt_runtime.result import Result

_PAGE = (
    "font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; color: inherit"
)
_BLOCK = "border-left: 2px solid currentColor; padding: 0 2px; margin-right: 2px"
_TOKEN = "unicode-bidi: isolate; border-radius: 2px; color: inherit"


def html_of(result: Result) -> str:
    """The answer up to its end; if gaps in the prompt were filled, the prompt before it."""
    offset = len(result.canvas) - len(result.pieces)
    first = len(result.canvas) - len(result.tokens)
    forwards = _forwards(result)
    parts, end = [], first + result.num_useful
    if not result.pieces:  # not written by the model
        parts.append(
            html.escape(result.text if result.text is not None else " ".join(map(str, result.tokens)))
        )
    elif offset < first:
        parts.append(
            "".join(_token(result.pieces[i - offset], forwards.get(i)) for i in range(offset, first))
        )
    for number, (start, stop) in enumerate(result.blocks, 1):
        if start >= end or not result.pieces:
            break
        tokens = "".join(
            _token(result.pieces[i - offset], forwards.get(i)) for i in range(start, min(stop, end))
        )
        parts.append(f'<span style="{_BLOCK}" title="block {number}">{tokens}</span>')
    said = (
        f"{result.num_useful} tokens, {result.nfe} forwards, {result.tokens_per_forward:.2f} tokens per "
        f"forward, {result.seconds:.2f} s; colour: confidence, from red (0) to green (1)"
    )
    return (
        f'<div style="{_PAGE}">{"".join(parts)}</div><div style="opacity: 0.75; font-size: '
        f'smaller">{said}</div>'
    )


def _forwards(result: Result) -> dict[int, tuple[str, float | None]]:
    """For each position of the canvas: the forward that committed it, and its confidence."""
    # steps that were verified together have no forward of their own (speculation.py)
    word = "forward" if len(result.trace) == result.nfe else "step"
    return {
        position: (f"{word} {number}", confidence)
        for number, step in enumerate(result.trace, 1)
        for position, confidence in zip(step.positions, step.confidence, strict=True)
    }


def _token(piece: str, committed: tuple[str, float | None] | None) -> str:
    """One token as an element; a token of the prompt (None) without style."""
    text = html.escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece))
    if committed is None:
        return f'<span style="{_TOKEN}; opacity: 0.75">{text}</span>'
    forward, confidence = committed
    if confidence is None:
        return (
            f'<span style="{_TOKEN}; border-bottom: 1px dashed" title="{forward}, confidence not '
            f'known">{text}</span>'
        )
    hue = round(120 * min(max(confidence, 0.0), 1.0))
    return (
        f'<span style="{_TOKEN}; background: hsla({hue}, 90%, 45%, 0.3)" title="{forward}, confidence '
        f'{confidence:.3f}">{text}</span>'
    )
