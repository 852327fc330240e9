"""The feed-forward of a decoder layer: a part that owns its weights' names and shapes, and builds its nodes.
Another form is a class of its own that a family puts into its DecoderConfig.

Names of linear layers' weights end in _proj: quantisation schemes and parity tables recognise them by that.
Shape letters: T rows of activations, K hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import onnx_ir as ir

from .context import Context, Shapes, layer_name


@dataclass(frozen=True)
class FeedForward(ABC):
    """hidden_size: width of the residual stream. intermediate_size: width between the linear layers, for
    forecasts of memory."""

    hidden_size: int
    intermediate_size: int

    @abstractmethod
    def shapes(self) -> Shapes:
        """The weights of a layer, in the order of use, [out, in]."""

    @abstractmethod
    def build(self, on: Context, h: ir.Value, layer: int) -> ir.Value:
        """The nodes: the normed residual stream h [T, K] -> its update [T, K]."""


class SwiGLU(FeedForward):
    """down(silu(gate(h)) * up(h))."""

    def shapes(self) -> Shapes:
        wide = (self.intermediate_size, self.hidden_size)
        return {"gate_proj": wide, "up_proj": wide, "down_proj": wide[::-1]}

    def build(self, on: Context, h: ir.Value, layer: int) -> ir.Value:
        gate, up, down = (layer_name(layer, name) for name in ("gate_proj", "up_proj", "down_proj"))
        return on.linears.gated(on.op, h, (gate, up, down), on.weight)
