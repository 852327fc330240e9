"""The limits of this machine: operations per second of matrix products in ONNX Runtime, and bytes per second
of a copy."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper


def peaks(threads: int) -> dict[str, float]:
    """Operations per second of large matrix products in ONNX Runtime, and bytes per second of a copy (both
    directions counted)."""
    rates = {"fp32": 0.0, "int8": 0.0}
    for rows, inputs, outputs in (
        (512, 2048, 2048),
        (384, 768, 3072),
        (384, 3072, 768),
    ):  # large and square, and the shapes of the model
        rng = np.random.default_rng(0)
        weight, scales = (
            rng.standard_normal((outputs, inputs)).astype(np.float32),
            np.full(outputs, 0.01, np.float32),
        )
        constants = {
            "w": weight,
            "w8": np.ascontiguousarray((weight.T * 20).astype(np.int8)),
            "s": scales,
            "one": np.float32(1),
            "zero": np.uint8(128),
        }
        feeds = {
            "x": rng.standard_normal((rows, inputs)).astype(np.float32),
            "q": rng.integers(0, 255, (rows, inputs)).astype(np.uint8),
        }
        for name in ("fp32", "int8"):
            took = _product(name, rows, inputs, outputs, constants, feeds, threads)
            rates[name] = max(rates[name], 2 * rows * inputs * outputs / took)
    source = np.ones(1 << 26, np.float32)
    target = np.empty_like(source)
    rates["bandwidth"] = 2 * source.nbytes / least(lambda: np.copyto(target, source))
    return rates


def _product(
    name: str,
    rows: int,
    inputs: int,
    outputs: int,
    constants: dict[str, Any],
    feeds: dict[str, Any],
    threads: int,
) -> float:
    """Seconds of a matrix product [rows, inputs] x [inputs, outputs], fp32 or u8 x s8."""
    nodes = {
        "fp32": helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
        "int8": helper.make_node(
            "MatMulIntegerToFloat", ["q", "w8", "one", "s", "zero"], ["y"], domain="com.microsoft"
        ),
    }
    feed, *weights = nodes[name].input
    kind = {"x": TensorProto.FLOAT, "q": TensorProto.UINT8}[feed]
    graph = helper.make_graph(
        [nodes[name]],
        name,
        [helper.make_tensor_value_info(feed, kind, [rows, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, outputs])],
        [numpy_helper.from_array(np.asarray(constants[i]), i) for i in weights],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)],
        ir_version=11,
    )
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return least(lambda: session.run(None, {feed: feeds[feed]}), 25)


def least(call: Any, times: int = 7) -> float:
    """Seconds of the fastest of several calls, after one that warms up."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
