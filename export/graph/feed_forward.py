"""The feed-forward of a decoder layer: a part that owns its weights' names and shapes, and builds its nodes.
Another form is a class of its own that a family puts into its DecoderConfig.

Names of linear layers' weights end in _proj: quantisation schemes and parity tables recognise them by that.
Shape letters: T rows of activations, K hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .context import Context, Shapes, layer_name

# how the tensors of experts make up one weight: one below the other, side by side, or row by row in turn
EXPERTS_STACKED, EXPERTS_BESIDE, EXPERTS_INTERLEAVED = JOINS = ("stacked", "beside", "interleaved")


@dataclass(frozen=True)
class FeedForward(ABC):
    """hidden_size: width of the residual stream. intermediate_size: width between the linear layers, for
    forecasts of memory. float32: weights that are stored in float32, whatever the model's dtype.
    num_experts: how many networks it consists of."""

    hidden_size: int
    intermediate_size: int
    float32: ClassVar[frozenset[str]] = frozenset()

    @property
    def num_experts(self) -> int:
        return 1

    @abstractmethod
    def shapes(self) -> Shapes:
        """The weights of a layer, in the order of use, [out, in]."""

    @abstractmethod
    def build(self, on: Context, h: ir.Value, layer: int) -> ir.Value:
        """The nodes: the normed residual stream h [T, K] -> its update [T, K]."""

    def of_experts(self, name: str) -> tuple[tuple[str, ...], str] | None:
        """If a weight is made of one or several tensors of every expert: their names within an expert, and
        how they are joined (one of JOINS)."""
        return None


@dataclass(frozen=True)
class SwiGLU(FeedForward):
    """down(silu(gate(h)) * up(h)). prefix: of its weights' names."""

    prefix: str = ""

    def shapes(self) -> Shapes:
        wide, names = (self.intermediate_size, self.hidden_size), self._names
        return {names[0]: wide, names[1]: wide, names[2]: wide[::-1]}

    @property
    def _names(self) -> tuple[str, str, str]:
        return f"{self.prefix}gate_proj", f"{self.prefix}up_proj", f"{self.prefix}down_proj"

    def build(self, on: Context, h: ir.Value, layer: int) -> ir.Value:
        gate, up, down = (layer_name(layer, name) for name in self._names)
        return on.linears.gated(on.op, h, (gate, up, down), on.weight)
