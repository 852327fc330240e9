"""The result of a generation, and the updates on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

from trt_runtime.decoding.trace import Step

_SHOWN = 60  # characters of a text in a repr


@dataclass(frozen=True, repr=False)
class Result:
    """The result of a row. Times are of the whole call, which all its rows share.

    text: the answer up to the first end-of-sequence token; None without a tokenizer. tokens: all gen_length
    tokens.
    num_useful: tokens before the end-of-sequence token. nfe: forwards, of which prefix_passes and
    refine_steps.
    canvas: prompt and answer (with `infill`, the prompt's gaps filled). seconds: wall time until the row
    finished.
    blocks: half-open ranges of the canvas, as they were decoded. pieces: the text of each of the canvas's
    last len(pieces) tokens: the answer's, with filled gaps in the prompt the prompt's too; token ids without
    a tokenizer. num_edits: how often a committed token was changed.
    """

    text: str | None
    tokens: list[int]
    num_useful: int
    nfe: int
    prefix_passes: int
    refine_steps: int
    seconds: float
    canvas: list[int]
    trace: list[Step]
    blocks: list[tuple[int, int]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    num_edits: int = 0

    def __repr__(self) -> str:
        answer = f"text={_start(self.text)}" if self.text is not None else f"tokens={_first(self.tokens)}"
        return f"Result({answer}, num_useful={self.num_useful}, nfe={self.nfe}, seconds={self.seconds:.3g})"

    def _repr_html_(self) -> str:
        """The answer for a notebook: blocks, and tokens coloured by confidence (notebook.py)."""
        from trt_runtime import notebook

        return notebook.html_of(self)

    @property
    def tokens_per_forward(self) -> float:
        """Useful tokens per forward: padding after the end is not counted."""
        return self.num_useful / max(1, self.nfe)


@dataclass(frozen=True, repr=False)
class Update:
    """A row after one forward: `committed` is the text of finished blocks, without an end that the next one
    may change (an incomplete character); `provisional` what is unmasked beyond them.

    tokens: the current generated part, mask tokens included. changed: positions that were written since
    the last update, with the confidence of each (None where a device chose by itself), and block: the running
    block, both counted from the generated part's first token (with `infill`, gaps of the prompt lie below 0).
    """

    row: int
    nfe: int
    kind: str
    committed: str | None
    provisional: str | None
    tokens: list[int]
    changed: list[int]
    confidence: list[float | None]
    block: tuple[int, int]
    finished: bool
    settled: int = 0  # tokens of the generated part that `committed` is the text of
    edited: list[int] = field(default_factory=list)  # positions of `changed` that had another token before

    def __repr__(self) -> str:
        return (
            f"Update(row={self.row}, nfe={self.nfe}, kind={self.kind!r}, committed={_start(self.committed)}, "
            f"provisional={_start(self.provisional)}, changed={_first(self.changed)}, block={self.block}, "
            f"finished={self.finished})"
        )


def _start(text: str | None) -> str:
    return repr(text) if text is None or len(text) <= _SHOWN else f"{text[:_SHOWN]!r}..."


def _first(numbers: list[int]) -> str:
    return repr(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:8]))}, ...]"
