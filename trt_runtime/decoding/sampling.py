"""Proposals sampled from logits: LLaDA's Gumbel noise, and Dream's temperature with top-p and top-k. Pure
NumPy. Shape letters: R candidates of one row of the batch, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trt_runtime.artifact.manifest import CATEGORICAL, GUMBEL, MULTINOMIAL
from trt_runtime.decoding.policies.base import Bools, Floats, Ints, RowStats


@dataclass(frozen=True)
class Sampler:
    """How a proposal is made. At temperature 0 without filters it is the argmax, which the graph already
    returns.

    gumbel: argmax(logits - T ln(-ln u)), which draws from softmax(logits / T); with filters, among the tokens
    that top_p, then top_k keep of that distribution. The confidence is un-tempered, over the whole vocabulary
    (LLaDA). At T = 0 it is the best token, which filters keep.
    categorical: the logits are divided by T and filtered by top_p, then top_k; the token is drawn from what
    is left (T = 0: the best), and all statistics are those of that distribution (Dream).
    multinomial: as categorical, but top_k comes before top_p, and at T = 0 filters change nothing, as in
    gumbel (SDAR, Fast-dLLM v2).

    from_logits: the graph does not know which token is the mask, so its statistics are computed again.
    """

    kind: str = GUMBEL
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    from_logits: bool = False

    @property
    def needs_logits(self) -> bool:
        return self.from_logits or self.draws

    @property
    def draws(self) -> bool:
        """Whether a proposal is other than the best token with its own probability."""
        return self.temperature > 0 or (self.kind == CATEGORICAL and self._filters)

    @property
    def _filters(self) -> bool:
        return self.top_p < 1 or self.top_k is not None

    def propose(
        self, logits: Floats, stats: RowStats, mask_token_id: int, rng: np.random.Generator
    ) -> RowStats:
        """The statistics [R] of proposals sampled from logits [R, V]; `stats` are the graph's. The mask is
        never proposed."""
        if self.from_logits and not self.draws:
            return plain(logits, mask_token_id)
        if self.kind == GUMBEL:
            kept = None
            if self._filters:
                kept = filtered(logits, self.temperature, self.top_p, self.top_k, mask_token_id) > 0
            token, confidence = gumbel_propose(
                logits, rng.random(logits.shape), self.temperature, mask_token_id, kept
            )
            return RowStats(token, confidence, stats.runner_up, stats.entropy, best=stats.confidence)
        return self._categorical(logits, mask_token_id, rng)

    def _categorical(self, logits: Floats, mask_token_id: int, rng: np.random.Generator) -> RowStats:
        probability = filtered(
            logits,
            self.temperature,
            self.top_p,
            self.top_k,
            mask_token_id,
            top_k_first=self.kind == MULTINOMIAL,
        )
        order = np.argpartition(probability, -2, axis=-1)[:, -2:]
        pair = np.sort(np.take_along_axis(probability, order, -1), -1)
        if self.temperature > 0:
            total = probability.cumsum(-1)
            token = (total < rng.random(len(total))[:, None] * total[:, -1:]).sum(-1)
        else:
            token = probability.argmax(-1)
        confidence = np.take_along_axis(probability, token[:, None], -1)[:, 0]
        entropy = -(probability * np.log(probability + 1e-10)).sum(-1)
        return RowStats(token.astype(np.int64), confidence, pair[:, 0], entropy, best=pair[:, 1])


def plain(logits: Floats, mask_token_id: int) -> RowStats:
    """The statistics [R] that a graph returns, from logits [R, V]: the mask keeps its share of the
    softmax."""
    wide = logits.astype(np.float64)
    probability = _softmax(wide)
    entropy = -(probability * np.log(np.maximum(probability, 1e-300))).sum(-1)
    allowed = probability.copy()
    allowed[:, mask_token_id] = -1
    token = allowed.argmax(-1)
    pair = np.sort(np.partition(allowed, -2, axis=-1)[:, -2:], -1)
    return RowStats(token.astype(np.int64), pair[:, 1], pair[:, 0], entropy)


def gumbel_propose(
    logits: Floats, uniform: Floats, temperature: float, mask_token_id: int, kept: Bools | None = None
) -> tuple[Ints, Floats]:
    """Tokens and their un-tempered probabilities from logits [R, V] and noise uniform in [0, 1):
    argmax(logits - T ln(-ln u)).

    The mask token is never proposed but keeps its share of the softmax; so do tokens outside `kept` [R, V].
    """
    wide = logits.astype(np.float64)
    if temperature > 0:
        with np.errstate(divide="ignore"):
            noisy = wide - temperature * np.log(-np.log(uniform))
    else:
        noisy = wide.copy()
    if mask_token_id < noisy.shape[-1]:
        noisy[:, mask_token_id] = -np.inf
    if kept is not None:
        noisy[~kept] = -np.inf
    token = noisy.argmax(-1)
    weights = np.exp(wide - wide.max(-1, keepdims=True))
    probability = np.take_along_axis(weights, token[:, None], -1)[:, 0] / weights.sum(-1)
    return token.astype(np.int64), probability


def filtered(
    logits: Floats,
    temperature: float,
    top_p: float,
    top_k: int | None,
    mask_token_id: int,
    *,
    top_k_first: bool = False,
) -> Floats:
    """Probabilities [R, V] of logits [R, V] without the mask token, after temperature, top_p and top_k, in
    this order, or top_k before top_p. top_p keeps the most probable tokens up to the one that brings their
    sum above top_p; top_k keeps the k best and their ties."""
    wide = logits.astype(np.float64)
    if mask_token_id < wide.shape[-1]:
        wide[:, mask_token_id] = -np.inf
    if temperature > 0:
        wide /= temperature
    if top_k_first:
        wide = _best(wide, top_k)
    if top_p < 1:
        order = np.argsort(-wide, axis=-1, kind="stable")
        ordered = _softmax(np.take_along_axis(wide, order, -1))
        too_many = ordered.cumsum(-1) - ordered > top_p  # the sum of the tokens before is above top_p already
        np.put_along_axis(wide, order, np.where(too_many, -np.inf, np.take_along_axis(wide, order, -1)), -1)
    return _softmax(wide if top_k_first else _best(wide, top_k))


def _best(logits: Floats, top_k: int | None) -> Floats:
    """The logits with all but the top_k best and their ties at -inf."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    least = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
    return np.where(logits < least, -np.inf, logits)


def _softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))
