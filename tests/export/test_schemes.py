"""Each scheme by itself: what is stored stands for the weight, and a layer computes the scheme's rule."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from exports import scheme_id
from onnxscript import GraphBuilder
from tiny import write_checkpoint

from export import families, schemes
from export.graph.decoder import is_linear, weight_shapes
from export.graph.linears import MICROSOFT
from export.pipeline import ExportConfig
from export.schemes import blocks
from export.schemes.base import Calibration
from export.weights import plan as weights
from export.weights.sources import STORED
from trt_runtime.backends.ort import int8

KINDS = schemes.SCHEMES
LLADA = families.find("llada")

NAME = "layers.0.up_proj"


def made(kind, weight: np.ndarray, inputs: np.ndarray, dtype="fp32", name=NAME):
    """A scheme calibrated for one layer of weight [N, K], and the parts that it stores of it, given in pieces
    of three rows."""
    others = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    names = [name, *(f"layers.0.{other}" for other in others)]
    scheme = kind(
        dtype, Calibration(dict.fromkeys(names, inputs), {key: np.abs(weight).max(0) for key in names})
    )
    scheme.factors = lambda name: (None, None)  # the smoothing has its own test
    pieces = (weight[i : i + 3] for i in range(0, len(weight), 3))
    return scheme, scheme.quantize(name, weight.shape, pieces)


def dequantised(kind, parts: dict, shape: tuple[int, int]) -> np.ndarray:
    """The weight that parts stand for, number by number."""
    rows, columns = shape
    scale = np.asarray(parts["scale"], np.float64)
    out = np.zeros(shape)
    for n in range(rows):
        for k in range(columns):
            if scheme_id(kind) == "w8a8-ort-cpu":
                out[n, k] = float(parts["int8"][k, n]) * scale[n]
            elif scheme_id(kind) == "int4-ort-cpu":
                byte = int(parts["int4"].reshape(rows, -1)[n, k // 2])
                out[n, k] = ((byte >> 4 if k % 2 else byte & 15) - 8) * scale[n, k // 128]
            elif scheme_id(kind) == "int4-tensorrt":
                byte = int(parts["int4"].reshape(rows, -1)[n, k // 2])
                nibble = byte >> 4 if k % 2 else byte & 15
                out[n, k] = (nibble - 16 if nibble > 7 else nibble) * scale[n, k // 64]
            elif kind.name == "fp8":
                out[n, k] = float(parts["fp8"][n, k]) * scale
            else:
                out[n, k] = float(parts["int8"][n, k]) * scale[n]
    return out


@pytest.mark.parametrize("kind", KINDS, ids=scheme_id)
def test_what_is_stored_stands_for_the_weight(kind):
    """Types and shapes are those promised, and every number is within half a step of the weight (fp8: within
    its four digits)."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((10, 192)).astype(np.float32)
    weight[3] = 0  # no scale may become zero or infinite
    scheme, parts = made(kind, weight, np.ones(192, np.float32))
    promised = scheme.parts(NAME, weight.shape)
    assert list(parts) == list(promised)
    for name, part in promised.items():
        kept = STORED[part.dtype][0]
        size = (part.shape[0] * part.shape[1] // 2,) if part.dtype == "int4" else part.shape
        assert parts[name].dtype == kept and parts[name].size == np.prod(size, dtype=int)
    got = dequantised(kind, parts, weight.shape)
    steps = {
        "w8a8": np.abs(weight).max(1, keepdims=True) / 127,
        "int8-sq": np.abs(weight).max(1, keepdims=True) / 127,
    }
    if kind.name in steps:
        assert (np.abs(got - weight) <= 0.5001 * steps[kind.name] + 1e-9).all()
    elif kind.name == "fp8":
        assert (np.abs(got - weight) <= 0.0626 * np.abs(weight) + 1e-3).all()
    else:
        block = 128 if kind.target == "ort-cpu" else 64
        for start in range(0, 192, block):
            there = slice(start, start + block)
            step = np.abs(weight[:, there]).max(1, keepdims=True) / 7
            assert (np.abs(got - weight)[:, there] <= 1.5 * step + 1e-9).all()  # the largest may be clipped
            rounding = np.square(
                np.clip(np.rint(weight[:, there] / np.maximum(step, 1e-9)), -8, 7) * step - weight[:, there]
            ).sum(1)
            assert (
                np.square(got - weight)[:, there].sum(1) <= rounding + 1e-6
            ).all()  # no worse than without clipping
    assert (got[3] == 0).all()


def test_blocks_take_the_scale_of_the_least_error():
    """Against every share tried one by one."""
    rng = np.random.default_rng(1)
    weight = rng.standard_t(2, (40, 96)).astype(np.float32)
    whole, scales = blocks.rounded(iter([weight]), weight.shape, 32, 4)
    for n in range(40):
        for g in range(3):
            x = weight[n, 32 * g : 32 * g + 32]
            errors = []
            for share in blocks._SHARES:
                scale = np.float32(np.abs(x).max() / np.float32(7 * share))
                errors.append(np.square(np.clip(np.rint(x / scale), -8, 7) * scale - x).sum())
            assert np.square(whole[n, g] * scales[n, g] - x).sum() == pytest.approx(min(errors), rel=1e-5)


def run_layer(scheme, parts, x: np.ndarray, shape) -> np.ndarray:
    """One layer of a scheme on ONNX Runtime, a graph of its own."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24, MICROSOFT: 1}, name="layer")
    builder = GraphBuilder(graph)
    given = builder.input("x", ir.DataType.FLOAT, ["T", shape[1]])
    held = {}

    def weight(name):
        if name not in held:
            suffix = name.removeprefix(NAME + ".")
            part, kind = parts[suffix], STORED[scheme.parts(NAME, shape)[suffix].dtype][1]
            tensor = (
                ir.Tensor(part, dtype=kind)
                if kind != ir.DataType.INT4
                else ir.PackedTensor(part.reshape(-1), kind, shape=ir.Shape(shape))
            )
            held[name] = builder.initializer(tensor, name)
        return held[name]

    scheme.begin(builder.op, {NAME: shape})
    out = scheme.linear(builder.op, given, NAME, weight)
    out.name, out.dtype, out.shape = "y", ir.DataType.FLOAT, ir.Shape(["T", shape[0]])
    builder.add_output(out, "y")
    model = ir.to_proto(ir.Model(graph, ir_version=11))
    options = ort.SessionOptions()
    for key, value in (
        int8.settings_for(scheme.name) if scheme.target == "ort-cpu" else {"session.disable_quant_qdq": "1"}
    ).items():
        options.add_session_config_entry(key, value)  # as an artifact is opened on this processor
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]


@pytest.mark.parametrize("kind", KINDS, ids=scheme_id)
def test_a_layer_computes_its_rule(kind):
    """Against the rule in NumPy, on tokens of very different sizes, one of them all zeros."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((24, 128)).astype(np.float32)
    x = rng.standard_normal((7, 128)).astype(np.float32) * np.array(
        [[1], [100], [1e-3], [0], [3], [0.1], [30]], np.float32
    )
    scheme, parts = made(kind, weight, np.abs(x).max(0))
    got, held = run_layer(scheme, parts, x, weight.shape), dequantised(kind, parts, weight.shape)
    if kind.name == "w8a8":
        scale = np.abs(x).max(1, keepdims=True) / 127
        rounded = np.rint(x / np.maximum(scale, 1e-20)) * scale
    elif kind.name == "fp8":
        own = float(parts["input_scale"])
        rounded = (x / np.float32(own)).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * own
    elif kind.name == "int8-sq":
        own = float(parts["input_scale"])
        rounded = np.clip(np.rint(x / np.float32(own)), -128, 127) * own
    else:
        rounded = x.astype(np.float64)
    expected = rounded @ held.T
    allowed = (
        0.02 if scheme_id(kind) == "int4-ort-cpu" else 1e-3
    )  # that operator rounds activations to 8 bits in blocks of its own
    assert (np.abs(got - expected) <= allowed * np.abs(expected).max(1, keepdims=True) + 1e-6).all()
    assert (got[3] == 0).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.target == "ort-cpu"], ids=scheme_id)
def test_a_token_is_rounded_alone(kind):
    """A row's result does not depend on the tokens beside it, however large they are."""
    rng = np.random.default_rng(3)
    weight, x = (
        rng.standard_normal((16, 128)).astype(np.float32),
        rng.standard_normal((5, 128)).astype(np.float32),
    )
    scheme, parts = made(kind, weight, np.ones(128, np.float32))
    before = run_layer(scheme, parts, x, weight.shape)
    x[[0, 1, 3, 4]] *= 1e4
    assert (run_layer(scheme, parts, x, weight.shape)[2] == before[2]).all()


READERS = {
    "attention_norm": ("q_proj", "k_proj", "v_proj"),
    "mlp_norm": ("gate_proj", "up_proj"),
    "up_proj": ("down_proj",),
}
EXPERT_READERS = {
    "attention_norm": READERS["attention_norm"],
    "mlp_norm": (
        "router",
        *(f"{part}_{name}" for part in ("shared", "experts") for name in ("gate_proj", "up_proj")),
    ),
    "shared_up_proj": ("shared_down_proj",),
    "experts_up_proj": ("experts_down_proj",),
}


@pytest.mark.parametrize(("name", "readers"), [("llada", READERS), ("llada2", EXPERT_READERS)])
def test_smoothing_leaves_the_function_as_it_is(tmp_path, name, readers):
    """Norms and up_proj divided, columns of all their readers multiplied, of the router too, which is not
    quantised: without rounding every product is as before."""
    family = families.find(name)
    path = write_checkpoint(family, tmp_path / "checkpoint")
    source = ExportConfig(str(path), tmp_path / "out").read()
    rng = np.random.default_rng(4)
    shapes = weight_shapes(source.decoder)
    linears = {key: shape for key, shape in shapes.items() if is_linear(key) and key != "head"}
    drawn = {
        (layer, before): np.exp(2 * rng.standard_normal(shapes[f"layers.{layer}.{names[0]}"][1]))
        for layer in range(1, source.decoder.num_layers)
        for before, names in readers.items()
    }
    inputs = {key: np.exp(rng.standard_normal(shape[1])).astype(np.float32) for key, shape in linears.items()}
    for (layer, before), magnitudes in drawn.items():
        for reader in readers[before]:
            inputs[f"layers.{layer}.{reader}"] = magnitudes.astype(np.float32)
    weights_of = {
        key: np.exp(rng.standard_normal(shape[1])).astype(np.float32) for key, shape in linears.items()
    }
    scheme = schemes.find("int8-sq")("fp32", Calibration(inputs, weights_of))
    for before, names in readers.items():
        for reader in names:
            divided = scheme.factors(f"layers.1.{before}")[0]
            multiplied = scheme.factors(f"layers.1.{reader}")[1]
            assert np.allclose(divided * multiplied, 1, rtol=1e-5), reader
    assert scheme.factors("layers.1.o_proj") == (None, None) and scheme.factors("head") == (None, None)
    last = f"layers.1.{next(reversed(readers.values()))[0]}"
    assert np.allclose(scheme.factors(last)[1], inputs[last] ** 0.75 / weights_of[last] ** 0.25, rtol=1e-4)
    assert scheme.factors(last)[0] is None and scheme.factors("layers.1.q_proj")[0] is None
    stored = {
        weight.name: np.concatenate(list(weight.source.pieces()))
        for weight in weights.plan(source.decoder, family, source.checkpoint, "fp32", scheme=scheme)
        if weight.name in ("layers.1.router", "layers.1.mlp_norm")
    }
    plain = {
        weight.name: np.concatenate(list(weight.source.pieces())).reshape(weight.shape)
        for weight in weights.plan(source.decoder, family, source.checkpoint, "fp32")
        if weight.name in stored
    }
    for key, array in plain.items():
        factor = next(each for each in scheme.factors(key) if each is not None)
        assert np.allclose(stored[key].reshape(array.shape), array * factor, rtol=1e-6)
