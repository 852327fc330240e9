"""Quantised linear layers: what each scheme stores, what its graphs compute, what it is calibrated with, and
the gate."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from exports import quantised, scheme_id
from places import DEMO, export_quietly
from tiny import WHOLE_FAMILIES, write_checkpoint

from export import families, pipeline, schemes
from export.graph import lint
from export.pipeline import read
from export.quantize import calibration
from export.quantize import gate as quality
from export.schemes.base import Calibration
from export.weights.plan import plan
from trt_runtime.artifact import contract
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.backend import Window
from trt_runtime.errors import DllmError
from trt_runtime.model import load

LLADA = families.find("llada")
KINDS = schemes.SCHEMES
ALLOWED = {
    "w8a8": 0.03,
    "int8-sq": 0.24,
    "fp8": 0.08,
    "int4": 0.2,
}  # the largest seen: 0.020, 0.185, 0.064, 0.168
TARGETED = [(kind, dtype) for kind in KINDS for dtype in kind.dtypes if dtype != "bf16"]


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


@pytest.fixture(scope="module", params=WHOLE_FAMILIES)
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


def forward(artifact, ids):
    backend = OrtBackend(artifact, threads=1)
    rows = np.arange(ids.shape[1])[None]
    window = Window(ids, rows, np.zeros(1, np.int64), np.array([ids.shape[1]]), rows)
    return backend.prefix(backend.new_cache(1, ids.shape[1]), slice(0, 1), window, want_logits=True).logits[0]


@pytest.mark.parametrize(
    ("kind", "dtype"), TARGETED, ids=lambda value: value if isinstance(value, str) else scheme_id(value)
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
    blocks = [(20, 28), (28, 36), (36, 44), (44, 52), (52, 60)]
    done = quality.Decoded(None, [], canvas, 20, 47, None, blocks, None)  # the last block has no useful token
    drawn = quality.canvases([done] * 6, 0)
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
