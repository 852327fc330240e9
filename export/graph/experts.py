"""Mixture of experts: a router chooses a few feed-forward networks for each row.

The graph is dense: it computes all experts in two wide Gemms and multiplies each expert's part by its weight,
which is 0 for most. That is the one form that every backend takes (shapes do not depend on the data), and it
costs no more than reading the weights while few rows are computed. `fused` is the form of ONNX Runtime's own
operator, which computes the chosen experts only.

Shape letters: T rows of activations, K hidden size, E experts, I intermediate size of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as ir

from .context import Context, Shapes, layer_name
from .feed_forward import EXPERTS_BESIDE, EXPERTS_INTERLEAVED, EXPERTS_STACKED, FeedForward, SwiGLU

ROUTER, ROUTER_BIAS = "router", "router.bias"
ROUTER_LOGITS, EXPERT_WEIGHTS = "router_logits", "expert_weights"  # values that verify exposes
GATE, UP, DOWN = "experts_gate_proj", "experts_up_proj", "experts_down_proj"
INNER, OUTER = "experts_inner_proj", "experts_outer_proj"  # of the fused form
SCORES = ("softmax", "sigmoid")
_LEAST = 1e-30  # of a weight whose logarithm is taken
_NEVER = -6e4  # the logarithm of a weight that is 0, and a score below all others; finite in fp16
_TINY = 1e-20


@dataclass(frozen=True)
class Router:
    """How experts are chosen, and weighted. Everything is in float32, whatever the model's dtype: another
    expert is a visible difference, and the arithmetic costs nothing.

    score: of SCORES, of the logits over all experts. top_k: experts of a row. is_normalised: the weights of
    the chosen ones sum to `scale`. has_bias: a bias per expert is added to the scores where experts are
    chosen, not where they are weighted. num_groups, top_groups: experts are chosen within the groups of
    neighbours whose two best scores have the largest sums.
    """

    num_experts: int
    top_k: int
    score: str = "softmax"
    is_normalised: bool = True
    scale: float = 1.0
    has_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1

    def build(self, on: Context, h: ir.Value, layer: int) -> tuple[ir.Value, ir.Value]:
        """The weights of all experts [T, E] (0 where not chosen) and the logits [T, E] of h [T, K], float32.
        The order of equal scores is that of the experts."""
        op = on.op
        logits = op.Gemm(on.float32(h), on.weight(layer_name(layer, ROUTER)), transB=1)
        scores = op.Softmax(logits, axis=-1) if self.score == SCORES[0] else op.Sigmoid(logits)
        ranked = op.Add(scores, on.weight(layer_name(layer, ROUTER_BIAS))) if self.has_bias else scores
        if self.num_groups > 1:
            ranked = self._within_groups(on, ranked)
        best, chosen = op.TopK(ranked, [self.top_k], axis=-1, largest=1, sorted=1, _outputs=2)
        weights = best if ranked is scores else op.GatherElements(scores, chosen, axis=1)
        if self.is_normalised and self.top_k > 1:
            weights = op.Div(weights, op.Add(op.ReduceSum(weights, [-1], keepdims=1), _TINY))
        if self.scale != 1:
            weights = op.Mul(weights, self.scale)
        return op.ScatterElements(op.Mul(scores, 0.0), chosen, weights, axis=1), logits

    def _within_groups(self, on: Context, ranked: ir.Value) -> ir.Value:
        """The scores [T, E] of the best groups, and a number below all scores elsewhere."""
        op, size = on.op, self.num_experts // self.num_groups
        grouped = op.Reshape(ranked, [-1, self.num_groups, size])
        pairs, _ = op.TopK(grouped, [2], axis=-1, largest=1, sorted=1, _outputs=2)
        sums = op.ReduceSum(pairs, [-1], keepdims=0)
        _, kept = op.TopK(sums, [self.top_groups], axis=-1, largest=1, sorted=1, _outputs=2)
        zeros = op.Mul(sums, 0.0)
        ones = op.Add(op.Mul(op.GatherElements(sums, kept, axis=1), 0.0), 1.0)
        is_kept = op.Greater(op.Unsqueeze(op.ScatterElements(zeros, kept, ones, axis=1), [2]), 0.5)
        return op.Reshape(op.Where(is_kept, grouped, _NEVER), [-1, self.num_experts])


@dataclass(frozen=True)
class MixtureOfExperts(FeedForward):
    """The weighted sum of the chosen experts, each a SwiGLU. intermediate_size: of one expert. shared: a
    SwiGLU of every row, beside them. is_fused: the form of ONNX Runtime's operator MoE."""

    router: Router
    shared: SwiGLU | None = None
    is_fused: bool = False
    float32: ClassVar[frozenset[str]] = frozenset({ROUTER, ROUTER_BIAS})

    @property
    def num_experts(self) -> int:
        return self.router.num_experts

    def fused(self) -> MixtureOfExperts:
        return replace(self, is_fused=True)

    def shapes(self) -> Shapes:
        hidden, wide = self.hidden_size, self.num_experts * self.intermediate_size
        shapes: Shapes = {ROUTER: (self.num_experts, hidden)}
        if self.router.has_bias:
            shapes[ROUTER_BIAS] = (self.num_experts,)
        if self.is_fused:
            shapes[INNER] = (self.num_experts, 2 * self.intermediate_size, hidden)
            shapes[OUTER] = (self.num_experts, hidden, self.intermediate_size)
        else:
            shapes |= {GATE: (wide, hidden), UP: (wide, hidden), DOWN: (hidden, wide)}
        return shapes | (self.shared.shapes() if self.shared else {})

    def of_experts(self, name: str) -> tuple[tuple[str, ...], str] | None:
        return {
            GATE: (("gate_proj",), EXPERTS_STACKED),
            UP: (("up_proj",), EXPERTS_STACKED),
            DOWN: (("down_proj",), EXPERTS_BESIDE),
            INNER: (("gate_proj", "up_proj"), EXPERTS_INTERLEAVED),
            OUTER: (("down_proj",), EXPERTS_STACKED),
        }.get(name)

    def build(self, on: Context, h: ir.Value, layer: int) -> ir.Value:
        op, router = on.op, self.router
        weights, logits = router.build(on, h, layer)
        logits.name, weights.name = layer_name(layer, ROUTER_LOGITS), layer_name(layer, EXPERT_WEIGHTS)
        if self.is_fused:
            logarithms = op.Where(op.Greater(weights, 0.0), op.Log(op.Max(weights, _LEAST)), _NEVER)
            routed = on.narrow(logarithms), on.narrow(weights)
            pair = layer_name(layer, INNER), layer_name(layer, OUTER)
            sizes = (router.num_experts, self.intermediate_size, router.top_k)
            mixed = on.linears.fused_experts(op, h, routed, pair, on.weight, sizes)
        else:
            names = layer_name(layer, GATE), layer_name(layer, UP), layer_name(layer, DOWN)
            wide = (router.num_experts, self.intermediate_size)
            mixed = on.linears.experts(op, h, on.narrow(weights), names, on.weight, wide)
        return op.Add(mixed, self.shared.build(on, h, layer)) if self.shared else mixed
