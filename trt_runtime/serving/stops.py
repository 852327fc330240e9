"""Where an answer's text ends: at the first stop string, even one that is or contains a special token, which
the shown text omits."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from trt_runtime.artifact.tokenizer import Tokenizer


class Cutter:
    """Stop strings over a tokenizer. Strings with special tokens are searched in text with special tokens,
    the others in the shown text."""

    def __init__(self, stops: Sequence[str], tokenizer: Tokenizer | None) -> None:
        special = tokenizer.special_texts if tokenizer is not None and stops else frozenset()
        self.tokenizer = tokenizer
        self.spelled = [stop for stop in stops if any(text in stop for text in special)]
        self.shown = [stop for stop in stops if stop not in self.spelled]

    def cut(self, text: str, ids: Sequence[int], *, is_last: bool) -> tuple[str, bool]:
        """The part of an answer that may be shown, and whether a stop string was met. ids: its tokens; text:
        their text without special tokens. Before the end, text that may still become a stop string or a
        character is held back."""
        if not is_last:
            text = text.rstrip("\ufffd")
        ends = [_end(text, self.shown, is_last)]
        if self.spelled and self.tokenizer is not None:
            whole = self.tokenizer.spelled(ids)
            begin, is_met = _end(whole, self.spelled, is_last)
            if begin < len(whole):
                ends.append((len(self._shown_before(ids, begin)), is_met))
        at = min(end for end, _ in ends)
        return text[:at], any(is_met for end, is_met in ends if end == at)

    def _shown_before(self, ids: Sequence[int], end: int) -> str:
        """The shown text before character `end` of the text of `ids` with special tokens."""
        assert self.tokenizer is not None
        spelled = self.tokenizer.spelled
        whole = bisect_right(range(len(ids) + 1), end, key=lambda count: len(spelled(ids[:count]))) - 1
        part = spelled(ids[: whole + 1])[len(spelled(ids[:whole])) : end]
        return self.tokenizer.decode(ids[:whole]) + part


def _end(text: str, stops: Sequence[str], is_last: bool) -> tuple[int, bool]:
    """Where a text ends: at the first stop string (True), else where one may begin, or at its end."""
    starts = [at for stop in stops if (at := text.find(stop)) >= 0]
    if starts:
        return min(starts), True
    if is_last:
        return len(text), False
    sizes = (n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
    return len(text) - max(sizes, default=0), False
