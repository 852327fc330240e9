"""The quality lost by quantisation, measured against the unquantised model: the gate that a quantised export
must pass.

    canvases   masked at several ratios, with the block at several places of the answer: the
               Kullback-Leibler divergence on masked rows
    commits    the unquantised model's decoding, forced step by step: are the same tokens proposed, and
               committed in the same forward?
    answers    decoded freely: how many are right (if the examples say so), and how many are unchanged

`expect` runs the unquantised model, then `measure` the quantised one: both are never in memory together.
Shape letters: L length of a canvas, R masked rows of its block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trt_runtime.decoding.backend import Window
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.generator import Generator
from trt_runtime.decoding.sequence import Sequence as Row
from trt_runtime.decoding.trace import Step
from trt_runtime.measure import tolerances
from trt_runtime.measure.examples import Example, is_right
from trt_runtime.model import Model
from trt_runtime.system.progress import SILENT, Progress

RATIOS = (0.25, 0.5, 0.75, 1.0)  # fractions of a block's positions that are masked
PLACES = (0.0, 0.5, 1.0)  # places of the block, from the answer's first to its last
_MOST_ROWS = 1 << 28  # log-probabilities that are kept: 1 GiB
_SMALL = 20_000_000  # parameters

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Canvas:
    """A canvas in the middle of a decoding: ids [L], and the masked positions of its current block [R].
    Everything after it is masked, or left out with block-causal attention, which has a row_len [L]."""

    ids: Array
    masked: Array
    row_len: Array | None = None


@dataclass(frozen=True)
class Decoded:
    """An example as the model decoded it: its steps, its whole canvas, its blocks, the end of its useful
    part, and its text. reach [L]: of block-causal attention (Sequence.reach)."""

    example: Example
    steps: list[Step]
    canvas: Array
    prompt_length: int
    useful_end: int
    text: str | None
    ranges: list[tuple[int, int]]
    reach: Array | None

    @property
    def useful(self) -> Array:
        """Prompt and answer, without anything after the answer's end."""
        return self.canvas[: self.useful_end]


@dataclass(frozen=True)
class Expected:
    """What the model gave before it was quantised. log_probabilities: float32 [R, V] per canvas."""

    config: GenerationConfig
    decoded: list[Decoded]
    canvases: list[Canvas]
    log_probabilities: list[Array]


@dataclass(frozen=True)
class Quality:
    """The measured quality. Shares are fractions of 1; `right` and `right_before` count the examples that
    have a right answer (`judged`)."""

    examples: int
    canvases: int
    masked_rows: int
    kl_mean: float
    kl_largest: float
    same_best: float
    commits: int
    same_token: float
    same_commit: float
    same_answer: float
    judged: int
    right_before: int
    right: int

    @property
    def allowed_losses(self) -> float:
        """How many right answers may be lost: the bound in points, and always one, because a single answer
        proves nothing."""
        return max(1.0, self.judged * tolerances.QUANTIZED_DROP / 100)

    def failures(self) -> Iterator[str]:
        """One sentence for each missed bound (trt_runtime/measure/tolerances.py)."""
        if not self.kl_mean <= tolerances.QUANTIZED_KL:
            yield f"KL on masked rows is {self.kl_mean:.3g} nats, allowed {tolerances.QUANTIZED_KL:g}"
        if not self.same_token >= tolerances.QUANTIZED_TOKENS:
            yield (
                f"{100 * self.same_token:.1f} % of the committed tokens are proposed again, required "
                f"{100 * tolerances.QUANTIZED_TOKENS:g} %"
            )
        if not self.same_commit >= tolerances.QUANTIZED_COMMITS:
            yield (
                f"{100 * self.same_commit:.1f} % of the commits are made in the same forward, required "
                f"{100 * tolerances.QUANTIZED_COMMITS:g} %"
            )
        if self.right_before - self.right > self.allowed_losses:
            yield (
                f"{self.right} of {self.judged} answers are right, {self.right_before} were before: "
                f"allowed are {self.allowed_losses:g} less"
            )

    def as_dict(self) -> dict[str, Any]:
        return {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        right = (
            f"; right answers {self.right} of {self.judged}, before {self.right_before}"
            if self.judged
            else ""
        )
        return (
            f"KL {self.kl_mean:.2g} nats on {self.masked_rows} masked rows (largest {self.kl_largest:.2g}); "
            f"of {self.commits} commits {100 * self.same_token:.1f} % the same token, "
            f"{100 * self.same_commit:.1f} % in the same forward; {100 * self.same_answer:.0f} % of "
            f"{self.examples} answers unchanged{right}"
        )


def threads_of(parameters: int) -> int | None:
    """Small models run on one thread, because more are slower. None: the backend's own choice."""
    return 1 if parameters < _SMALL else None


def decode(
    model: Model,
    examples: Sequence[Example],
    config: GenerationConfig,
    progress: Progress = SILENT,
    what: str = "decoding prompts",
) -> list[Decoded]:
    """Decode the examples, one at a time."""
    decoded = []
    for example in progress.each(examples, what):
        row = model.sequence(example.prompt, config)
        Generator(model.backend, [row]).run()
        useful = row.prompt_length + row.num_useful
        decoded.append(
            Decoded(
                example,
                row.trace,
                row.canvas.copy(),
                row.prompt_length,
                useful,
                _text(model, row),
                row.ranges,
                row.reach,
            )
        )
    return decoded


def canvases(decoded: Sequence[Decoded], mask: int) -> list[Canvas]:
    """One canvas per decoding and ratio, at each place in turn. The masked positions are drawn, the same ones
    each time."""
    rng, drawn = np.random.default_rng(0), []
    for number, done in enumerate(decoded):
        blocks = max(1, sum(start < done.useful_end for start, _ in done.ranges))
        for i, ratio in enumerate(RATIOS):
            place = round(PLACES[(number + i) % len(PLACES)] * (blocks - 1))
            start, end = done.ranges[place]
            if done.reach is not None:
                end = int(done.reach[start])
            masked = np.sort(
                rng.choice(np.arange(start, end), max(1, round(ratio * (end - start))), replace=False)
            )
            ids = done.canvas.copy()
            ids[masked], ids[end:] = mask, mask
            if done.reach is None:
                drawn.append(Canvas(ids, masked))
            else:
                drawn.append(Canvas(ids[:end], masked, done.reach[:end]))
    return drawn


def window_of(canvas: Canvas, rows: Array) -> Window:
    """A prefix pass over a canvas, with outputs for `rows`."""
    ids = canvas.ids[None].astype(np.int64)
    length = ids.shape[1]
    return Window(
        ids,
        np.arange(length)[None],
        np.zeros(1, np.int64),
        np.array([length]),
        rows[None].astype(np.int64),
        None if canvas.row_len is None else canvas.row_len[None],
    )


def expect(model: Model, examples: Sequence[Example], progress: Progress = SILENT) -> Expected:
    """Run the unquantised model. Raises DllmError for a prompt that it cannot take."""
    facts = model.manifest.decoding
    config = GenerationConfig().resolved(model.manifest)
    assert config.block_length is not None
    decoded = decode(model, examples, config, progress, "gate: decoding prompts with the original model")
    drawn, vocabulary = (
        canvases(decoded, facts.mask_token_id),
        model.manifest.model.vocab_size,
    )
    most = max(1, _MOST_ROWS // (vocabulary * config.block_length))
    drawn = drawn[:: -(-len(drawn) // most)]
    seen = progress.each(drawn, "gate: canvases of the model as it was")
    return Expected(config, decoded, drawn, [_log_probabilities(model, canvas) for canvas in seen])


def measure(model: Model, expected: Expected, match: str, progress: Progress = SILENT) -> Quality:
    """Compare the quantised model with what is expected of it. match: how answers are compared
    (examples.MATCHES)."""
    divergence, best = _divergence(model, expected, progress)
    commits = [
        _forced(model, done, expected.config)
        for done in progress.each(expected.decoded, "gate: commits, forced")
    ]
    number, tokens, same = (sum(column) for column in zip(*commits, strict=True))
    again = decode(
        model,
        [done.example for done in expected.decoded],
        expected.config,
        progress,
        "gate: decoding prompts again",
    )
    pairs = list(zip(again, expected.decoded, strict=True))
    judged = [(mine, theirs) for mine, theirs in pairs if theirs.example.answers is not None]
    right = [[is_right(done.text or "", done.example, match) for done in pair] for pair in judged]
    return Quality(
        examples=len(pairs),
        canvases=len(expected.canvases),
        masked_rows=divergence.size,
        kl_mean=float(divergence.mean()),
        kl_largest=float(divergence.max()),
        same_best=float(best.mean()),
        commits=number,
        same_token=tokens / max(1, number),
        same_commit=same / max(1, number),
        same_answer=sum(np.array_equal(mine.useful, theirs.useful) for mine, theirs in pairs) / len(pairs),
        judged=len(judged),
        right_before=sum(before for _, before in right),
        right=sum(now for now, _ in right),
    )


def _divergence(model: Model, expected: Expected, progress: Progress) -> tuple[Array, Array]:
    """The KL divergence of each masked row in nats, and whether its best token is the same."""
    divergence, same = [], []
    canvases = progress.each(expected.canvases, "gate: canvases")
    for canvas, before in zip(canvases, expected.log_probabilities, strict=True):
        now = _log_probabilities(model, canvas)
        divergence.append((np.exp(before) * (before - now)).sum(-1))
        same.append(before.argmax(-1) == now.argmax(-1))
    return np.maximum(np.concatenate(divergence), 0), np.concatenate(same)


def _log_probabilities(model: Model, canvas: Canvas) -> Array:
    cache = model.backend.new_cache(1, len(canvas.ids))
    rows = np.maximum(canvas.masked - model.manifest.decoding.logit_shift, 0)
    logits = model.backend.prefix(cache, slice(0, 1), window_of(canvas, rows), want_logits=True).logits
    assert logits is not None
    shifted = logits[0] - logits[0].max(-1, keepdims=True)
    logs: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs


def _forced(model: Model, done: Decoded, config: GenerationConfig) -> tuple[int, int, int]:
    """The commits of a decoding: how many tokens are proposed again after the same history, and how many are
    committed again too."""
    row = model.sequence(done.example.prompt, config)
    generator, number, tokens, same = Generator(model.backend, [row]), 0, 0, 0
    for step in done.steps:
        generator.step({0: (step.positions, step.tokens)})
        seen = row.trace[-1].seen
        assert seen is not None
        proposed = dict(zip(seen[0].tolist(), seen[1].token.tolist(), strict=True))
        for position, token in zip(step.positions, step.tokens, strict=True):
            number += 1
            tokens += proposed[position] == token
            same += proposed[position] == token and position in row.trace[-1].positions
    return number, tokens, same


def _text(model: Model, row: Row) -> str | None:
    return model.text(row.output[: row.num_useful]) if model.tokenizer is not None else None
