"""int4 for ONNX Runtime on a CPU: 4-bit weights in blocks, to save memory; the head keeps 8 bits.

The operator (MatMulNBits, accuracy level 4) rounds activations to 8 bits in blocks. Block decoding is
compute-bound on a CPU, so this saves memory and not time: w8a8 is faster.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnxscript import OpBuilder

from trt_runtime.artifact.manifest import ORT_CPU

from ..graph.decoder import is_layer
from ..graph.linears import MICROSOFT, Initializer
from . import blocks
from .base import Array, Scheme, StoredPart

BLOCK = 128
_INT8_ARITHMETIC = 4  # accuracy_level: activations are rounded to 8 bits


class Int4(Scheme):
    name = "int4"
    title = "4-bit weights in blocks of 128"
    target = ORT_CPU
    dtypes = ("fp32",)
    operators = frozenset({"MatMulNBits"})

    def parts(self, name: str, shape: tuple[int, int]) -> dict[str, StoredPart]:
        rows, columns = shape
        bits, number = _bits(name), blocks.count(columns, BLOCK)
        return {
            f"int{bits}": StoredPart("uint8", (rows, number, BLOCK * bits // 8)),
            "scale": StoredPart("fp32", (rows, number)),
        }

    def quantize(self, name: str, shape: tuple[int, int], rows: Iterator[Array]) -> dict[str, Array]:
        """Unsigned with zero at 8 (or 128), the operator's default zero point."""
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


def _bits(name: str) -> int:
    return 4 if is_layer(name) else 8
