"""Quantised linear layers: what each scheme stores, what its graphs compute, what it is calibrated with, and
the gate."""

from __future__ import annotations

import json
import shutil
import sys

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxscript import GraphBuilder
from places import DEMO, GOLDENS, ROOT, export_quietly
from tiny import write_checkpoint

from export import cli, families, pipeline, schemes
from export.families.base import ConfigReader
from export.graph import lint
from export.graph.decoder import is_linear, weight_shapes
from export.graph.linears import MICROSOFT
from export.parity import verify
from export.pipeline import ExportConfig, read
from export.quantize import calibration
from export.quantize import export as quantize
from export.quantize import gate as quality
from export.quantize.export import QuantizeConfig
from export.schemes import blocks
from export.schemes.base import Calibration
from export.weights.plan import plan
from export.weights.sources import STORED
from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.ort import OrtBackend, OrtCudaBackend, int8
from trt_runtime.backends.tensorrt import store
from trt_runtime.decoding.backend import Window
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError
from trt_runtime.measure import tolerances
from trt_runtime.model import load

sys.path.append(str(ROOT / "tools"))
import demo_prompts
import demo_task

LLADA = families.find("llada")
NAME = "layers.0.up_proj"
KINDS = schemes.SCHEMES
ALLOWED = {
    "w8a8": 0.03,
    "int8-sq": 0.24,
    "fp8": 0.08,
    "int4": 0.2,
}  # the largest seen: 0.020, 0.185, 0.064, 0.168
TARGETED = [(kind, dtype) for kind in KINDS for dtype in kind.dtypes if dtype != "bf16"]


def ids(kind) -> str:
    return f"{kind.name}-{kind.target}"


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
            if ids(kind) == "w8a8-ort-cpu":
                out[n, k] = float(parts["int8"][k, n]) * scale[n]
            elif ids(kind) == "int4-ort-cpu":
                byte = int(parts["int4"].reshape(rows, -1)[n, k // 2])
                out[n, k] = ((byte >> 4 if k % 2 else byte & 15) - 8) * scale[n, k // 128]
            elif ids(kind) == "int4-tensorrt":
                byte = int(parts["int4"].reshape(rows, -1)[n, k // 2])
                nibble = byte >> 4 if k % 2 else byte & 15
                out[n, k] = (nibble - 16 if nibble > 7 else nibble) * scale[n, k // 64]
            elif kind.name == "fp8":
                out[n, k] = float(parts["fp8"][n, k]) * scale
            else:
                out[n, k] = float(parts["int8"][n, k]) * scale[n]
    return out


@pytest.mark.parametrize("kind", KINDS, ids=ids)
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


@pytest.mark.parametrize("kind", KINDS, ids=ids)
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
        0.02 if ids(kind) == "int4-ort-cpu" else 1e-3
    )  # that operator rounds activations to 8 bits in blocks of its own
    assert (np.abs(got - expected) <= allowed * np.abs(expected).max(1, keepdims=True) + 1e-6).all()
    assert (got[3] == 0).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.target == "ort-cpu"], ids=ids)
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


def test_smoothing_changes_nothing_but_where_sizes_stand():
    """Norms and up_proj divided, columns multiplied: without rounding every product is as before."""
    config = LLADA.decoder(ConfigReader(LLADA.tiny_config(), "config.json"))
    rng = np.random.default_rng(4)
    shapes = {
        name: shape for name, shape in weight_shapes(config).items() if is_linear(name) and name != "head"
    }
    inputs = {
        name: np.exp(2 * rng.standard_normal(shape[1])).astype(np.float32) for name, shape in shapes.items()
    }
    for i in range(3):
        for name in ("k_proj", "v_proj"):
            inputs[f"layers.{i}.{name}"] = inputs[f"layers.{i}.q_proj"]
        inputs[f"layers.{i}.up_proj"] = inputs[f"layers.{i}.gate_proj"]
    weights_of = {
        name: np.exp(rng.standard_normal(shape[1])).astype(np.float32) for name, shape in shapes.items()
    }
    scheme = schemes.find("int8-sq")("fp32", Calibration(inputs, weights_of))
    for reader, before in (
        ("q_proj", "attention_norm"),
        ("v_proj", "attention_norm"),
        ("gate_proj", "mlp_norm"),
        ("down_proj", "up_proj"),
    ):
        divided, multiplied = scheme.factors(f"layers.1.{before}")[0], scheme.factors(f"layers.1.{reader}")[1]
        assert np.allclose(divided * multiplied, 1, rtol=1e-5)
    assert scheme.factors("layers.1.o_proj") == (None, None) and scheme.factors("head") == (None, None)
    name = "layers.2.down_proj"
    columns = scheme.factors(name)[1]
    assert np.allclose(columns, inputs[name] ** 0.75 / weights_of[name] ** 0.25, rtol=1e-4)
    assert scheme.factors("layers.2.down_proj")[0] is None and scheme.factors("layers.2.q_proj")[0] is None


def calm(tensors):
    """Layers that add little to the residual stream: random ones of unit gain would amplify any rounding."""
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and (
            "proj" in name or "attn_out" in name or ("blocks" in name and "ff_out" in name)
        ):
            np.multiply(tensor, 0.3, out=tensor)


def wide(family):
    """A tiny model whose layers have multiples of 64 inputs."""
    config = family.tiny_config()
    return {"mlp_hidden_size": 128} if "mlp_hidden_size" in config else {"intermediate_size": 128}


@pytest.fixture(scope="module", params=families.names())
def prompted(request, tmp_path_factory):
    """A tiny checkpoint of each family, and a file of prompts of token ids for it."""
    directory = tmp_path_factory.mktemp(f"quantised-{request.param}")
    family = families.find(request.param)
    rng = np.random.default_rng(5)
    lines = [json.dumps({"prompt": rng.integers(0, 100, 9).tolist()}) for _ in range(4)]
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    path = write_checkpoint(
        family, directory / "checkpoint", model={**wide(family), **_short(family)}, change=calm
    )
    return path, directory / "prompts.jsonl"


def _short(family):
    return {
        "max_sequence_length"
        if "max_sequence_length" in family.tiny_config()
        else "max_position_embeddings": 160
    }


def quantised(path, out, kind, data=None, dtype=None, **how):
    config = ExportConfig(str(path), out, dtype=dtype or kind.dtypes[0])
    quantize.export(
        config, QuantizeConfig(kind.name, kind.target, data, **how), lambda total: lambda done: None
    )
    return out


def forward(artifact, ids):
    backend = OrtBackend(artifact, threads=1)
    rows = np.arange(ids.shape[1])[None]
    window = Window(ids, rows, np.zeros(1, np.int64), np.array([ids.shape[1]]), rows)
    return backend.prefix(backend.new_cache(1, ids.shape[1]), slice(0, 1), window, want_logits=True).logits[0]


@pytest.mark.parametrize(
    ("kind", "dtype"), TARGETED, ids=lambda value: value if isinstance(value, str) else ids(value)
)
def test_a_whole_model_stays_near_itself(prompted, tmp_path, kind, dtype):
    """Logits of both families beside the model as it was: error over their spread, root mean squares."""
    path, data = prompted
    before = forward(export_quietly(path, tmp_path / "fp32"), np.arange(3, 43)[None])
    after = forward(quantised(path, tmp_path / "out", kind, data, dtype, gate=False), np.arange(3, 43)[None])
    error = np.sqrt(np.square(after - before).mean() / np.square(before - before.mean()).mean())
    assert error < ALLOWED[kind.name], error


def test_a_tied_head_is_quantised_beside_the_embedding(tmp_path):
    path = write_checkpoint(
        LLADA, tmp_path / "checkpoint", model={**wide(LLADA), "weight_tying": True}, change=calm
    )
    before = forward(export_quietly(path, tmp_path / "fp32"), np.arange(3, 43)[None])
    for kind in KINDS[:2]:
        after = forward(quantised(path, tmp_path / kind.name, kind, gate=False), np.arange(3, 43)[None])
        assert np.corrcoef(after.ravel(), before.ravel())[0, 1] > 0.95
        names = {
            tensor.name
            for tensor in onnx.load(
                tmp_path / kind.name / "refine.onnx", load_external_data=False
            ).graph.initializer
        }
        assert {"embedding", "embedding.scale"} <= names and not any(
            name.startswith("head") for name in names
        )


def test_the_embedding_keeps_the_checkpoints_16_bits_on_a_cpu(tmp_path):
    """The demo checkpoint is in 16 bits: its embedding is not blown up, and decodes as widened."""
    artifact = quantised(DEMO, tmp_path / "out", KINDS[0], gate=False)
    held = {
        t.name: t for t in onnx.load(artifact / "refine.onnx", load_external_data=False).graph.initializer
    }
    assert held["embedding"].data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    assert load(artifact, threads=1).generate(["clean hall with mop"])[0].text


def test_graphs_hold_no_foreign_operators_but_those_of_their_scheme(tiny_checkpoint):
    source = read(str(tiny_checkpoint))
    dims = pipeline.roles.dims_of(source.decoder, "fp32")
    scheme = KINDS[0]("fp32")
    graph = pipeline.graph_of(
        "refine",
        source,
        "fp32",
        "statistics",
        contract.MODERN,
        plan(source.decoder, source.family, source.checkpoint, "fp32", scheme=scheme),
        scheme,
    )
    lint.check(graph, "refine", dims, "statistics", scheme.operators)
    for allowed in (frozenset(), frozenset({"MatMulNBits"})):
        with pytest.raises(DllmError, match="MatMulIntegerToFloat is not a standard op"):
            lint.check(graph, "refine", dims, "statistics", allowed)


def test_canvases_are_masked_at_every_ratio_and_place():
    rng = np.random.default_rng(6)
    canvas = rng.integers(1, 50, 60)
    done = quality.Decoded(
        None, [], canvas, 20, 47, None
    )  # 27 useful tokens: blocks of 8 begin at 20, 28, 36, 44
    drawn = quality.canvases([done] * 6, 8, 0)
    assert len(drawn) == 24
    for number, made_canvas in enumerate(drawn):
        ratio = quality.RATIOS[number % 4]
        assert len(made_canvas.masked) == round(8 * ratio)
        start = {0: 20, 1: 36, 2: 44}[(number // 4 + number % 4) % 3]
        assert set(made_canvas.masked) <= set(range(start, start + 8))
        for position, token in enumerate(made_canvas.ids):
            is_mask = position in made_canvas.masked or position >= start + 8
            assert token == (0 if is_mask else canvas[position])


def test_what_is_observed_is_the_largest_input_of_each_layer(tmp_path):
    """The first layer's inputs by hand: norms of embeddings. The others: within what the reference gives."""
    torch = pytest.importorskip("torch")
    from export.parity.reference import TorchBackend

    path = write_checkpoint(LLADA, tmp_path / "checkpoint", model=wide(LLADA))
    artifact, source = export_quietly(path, tmp_path / "fp32"), read(str(path))
    drawn = [quality.Canvas(np.random.default_rng(i).integers(0, 120, 30), np.array([3])) for i in range(3)]
    found = calibration.observe(artifact, source, drawn)
    reference, seen = TorchBackend(artifact, threads=1), {}

    def watch(name):
        def hook(module, given):
            largest = given[0].detach().abs().reshape(-1, given[0].shape[-1]).amax(0).numpy()
            seen[name] = np.maximum(seen.get(name, 0), largest)

        return hook

    for i, layer in enumerate(reference.network.layers):
        for part in (layer.self_attn, layer.mlp):
            for name, module in part.named_children():
                if name.endswith("_proj"):
                    module.register_forward_pre_hook(watch(f"layers.{i}.{name}"))
    with torch.inference_mode():
        for canvas in drawn:
            reference.logits(
                reference.new_cache(1, 30),
                slice(0, 1),
                quality.window_of(canvas, np.arange(30)),
                own_rows_only=True,
            )
    assert set(found.inputs) == set(seen) == set(found.weights)
    for name, largest in seen.items():
        assert np.allclose(found.inputs[name], largest, rtol=1e-3, atol=1e-4), name
        stored = source.checkpoint.tensors[LLADA.tensor_name(name)]
        assert (found.weights[name] == np.abs(stored.open().reshape(stored.shape)).max(0)).all()
    found.write(tmp_path)
    again = Calibration.read(tmp_path)
    assert all((again.inputs[name] == found.inputs[name]).all() for name in seen) and set(
        again.weights
    ) == set(seen)
    (tmp_path / "calibration.npz").write_bytes(b"PK\3\4 nothing")
    with pytest.raises(DllmError, match=r"calibration.npz: cannot be read"):
        Calibration.read(tmp_path)


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory):
    """Held-out prompts of the demo model with their answers."""
    path = tmp_path_factory.mktemp("data") / "demo.jsonl"
    lines = [
        {"prompt": e.prompt, "answers": [json.dumps(plan) for plan in demo_task.spellings(e.plan)]}
        for e in demo_prompts.held_out(16)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture(scope="module")
def w8a8(demo_data, tmp_path_factory):
    return quantised(DEMO, tmp_path_factory.mktemp("w8a8") / "out", KINDS[0], demo_data, match="json")


@pytest.mark.parametrize("kind", KINDS[1:], ids=ids)
def test_every_scheme_passes_the_gate_on_the_demo_model(demo_data, tmp_path, kind):
    artifact = quantised(DEMO, tmp_path / "out", kind, demo_data, "fp32", match="json")
    facts = manifests.load(artifact, check_hashes=True).quantization
    assert (facts.scheme, facts.target) == (kind.name, kind.target)
    measured = facts.quality
    assert (
        measured["judged"] == (8 if kind.is_calibrated else 16)
        and measured["right"] + 1 >= measured["right_before"] >= measured["judged"] - 1
    )
    assert (
        0 < measured["kl_mean"] < tolerances.QUANTIZED_KL and measured["canvases"] == 4 * measured["examples"]
    )
    assert (facts.calibration or {}).get("prompts") == (8 if kind.is_calibrated else None)
    stages = list(verify.verify(artifact))
    assert [stage.name for stage in stages if not stage.passed] == []
    assert f"same token {100 * measured['same_token']:.1f} %, " in str(stages[-1])


def test_a_quantised_artifact_is_one_of_ours_in_every_way(w8a8, capsys):
    assert cli.verify(w8a8, None)
    assert "w8a8 for ort-cpu" in _info(w8a8, capsys)
    model = load(w8a8, threads=1)
    config = GenerationConfig(gen_length=40)
    prompts = ["hand blue pens to Mia, and clean hall with mop", "find red keys in attic"]
    assert [r.tokens for r in model.generate(prompts, config)] == [
        model.generate([p], config)[0].tokens for p in prompts
    ]
    assert manifests.load(w8a8).verified["passed"]


def _info(artifact, capsys):
    from trt_runtime.cli import main as runtime

    capsys.readouterr()
    assert runtime.main(["info", str(artifact)]) == 0
    return capsys.readouterr().out


def test_changed_weights_of_a_quantised_artifact_are_found(w8a8, tmp_path):
    copy = shutil.copytree(w8a8, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    planned = plan(
        read(str(DEMO)).decoder, LLADA, read(str(DEMO)).checkpoint, "fp32", scheme=KINDS[0]("fp32")
    )
    place = next(weight for weight in planned if weight.name == "layers.2.up_proj.int8")
    with open(copy / "weights.data", "r+b") as file:
        file.seek(place.offset + 5)
        file.write(b"\x11")
    manifest["files"]["weights.data"]["sha256"] = manifests.sha256_of(copy / "weights.data")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    stage = next(verify.verify(copy))
    assert stage.name == "weights" and not stage.passed and "layers.2.up_proj.int8" in str(stage)


def test_without_the_gate_nothing_is_claimed(tmp_path, capsys):
    artifact = quantised(GOLDENS / "llada_tiny", tmp_path / "out", KINDS[0], gate=False)
    assert manifests.load(artifact).quantization.quality is None
    assert "its quality was not measured" in _info(artifact, capsys)
    stages = {stage.name: stage.passed for stage in verify.verify(artifact)}
    assert stages == {"weights": True, "canvases": True, "quality": False}


def test_a_scheme_that_changes_the_model_too_much_is_refused(demo_data, tmp_path, monkeypatch):
    """Three bits where four are promised: nothing is left, and the sentence says what was measured."""
    real = blocks.rounded
    monkeypatch.setattr(
        blocks, "rounded", lambda rows, shape, block, bits, *o: real(rows, shape, block, min(bits, 3), *o)
    )
    with pytest.raises(
        DllmError,
        match=r"int4 changes this model too much: KL .* allowed 0.015; .* proposed again.*--gate no",
    ) as error:
        quantised(DEMO, tmp_path / "out", KINDS[1], demo_data, match="json")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_lost_answers_alone_fail_the_gate():
    held = quality.Quality(200, 800, 4000, 0.001, 0.1, 1.0, 9000, 0.999, 0.99, 0.9, 200, 196, 194)
    assert list(held.failures()) == []
    worse = quality.Quality(200, 800, 4000, 0.001, 0.1, 1.0, 9000, 0.999, 0.99, 0.9, 200, 196, 193)
    assert [*worse.failures()] == ["193 of 200 answers are right, 196 were before: allowed are 2 less"]
    assert (
        len([*quality.Quality(2, 8, 40, float("nan"), 0.1, 1.0, 9, 0.9, 0.9, 0.9, 0, 0, 0).failures()]) == 3
    )


REFUSALS = [
    (["--quantize", "w8a8"], "needs prompts to measure the quality on"),
    (["--quantize", "fp8", "--dtype", "fp16", "--gate", "no"], "needs prompts to calibrate"),
    (["--quantize", "w8a8", "--data", "{missing}"], "cannot be read"),
    (["--quantize", "w8a8", "--dtype", "fp16", "--gate", "no"], "export with DTYPE=fp32"),
    (["--quantize", "w8a8", "--target", "tensorrt", "--gate", "no"], "w8a8 is for ort-cpu, not for tensorrt"),
    (["--quantize", "w8a8", "--weights", "link", "--gate", "no"], "--weights link keeps"),
    (["--quantize", "w8a8", "--lowering", "legacy", "--gate", "no"], "modern lowering"),
    (["--gate", "no"], "--gate goes with --quantize"),
    (["--target", "tensorrt"], "--target goes with --quantize"),
    (
        [
            "--quantize",
            "int4",
            "--target",
            "tensorrt",
            "--dtype",
            "fp16",
            "--gate",
            "no",
            "--checkpoint",
            "{narrow}",
        ],
        "multiple of 64",
    ),
]


@pytest.mark.parametrize(("options", "said"), REFUSALS, ids=[said for _, said in REFUSALS])
def test_bad_options_are_one_clear_line(options, said, tmp_path, capsys):
    narrow = write_checkpoint(LLADA, tmp_path / "narrow")
    filled = [text.format(missing=tmp_path / "missing", narrow=narrow) for text in options]
    assert cli.main(["--model", "llada", "--out", str(tmp_path / "out"), "--verify", "no", *filled]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["narrow"]


def test_prompts_that_are_not_used_are_said(demo_data, tmp_path, capsys):
    command = [
        "--model",
        "llada",
        "--out",
        str(tmp_path / "out"),
        "--verify",
        "no",
        "--quantize",
        "w8a8",
        "--data",
        str(demo_data),
        "--gate",
        "no",
    ]
    assert cli.main(command) == 0
    assert "the prompts of --data are not used" in capsys.readouterr().err


def test_unknown_schemes_and_targets_say_what_exists():
    with pytest.raises(DllmError, match=r"w8a9.*w8a8"):
        schemes.find("w8a9")
    with pytest.raises(DllmError, match="tensort"):
        schemes.find("int4", "tensort")


def test_memory_that_does_not_suffice_is_said_before(demo_data, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "meminfo", lambda name: 1 << 20)
    with pytest.raises(DllmError, match="measuring the quality runs the model in fp32: about 0 GiB"):
        quantised(DEMO, tmp_path / "out", KINDS[0], demo_data)


def test_a_cpu_artifact_is_refused_on_gpus(w8a8, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx_bindings")
    with pytest.raises(DllmError, match=r"quantised \(w8a8\).*run on a CPU: for a GPU export it with"):
        store.build(w8a8, tmp_path, store.BuildConfig("tensorrt-rtx", targets=("sm89",)))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(DllmError, match=r"quantised \(w8a8\)"):
        OrtCudaBackend(w8a8)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.target == "tensorrt"], ids=ids)
def test_tensorrt_rtx_builds_every_scheme_for_its_targets(demo_data, tmp_path, kind):
    """No GPU is needed. That weights stay in few bits shows in the engine's size beside that of the fp16
    artifact's."""
    pytest.importorskip("tensorrt_rtx_bindings")
    artifact = quantised(
        DEMO, tmp_path / "out", kind, demo_data, "fp16" if kind.name != "int8-sq" else "bf16", gate=False
    )
    targets = ("sm89", "sm120") if kind.name == "fp8" else ("sm86", "sm89", "sm120")
    config = store.BuildConfig("tensorrt-rtx", targets=targets, max_length=128, block_length=8)
    assert list(store.build(artifact, tmp_path / "engines", config).glob("*.engine"))
    if kind.name == "fp8":
        with pytest.raises(DllmError, match="from SM89 on; this one is SM86"):
            store.build(artifact, tmp_path / "engines", store.replace(config, targets=("sm86",)))
