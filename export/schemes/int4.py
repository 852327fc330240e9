"""int4 for ONNX Runtime on a CPU: 4-bit weights in blocks, to save memory; the head keeps 8 bits. Experts
are computed by the operator QMoE, which takes the chosen ones only.

The operator (MatMulNBits, accuracy level 4) rounds activations to 8 bits in blocks. Block decoding is
compute-bound on a CPU, so this saves memory and not time: w8a8 is faster.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnxscript import OpBuilder

from trt_runtime.artifact.manifest import ORT_CPU
from trt_runtime.errors import DllmError

from ..graph.context import split_layer
from ..graph.decoder import is_layer, layer_name
from ..graph.experts import INNER, OUTER
from ..graph.linears import MICROSOFT, Initializer
from . import blocks
from .base import Array, Scheme, StoredPart

BLOCK = 128
_EXPERT_BLOCKS = (128, 64, 32, 16)  # of the operator for experts
_INT8_ARITHMETIC = 4  # accuracy_level: activations are rounded to 8 bits


class Int4(Scheme):
    name = "int4"
    title = "4-bit weights in blocks of 128"
    target = ORT_CPU
    dtypes = ("fp32",)
    operators = frozenset({"MatMulNBits", "QMoE"})
    fuses_experts = True

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredPart]:
        if len(shape) == 3:  # of experts
            count, rows, columns = shape
            block = self._expert_block(name)
            return {
                "int4": StoredPart("uint8", (count, rows, columns // 2)),
                "scale": StoredPart("fp32", (count, rows, columns // block)),
            }
        rows, columns = shape
        bits, number = _bits(name), blocks.count(columns, BLOCK)
        return {
            f"int{bits}": StoredPart("uint8", (rows, number, BLOCK * bits // 8)),
            "scale": StoredPart("fp32", (rows, number)),
        }

    def quantize(self, name: str, shape: tuple[int, int], rows: Iterator[Array]) -> dict[str, Array]:
        """Unsigned with zero at 8 (or 128), the operators' default zero point."""
        if len(self.shapes.get(name, shape)) == 3:
            whole, scales = blocks.rounded(rows, shape, self._expert_block(name), 4)
            return {"int4": blocks.packed(whole + 8), "scale": scales}
        bits = _bits(name)
        whole, scales = blocks.rounded(rows, shape, BLOCK, bits)
        packed = blocks.packed(whole + 8) if bits == 4 else (whole.view("uint8") ^ 128)
        return {f"int{bits}": packed, "scale": scales}

    def linear(
        self, op: OpBuilder, x: ir.Value, name: str, weight: Initializer, bias: ir.Value | None = None
    ) -> ir.Value:
        stored = weight(f"{name}.int{_bits(name)}")
        outputs, inputs = self.shapes[name]
        product = op.MatMulNBits(
            x,
            stored,
            weight(f"{name}.scale"),
            K=inputs,
            N=outputs,
            bits=_bits(name),
            block_size=BLOCK,
            accuracy_level=_INT8_ARITHMETIC,
            _domain=MICROSOFT,
            _version=1,
        )
        return product if bias is None else op.Add(product, bias)

    def head(self, op: OpBuilder, x: ir.Value, name: str, weight: Initializer) -> ir.Value:
        return self.linear(op, x, name, weight)

    def fused_experts(
        self,
        op: OpBuilder,
        h: ir.Value,
        routed: tuple[ir.Value, ir.Value],
        names: tuple[str, str],
        weight: Initializer,
        sizes: tuple[int, int, int],
    ) -> ir.Value:
        """router_weights separates the weights from the choice: without it the operator's CPU kernel always
        normalises them."""
        logarithms, weights = routed
        inner, outer = names
        return op.QMoE(
            h,
            logarithms,
            weight(f"{inner}.int4"),
            weight(f"{inner}.scale"),
            None,
            weight(f"{outer}.int4"),
            weight(f"{outer}.scale"),
            *[None] * 7,
            weights,
            k=sizes[2],
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
            expert_weight_bits=4,
            accuracy_level=_INT8_ARITHMETIC,
            block_size=self._expert_block(inner),
            _domain=MICROSOFT,
            _version=1,
        )

    def _expert_block(self, name: str) -> int:
        """Numbers of a block of an experts' weight: the operator has one size for both of a layer, and whole
        blocks."""
        where = split_layer(name)
        assert where is not None
        widths = [self.shapes[layer_name(where[0], part)][2] for part in (INNER, OUTER)]
        block = next((size for size in _EXPERT_BLOCKS if all(width % size == 0 for width in widths)), None)
        if block is None:
            raise DllmError(
                f"--quantize int4: experts of width {widths[1]} in a model of width {widths[0]}: expected "
                f"multiples of {_EXPERT_BLOCKS[-1]}: use w8a8."
            )
        return block


def _bits(name: str) -> int:
    return 4 if is_layer(name) else 8
