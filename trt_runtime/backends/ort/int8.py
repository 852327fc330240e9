"""Whether this processor multiplies 8-bit numbers correctly, and the session options that ONNX Runtime needs.

ONNX Runtime's u8 x s8 product adds neighbouring products in 16 bits on x86 processors without VNNI (only
AVX2, or AVX-512 from before 2019). The sum of two products of large numbers saturates:
outputs are wrong by up to a third, without an error. With the session option `session.x64quantprecision` = 1
the weights are shifted to unsigned, and the product is exact, at some cost in speed; with VNNI the option
would cost more than half of the speed and is not needed. The processor's name does not decide: each operator
that an artifact uses is run once on numbers whose exact product is known and does not fit 16 bits, first
without the option, then with it. If both results are wrong, the artifact is refused.

Shape letters: M rows of activations, K inputs, N outputs.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from trt_runtime.artifact.manifest import TENSORRT, Manifest
from trt_runtime.errors import DllmError

PRECISION = "session.x64quantprecision"
SETTINGS: tuple[dict[str, str], ...] = ({}, {PRECISION: "1"})  # tried in this order, the fast one first
_K, _N, _BLOCK = 256, 32, 128
_FLOAT, _UINT8, _INT8 = 1, 2, 3  # element types of ONNX
_ROWS = (1, 2, 18)  # M: kernels differ with it
_CLOSE = 1e-3  # relative: operators that round activations themselves multiply by a rounded scale

Array = np.ndarray[Any, Any]


def session_entries(manifest: Manifest) -> dict[str, str]:
    """Session options with which this processor computes an artifact correctly. Raises DllmError if there are
    none."""
    quantization = manifest.quantization
    if quantization is None:
        return {}
    if (
        quantization.target == TENSORRT
    ):  # as written: fused into integer products, it would be rounded and summed differently
        return {"session.disable_quant_qdq": "1"}
    return settings_for(quantization.scheme)


def settings_for(scheme: str) -> dict[str, str]:
    """Session options with which a CPU scheme (`quantization.scheme` of the manifest) computes correctly
    here. A scheme unknown to this version must pass all probes. Raises DllmError if no options help."""
    settings: dict[str, str] = {}
    for name in _PROBES_OF.get(scheme, tuple(PROBES)):
        needed = exact_with(name)
        if needed is None:
            raise DllmError(
                f"ONNX Runtime {ort.__version__} multiplies 8-bit numbers incorrectly on this processor "
                f"({name}: expected {exact(name):.0f}, got {computed(name, SETTINGS[0]):.0f}), so this "
                "artifact would give wrong answers: use another version of onnxruntime, or an artifact "
                "that is not quantised for the CPU."
            )
        settings |= needed
    return settings


@functools.cache
def exact_with(name: str) -> dict[str, str] | None:
    """The first of SETTINGS with which a probe is exact on this processor; None if there is none."""
    return next((dict(options) for options in SETTINGS if is_exact(name, options)), None)


def is_exact(name: str, options: Mapping[str, str]) -> bool:
    """Whether a probe gives its exact product with these session options."""
    return all(np.allclose(got, wanted, rtol=_CLOSE, atol=0) for got, wanted in _runs(name, options))


def exact(name: str) -> float:
    """A probe's exact product."""
    return float(PROBES[name]()[2][0, 0])


def computed(name: str, options: Mapping[str, str]) -> float:
    """What this processor computes for `exact`."""
    return float(next(iter(_runs(name, options)))[0][0, 0])


def _runs(name: str, options: Mapping[str, str]) -> Iterable[tuple[Array, Array]]:
    """The result of a probe for each number of rows, and the expected one."""
    model, x, wanted = PROBES[name]()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    for key, value in options.items():
        settings.add_session_config_entry(key, value)
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    for rows in _ROWS:
        take = np.arange(rows) % len(x)
        yield session.run(None, {"x": x[take]})[0], wanted[take]
    # the row that M = 1 did not show
    yield session.run(None, {"x": x[1:2]})[0], wanted[1:2]


def _integer() -> tuple[bytes, Array, Array]:
    """w8a8: MatMulIntegerToFloat, u8 x s8, with the largest magnitudes only."""
    x, weight = (
        np.full((2, _K), 255, np.uint8) * np.array([[1], [0]], np.uint8),
        np.tile(np.where(np.arange(_N) % 2, -127, 127), (_K, 1)).astype(np.int8),
    )
    parts = {"w": weight, "one": np.float32(1), "scale": np.ones(_N, np.float32), "zero": np.uint8(128)}
    model = _model("MatMulIntegerToFloat", ("x", *parts), parts, _UINT8, {})
    return model, x, (x.astype(np.int64) - 128) @ weight.astype(np.int64)


def _blocks(bits: int) -> tuple[bytes, Array, Array]:
    """int4 and its head: MatMulNBits of accuracy level 4, which rounds activations to 8 bits (here they are
    whole numbers already)."""
    x = np.full((2, _K), 127, np.float32) * np.array([[1], [-1]], np.float32)
    signs = np.arange(_N) % 2 == 0
    whole = np.where(signs, (1 << bits) - 1, 0).astype(np.uint8)  # unsigned around the middle
    packed = whole | whole << 4 if bits == 4 else whole
    blocks = _K // _BLOCK
    stored = np.broadcast_to(packed[:, None, None], (_N, blocks, _BLOCK * bits // 8)).copy()
    parts = {"w": stored, "scale": np.ones((_N, blocks), np.float32)}
    attributes = {"K": _K, "N": _N, "bits": bits, "block_size": _BLOCK, "accuracy_level": 4}
    weight = np.tile(whole.astype(np.int64) - (1 << bits - 1), (_K, 1))
    return _model("MatMulNBits", ("x", *parts), parts, _FLOAT, attributes), x, x.astype(np.int64) @ weight


PROBES: dict[str, Callable[[], tuple[bytes, Array, Array]]] = {
    "MatMulIntegerToFloat (w8a8)": _integer,
    "MatMulNBits, 4 bit (int4)": functools.partial(_blocks, 4),
    "MatMulNBits, 8 bit (int4, head)": functools.partial(_blocks, 8),
}
_PROBES_OF = {"w8a8": tuple(PROBES)[:1], "int4": tuple(PROBES)[1:]}  # by scheme


def _model(
    operator: str,
    inputs: Iterable[str],
    parts: Mapping[str, Any],
    element: int,
    attributes: Mapping[str, int],
) -> bytes:
    """An ONNX model of one node of com.microsoft, x [M, K] -> y [M, N], as protobuf: the runtime needs no
    onnx package."""
    domain = "com.microsoft"
    node = _join(1, inputs) + _field(2, "y") + _field(4, operator) + _field(7, domain)
    node += b"".join(
        _field(5, _field(1, key) + _field(3, value) + _field(20, 2)) for key, value in attributes.items()
    )
    graph = (
        _field(1, node)
        + _field(2, "probe")
        + b"".join(_field(5, _tensor(key, value)) for key, value in parts.items())
    )
    graph += _field(11, _value("x", element, _K)) + _field(12, _value("y", _FLOAT, _N))
    opsets = _field(8, _field(1, "") + _field(2, 21)) + _field(8, _field(1, domain) + _field(2, 1))
    return _field(1, 10) + _field(7, graph) + opsets


def _tensor(name: str, value: Any) -> bytes:
    array = np.asarray(value)
    kind = {"float32": _FLOAT, "uint8": _UINT8, "int8": _INT8}[array.dtype.name]
    return (
        b"".join(_field(1, size) for size in array.shape)
        + _field(2, kind)
        + _field(8, name)
        + _field(9, array.tobytes())
    )


def _value(name: str, element: int, columns: int) -> bytes:
    shape = _field(1, _field(2, "M")) + _field(1, _field(1, columns))
    return _field(1, name) + _field(2, _field(1, _field(1, element) + _field(2, shape)))


def _join(number: int, values: Iterable[str]) -> bytes:
    return b"".join(_field(number, value) for value in values)


def _field(number: int, value: int | str | bytes) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    encoded = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(encoded)) + encoded


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded += struct.pack("B", value & 127 | 128)
        value >>= 7
    return bytes(encoded) + struct.pack("B", value)
