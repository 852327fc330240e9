"""How likely a text is to a diffusion model, by the Monte-Carlo estimate of LLaDA (arXiv 2502.09992, appendix
B.5), and whether the model would generate it.

    for each sample: mask l of the target's L tokens, l spread evenly over 1..L; a forward; sum of log p of
    the masked tokens, times L / l

With block-causal attention the target is a product of its blocks, each given everything before it: the
estimates of the blocks are added, and share the samples. A first token of a block that comes from the store
of the block before is certain after one forward.

The mean is a lower bound of the log-likelihood; its standard error says how far more samples may move it.
Shape letters: B samples of a call, L target, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trt_runtime.artifact.manifest import DecodingFacts
from trt_runtime.decoding.backend import Window
from trt_runtime.decoding.blocks import blocks_of
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.policies.base import Floats, Ints
from trt_runtime.errors import DllmError
from trt_runtime.model import Model

_LOGIT_BYTES = 256 << 20  # bytes of logits in one call
# of one call's rows together, if it has more than one row: keys, values and activations are limited too
_POSITIONS = 4096
Piece = tuple[int, Ints]  # a sample's number, and some of the positions that it masks


@dataclass(frozen=True)
class Likelihood:
    """In nats. forwards: computed rows; more than samples if the logits of one sample do not fit into a
    call."""

    mean: float
    standard_error: float
    forwards: int


def estimate(
    model: Model, context: list[int], target: list[int], *, samples: int = 128, seed: int = 0
) -> Likelihood:
    """The log-likelihood of `target` after `context`. Raises DllmError without logits, or for a text that is
    too long or empty."""
    facts = model.manifest.model
    if not context or not target or samples < 1:
        raise DllmError(
            f"{len(context)} tokens of context, {len(target)} of target, {samples} samples: expected at "
            f"least one of each."
        )
    if len(context) + len(target) > facts.max_length:
        raise DllmError(
            f"context and target have {len(context) + len(target)} tokens, expected at most "
            f"{facts.max_length}: shorten them."
        )
    if not model.backend.gives_logits:
        raise DllmError(
            f"a likelihood needs logits, but this artifact returns only statistics on {model.backend.name}: "
            f"export with HEAD=logits."
        )
    canvas, parts = _parts(model, context, target)
    rng, drawn = np.random.default_rng(seed), list[Ints]()
    part_of, weights = list[int](), list[float]()
    each = -(-samples // max(1, sum(len(positions) > 1 for positions in parts)))
    for number, positions in enumerate(parts):
        length = len(positions)
        own = 1 if length == 1 else each  # there is only one way to mask one token
        for count in stratified(own, length, int(rng.integers(1, length + 1))):
            drawn.append(np.sort(rng.choice(length, count, replace=False)) + positions[0])
            part_of.append(number)
            weights.append(length / count)
    sums, forwards = _sums(model, canvas, drawn)
    values, mean, variance = sums * weights, 0.0, 0.0
    for number in range(len(parts)):
        of_part = values[np.array(part_of) == number]
        mean += float(np.mean(of_part))
        variance += float(np.var(of_part, ddof=1)) / len(of_part) if len(of_part) > 1 else 0.0
    return Likelihood(mean, math.sqrt(variance), forwards)


@dataclass(frozen=True)
class _Canvas:
    """Context and target [L]; with block-causal attention masks up to the end of the last block, and the
    row_len [L]."""

    ids: Ints
    row_len: Ints | None


def _parts(model: Model, context: list[int], target: list[int]) -> tuple[_Canvas, list[Ints]]:
    """The canvas, and the positions that are masked together: the target, or with block-causal attention each
    of its blocks."""
    facts, ids = model.manifest.decoding, np.array([*context, *target], np.int64)
    first, end = len(context), len(ids)
    blocks = blocks_of(facts)
    if blocks is None:
        return _Canvas(ids, None), [np.arange(first, end)]
    length = min(blocks.canvas_length(first, len(target)), model.manifest.model.max_length)
    masks = np.full(length - end, facts.mask_token_id, np.int64)
    reach, parts = blocks.reach(first, length), list[Ints]()
    while first < end:
        after = min(int(reach[first]), end)
        if facts.next_from_store and int(reach[first - 1]) == first:
            parts.append(np.arange(first, first + 1))
            first += 1
        if first < after:
            parts.append(np.arange(first, after))
        first = after
    return _Canvas(np.concatenate([ids, masks]), reach), parts


def _sums(model: Model, canvas: _Canvas, masked: list[Ints]) -> tuple[Floats, int]:
    """For each sample, the sum of log p of its masked tokens; and the number of computed rows."""
    facts, ids = model.manifest.model, canvas.ids
    most = max(1, min(model.backend.max_batch or len(masked), _POSITIONS // len(ids)))
    calls = list(_calls(masked, facts.vocab_size, most))
    cache = model.backend.new_cache(max(map(len, calls)), len(ids))
    sums = np.zeros(len(masked))
    for part in calls:
        window = _window(canvas, [(masked[i], asked) for i, asked in part], model.manifest.decoding)
        logits = model.backend.prefix(cache, slice(0, len(part)), window, want_logits=True).logits
        assert logits is not None
        for row, (i, asked) in enumerate(part):
            sums[i] += _log_probability(logits[row, : len(asked)], ids[asked])
        del logits  # freed before the next call allocates its own
    return sums, sum(map(len, calls))


def _calls(masked: list[Ints], vocab_size: int, most: int) -> Iterator[list[Piece]]:
    """The samples, whole or in pieces, as calls of at most `most` rows whose logits have at most _LOGIT_BYTES
    (or one vector)."""
    fit = max(1, _LOGIT_BYTES // (4 * vocab_size))
    call: list[Piece] = []
    for i, at in enumerate(masked):
        for piece in np.split(at, range(fit, len(at), fit)):
            longest = max(len(piece), *(len(other) for _, other in call)) if call else len(piece)
            if call and (len(call) == most or (len(call) + 1) * longest > fit):
                yield call
                call = []
            call.append((i, piece))
    yield call


def stratified(samples: int, length: int, first: int) -> Ints:
    """How many of `length` tokens each sample masks: even steps from `first`, wrapping within 1..length
    [samples]."""
    spread = np.round(np.linspace(first, first + (samples - 1) * (length / samples), samples)).astype(
        np.int64
    )
    return (spread - 1) % length + 1


def is_greedy(model: Model, context: list[int], target: list[int]) -> bool:
    """Whether the model, one most confident token per forward and without a cache, writes exactly
    `target`."""
    block = None if model.manifest.decoding.is_block_causal else len(target)
    config = GenerationConfig(
        gen_length=len(target), block_length=block, cache="none", policy="fixed", stop_at_eos=False
    )
    return model.generate([context], config)[0].tokens == target


def _window(canvas: _Canvas, rows_of: list[tuple[Ints, Ints]], facts: DecodingFacts) -> Window:
    """A canvas for each pair of positions: the masked ones, and those of them that need logits."""
    batch, length = len(rows_of), len(canvas.ids)
    rows = np.zeros((batch, max(len(asked) for _, asked in rows_of)), np.int64)
    tokens = np.tile(canvas.ids, (batch, 1))
    for i, (at, asked) in enumerate(rows_of):
        tokens[i, at], rows[i, : len(asked)] = (
            facts.mask_token_id,
            np.maximum(asked - facts.logit_shift, 0),
        )
    return Window(
        tokens,
        np.tile(np.arange(length), (batch, 1)),
        np.zeros(batch, np.int64),
        np.full(batch, length),
        rows,
        None if canvas.row_len is None else np.tile(canvas.row_len, (batch, 1)),
    )


def _log_probability(logits: Floats, tokens: Ints) -> float:
    """Sum of log p of tokens [R] under logits [R, V]. One row at a time: in float64 all of them would take
    several times their memory."""
    total = 0.0
    for row, token in zip(logits, tokens, strict=True):
        wide = row.astype(np.float64)
        top = wide.max()
        total += float(wide[token] - top - np.log(np.exp(wide - top).sum()))
    return total
