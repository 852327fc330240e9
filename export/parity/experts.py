"""Which experts each row passes, by the graph and by the reference: the same ones, but for rows whose choice
lies within rounding.

A router takes the k best of its scores, so an error of the scores can only change the choice where two of
them are nearly equal: the gap. Shape letters: T rows, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.backend import Window
from trt_runtime.measure import tolerances

from ..graph.context import layer_name
from ..graph.decoder import DecoderConfig
from ..graph.experts import EXPERT_WEIGHTS, ROUTER_LOGITS, MixtureOfExperts, Router
from . import verify_graphs
from .reference import TorchBackend

Array = np.ndarray[Any, Any]
Routed = tuple[Array, Array]  # a layer's router logits and weights of all experts [T, E]


def mixed_layers(decoder: DecoderConfig) -> dict[int, MixtureOfExperts]:
    """The layers with experts."""
    parts = {layer: decoder.feed_forward_of(layer) for layer in range(decoder.num_layers)}
    return {layer: part for layer, part in parts.items() if isinstance(part, MixtureOfExperts)}


def gaps(router: Router, logits: Array, bias: Array | None) -> Array:
    """How far the choice of each row [T] is from another one, as a difference of logits: the distance of the
    last chosen expert from the next, and of the last chosen group from the next."""
    x = logits.astype(np.float64)
    if router.score == "softmax":  # keeps the order of the logits
        return _distance(x, router.top_k)
    scores = 1 / (1 + np.exp(-x)) + (0 if bias is None else bias)
    least = np.full(len(x), np.inf)
    if router.num_groups > 1:
        grouped = scores.reshape(len(x), router.num_groups, -1)
        sums = np.sort(grouped, -1)[..., -2:].sum(-1)
        least = _distance(sums, router.top_groups) / 2
        bound = np.sort(sums, -1)[:, -router.top_groups][:, None, None]
        scores = np.where(sums[..., None] >= bound, grouped, -np.inf).reshape(len(x), -1)
    return 4 * np.minimum(least, _distance(scores, router.top_k))  # a sigmoid's slope is at most 1/4


def _distance(scores: Array, count: int) -> Array:
    """Between the count-th best score of each row and the next [T]."""
    if count >= scores.shape[1]:
        return np.full(len(scores), np.inf)
    ordered = -np.sort(-scores, axis=-1)
    return np.asarray(ordered[:, count - 1] - ordered[:, count])


@dataclass
class RoutedRows:
    """The comparison so far. rows: rows and layers that were compared. flipped: those with other experts.
    gap: the largest gap of a flipped one, in parts of what rounding may change. weights: the largest
    difference of an expert's weight in rows that agree."""

    rows: int = 0
    flipped: int = 0
    gap: float = 0.0
    weights: float = 0.0
    smallest: float = field(default=np.inf)

    def add(self, router: Router, bias: Array | None, mine: Routed, theirs: Routed, allowed: float) -> Array:
        """Compare a layer's rows; returns which of them pass other experts [T]."""
        if not len(theirs[0]):
            return np.zeros(0, np.bool_)
        own = gaps(router, theirs[0], bias) / (allowed * max(1.0, float(np.abs(theirs[0]).max())))
        differs = ((mine[1] > 0) != (theirs[1] > 0)).any(-1)
        self.rows += len(differs)
        self.flipped += int(differs.sum())
        self.gap = max(self.gap, float(own[differs].max(initial=0.0)))
        self.smallest = min(self.smallest, float(own.min(initial=np.inf)))
        apart = np.abs(mine[1] - theirs[1])[~differs] / max(1.0, router.scale)
        self.weights = max(self.weights, float(apart.max(initial=0.0)))
        return np.asarray(differs)


@contextmanager
def watched(reference: TorchBackend) -> Iterator[dict[int, Routed]]:
    """The routers' logits and weights of the reference's next forward, by layer."""
    routers: Mapping[int, Any] = getattr(reference.network, "routers", {})
    seen: dict[int, Routed] = {}
    hooks = []
    for layer, module in routers.items():

        def note(_: Any, __: Any, output: Any, layer: int = layer) -> None:
            logits, weights, chosen = (item.detach().cpu().numpy() for item in output)
            dense = np.zeros(logits.shape, np.float32)
            np.put_along_axis(dense, chosen, weights.astype(np.float32), 1)
            seen[layer] = logits.astype(np.float32), dense

        hooks.append(module.register_forward_hook(note))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def biases(reference: TorchBackend) -> dict[int, Array]:
    """What each router adds to its scores where it chooses."""
    routers: Mapping[int, Any] = getattr(reference.network, "routers", {})
    named = {layer: getattr(item, "e_score_correction_bias", None) for layer, item in routers.items()}
    return {layer: bias.detach().float().cpu().numpy() for layer, bias in named.items() if bias is not None}


def compare(
    artifact: Path, reference: TorchBackend, calls: list[tuple[Window, Window, Array]], threads: int | None
) -> RoutedRows:
    """Every layer but the last (which computes the rows asked for) over prefix passes."""
    layers = mixed_layers(reference.source.decoder)
    names = [layer_name(layer, kind) for layer in layers for kind in (ROUTER_LOGITS, EXPERT_WEIGHTS)]
    engine = OrtBackend(
        artifact, model_bytes=verify_graphs.exposed(artifact, "refine", names), threads=threads
    )
    allowed, total, bias = tolerances.ROUTER[engine.manifest.model.dtype], RoutedRows(), biases(reference)
    for full, _, valid in calls:
        batch, length = full.input_ids.shape
        with watched(reference) as theirs:
            reference.prefix(reference.new_cache(batch, length), slice(0, batch), full)
        mine = engine.run(engine.new_cache(batch, length), slice(0, batch), full, names)
        rows = valid.reshape(-1).copy()
        for layer, part in layers.items():
            own = [np.asarray(mine[layer_name(layer, kind)]) for kind in (ROUTER_LOGITS, EXPERT_WEIGHTS)]
            if layer not in theirs or len(own[0]) != len(rows):
                continue
            pair = own[0].astype(np.float32)[rows], own[1].astype(np.float32)[rows]
            expected = theirs[layer][0][rows], theirs[layer][1][rows]
            differs = total.add(part.router, bias.get(layer), pair, expected, allowed)
            rows[np.flatnonzero(rows)[differs]] = False  # what comes after has other inputs
    engine.close()
    return total


def least_gap(reference: TorchBackend, window: Window, dtype: str) -> float:
    """The smallest gap of any row and layer of a forward, in parts of what rounding in `dtype` may change."""
    layers, bias, least = mixed_layers(reference.source.decoder), biases(reference), np.inf
    batch, length = window.input_ids.shape
    with watched(reference) as seen:
        reference.prefix(reference.new_cache(batch, length), slice(0, batch), window)
    for layer, (logits, _) in seen.items():
        scale = tolerances.ROUTER[dtype] * max(1.0, float(np.abs(logits).max()))
        least = min(least, float(gaps(layers[layer].router, logits, bias.get(layer)).min()) / scale)
    return float(least)
