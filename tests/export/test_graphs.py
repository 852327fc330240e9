"""The graphs: their contract, their lint, and their numbers against the goldens, the reference and one
another."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from calls import logits, window
from places import GOLDENS, export_quietly
from safetensors.numpy import load_file

from export.graph import lint, roles
from export.parity.verify_graphs import exposed
from export.pipeline import read
from export.weights.plan import plan
from trt_runtime.artifact import contract
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.backend import Window
from trt_runtime.errors import DllmError
from trt_runtime.measure import tolerances


@pytest.mark.parametrize("name", ["c0", "c1"])
def test_forward_goldens(golden_backend, golden_family, name):
    """Full pass, keys and values, and both refine calls after edits of the block: 1e-4 relative. Logits stand
    at their own row."""
    data = {
        k[3:]: v
        for k, v in load_file(GOLDENS / f"{golden_family}_forward.safetensors").items()
        if k.startswith(name)
    }
    meta = json.loads((GOLDENS / "forward_meta.json").read_text())[f"{golden_family}.{name}"]
    start, length = meta["s"], meta["L"]
    kv_heads = golden_backend.manifest.model.num_kv_heads
    theta = {"llada": 500000.0, "dream": 1000000.0}[golden_family]

    def close(got, expected):
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()

    def heads(recorded):  # [1, H, L, D], or [1, L, H * D]
        return recorded.reshape(1, length, kv_heads, -1).swapaxes(1, 2) if recorded.ndim == 3 else recorded

    for kind, ids in (("prefix", data["suffix_ids"]), ("dual", data["block_ids"])):
        cache = golden_backend.new_cache(1, length)
        close(logits(golden_backend, cache, window(data["input_ids"])), data["full_logits"])
        for layer in range(4):
            close(cache.buffers.arrays[f"cache_value.{layer}"], heads(data[f"v.{layer}"]))
            close(cache.buffers.arrays[f"cache_key.{layer}"], _rotated(heads(data[f"k.{layer}"]), theta))
        close(logits(golden_backend, cache, window(ids, start, [length])), data[f"{kind}_refine_logits"])
    assert (
        np.abs(data["recompute_logits"][:, start : start + 8] - data["dual_refine_logits"]).max() > 0.1
    )  # a cache matters


def _rotated(keys: np.ndarray, theta: float) -> np.ndarray:
    """Half-split RoPE of keys [1, H, L, D], written with complex numbers."""
    half = keys.shape[-1] // 2
    angle = np.arange(keys.shape[2])[:, None] * theta ** (-np.arange(half) / half)
    turned = (keys[..., :half] + 1j * keys[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def test_prefix_graph_equals_refine_graph_at_index_zero(tiny_artifact):
    """Logits of every row and the caches: that equality lets one engine serve both roles."""
    rng, made = np.random.default_rng(0), {}
    ids = rng.integers(0, 120, (3, 40))
    call = window(ids, kv_len=[40, 31, 22])
    for role in contract.ROLES:
        backend = OrtBackend(tiny_artifact, role=role, threads=1)
        cache = backend.new_cache(3, 40)
        made[role] = (logits(backend, cache, call), cache.buffers.arrays)
    for row, length in enumerate(call.kv_len):
        assert (
            np.abs(made["prefix"][0][row, :length] - made["refine"][0][row, :length]).max()
            <= tolerances.SAME_GRAPH["fp32"]
        )
        for name, array in made["prefix"][1].items():
            assert np.abs(array[row, :, :length] - made["refine"][1][name][row, :, :length]).max() <= 1e-5


def test_logits_equal_the_reference(tiny_artifact, tiny_checkpoint):
    """max |d| < 1e-4 against transformers, whole canvas and a refine step in a ragged batch."""
    reference = pytest.importorskip("export.parity.reference").TorchBackend(
        tiny_artifact, checkpoint=str(tiny_checkpoint), threads=1
    )
    import torch

    backend, rng = OrtBackend(tiny_artifact, threads=1), np.random.default_rng(1)
    for _ in range(4):
        full = window(rng.integers(0, 120, (2, 33)), kv_len=[33, 27])
        step = window(rng.integers(0, 120, (2, 6)), 11, [33, 27])
        mine, theirs = backend.new_cache(2, 33), reference.new_cache(2, 33)
        valid = (np.arange(33) < np.array([[33], [27]]))[..., None]
        with torch.inference_mode():
            expected = reference.logits(theirs, slice(0, 2), full, own_rows_only=True).numpy()
            assert np.abs((logits(backend, mine, full) - expected) * valid).max() < 1e-4
            expected = reference.logits(theirs, slice(0, 2), step, own_rows_only=False).numpy()
        assert np.abs(logits(backend, mine, step) - expected).max() < 1e-4


def test_statistics_are_those_of_the_logits(golden_backend, golden_artifact):
    rng = np.random.default_rng(2)
    call = window(rng.integers(0, 1024, (2, 50)), kv_len=[50, 45])
    stats = golden_backend.prefix(golden_backend.new_cache(2, 50), slice(0, 2), call, want_logits=True)
    wide = stats.logits.astype(np.float64)
    probability = np.exp(wide - wide.max(-1, keepdims=True))
    probability /= probability.sum(-1, keepdims=True)
    entropy = -(probability * np.log(probability)).sum(-1)
    allowed = probability.copy()
    allowed[..., 1000] = -1
    best = np.sort(allowed, -1)
    assert (stats.token == allowed.argmax(-1)).all()
    assert np.abs(stats.confidence - best[..., -1]).max() < 1e-5
    assert np.abs(stats.runner_up - best[..., -2]).max() < 1e-5
    assert np.abs(stats.entropy - entropy).max() < 1e-4


def test_the_mask_token_is_never_proposed_and_ties_take_the_lowest_id(tmp_path):
    """The statistics alone, on logits that put the mask first, second and third, and on ties."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="statistics")
    from onnxscript import GraphBuilder

    builder = GraphBuilder(graph)
    given = builder.input("given", ir.DataType.FLOAT, ["N", 6])
    rows = builder.input("rows", ir.DataType.INT64, ["B", "R"])
    made = roles._statistics(builder.op, given, rows, 2, 6)
    for name in contract.STATISTICS:
        builder.add_output(made[name], name)
    ir.save(ir.Model(graph, ir_version=11), tmp_path / "statistics.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(tmp_path / "statistics.onnx"), providers=["CPUExecutionProvider"]
    )
    values = np.array(
        [[1, 5, 9, 3, 2, 0], [9, 5, 8, 3, 2, 0], [9, 8, 7, 3, 2, 0], [4, 4, 4, 4, 4, 4]], np.float32
    )
    got = session.run(list(contract.STATISTICS), {"given": values, "rows": np.zeros((1, 4), np.int64)})
    weights = np.exp(values) / np.exp(values).sum(-1, keepdims=True)
    assert got[0].tolist() == [[1, 0, 0, 0]]
    assert np.allclose(got[1][0], weights[range(4), [1, 0, 0, 0]], rtol=1e-5)
    assert np.allclose(got[2][0], weights[range(4), [3, 1, 1, 1]], rtol=1e-5)


def test_attention_is_bidirectional_and_padding_and_batch_mates_change_nothing(tiny_artifact):
    backend, rng = OrtBackend(tiny_artifact, threads=1), np.random.default_rng(3)
    ids = rng.integers(0, 120, (1, 20))
    alone = logits(backend, backend.new_cache(1, 20), window(ids))
    changed = ids.copy()
    changed[0, 19] = (ids[0, 19] + 1) % 120
    assert np.abs(logits(backend, backend.new_cache(1, 20), window(changed))[0, 0] - alone[0, 0]).max() > 1e-4
    for other in (5, 77):
        padded = np.full((2, 28), other)
        padded[0, :20] = ids
        beside = logits(backend, backend.new_cache(2, 28), window(padded, kv_len=[20, 28]))
        assert np.abs(beside[0, :20] - alone[0]).max() < 1e-5


def test_rows_asked_for_are_those_rows(tiny_artifact):
    """The last layer is pruned to logit_rows: any choice of rows, in any order, repeated or not."""
    backend, rng = OrtBackend(tiny_artifact, threads=1), np.random.default_rng(4)
    ids = rng.integers(0, 120, (2, 16))
    everything = logits(backend, backend.new_cache(2, 16), window(ids))
    rows = np.array([[3, 15, 0], [7, 7, 2]])
    some = logits(backend, backend.new_cache(2, 16), window(ids, rows=rows))
    assert np.abs(some - everything[[[0], [1]], rows]).max() < 1e-5


@pytest.mark.parametrize("lowering", contract.LOWERINGS)
def test_padding_is_told_by_its_rows_and_not_by_its_positions(tiny_checkpoint, tmp_path, lowering):
    """Rows of unequal length in one prefix pass, and rows whose positions skip some (a bounded suffix): the
    prefix graph gives what each row gives alone, whatever stands in the padding."""
    artifact = export_quietly(tiny_checkpoint, tmp_path / "artifact", lowering=lowering, head="logits")
    backend = OrtBackend(artifact, threads=1, role="prefix")
    rng, lengths = np.random.default_rng(0), np.array([9, 14, 12])
    ids = rng.integers(0, 100, (3, 14))
    positions = np.tile(np.arange(14), (3, 1))
    positions[2, 8:12] = [20, 21, 40, 60]  # gaps, far beyond the number of rows
    for filler in (0, 13, 100):
        held, at = ids.copy(), positions.copy()
        for row, length in enumerate(lengths):
            held[row, length:], at[row, length:] = filler % 90, filler
        call = Window(held, at, np.zeros(3, np.int64), lengths, np.tile(np.arange(4), (3, 1)))
        together = backend.prefix(backend.new_cache(3, 14), slice(0, 3), call, want_logits=True)
        for row, length in enumerate(lengths):
            one = Window(
                held[row : row + 1, :length],
                at[row : row + 1, :length],
                np.zeros(1, np.int64),
                lengths[row : row + 1],
                np.arange(4)[None],
            )
            alone = backend.prefix(backend.new_cache(1, 14), slice(0, 1), one, want_logits=True)
            assert np.abs(together.logits[row] - alone.logits[0]).max() < 1e-4


def test_graphs_declare_the_contract(tiny_artifact):
    backend = OrtBackend(tiny_artifact, threads=1)
    dims = backend.manifest.dims
    for role in contract.ROLES:
        graph = onnx.load(tiny_artifact / f"{role}.onnx", load_external_data=False).graph
        for side, specs in (
            (graph.input, contract.inputs(role, dims)),
            (graph.output, contract.outputs(role, dims, "logits")),
        ):
            shown = [
                (v.name, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim))
                for v in side
            ]
            assert shown == [(spec.name, spec.axes) for spec in specs]
        listed = backend.manifest.graphs[role]
        assert [row[0] for row in listed.inputs] == [v.name for v in graph.input]


def _graph(role="refine", dtype="fp32", head="statistics", lowering="modern"):
    source = read(str(GOLDENS / "llada_tiny"))
    weights = {w.name: w.external() for w in plan(source.decoder, source.family, source.checkpoint, dtype)}
    model = roles.build(
        role, source.decoder, dtype=dtype, head=head, mask_token_id=1000, weights=weights, lowering=lowering
    )
    return model, roles.dims_of(source.decoder, dtype, lowering)


@pytest.mark.parametrize("dtype", contract.DTYPES)
@pytest.mark.parametrize("head", contract.HEADS)
@pytest.mark.parametrize("role", contract.ROLES)
@pytest.mark.parametrize("lowering", contract.LOWERINGS)
def test_lint_passes_what_we_build(role, dtype, head, lowering):
    model, dims = _graph(role, dtype, head, lowering)
    assert list(lint.find(model, role, dims, head)) == []


def _node(model, op_type):
    return next(node for node in model.graph if node.op_type == op_type)


def _extra_attention_input(model):
    node = _node(model, "Attention")
    length = next(value for value in model.graph.inputs if value.name == "kv_len")
    node.resize_inputs(7)
    node.replace_input_with(6, length)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (_extra_attention_input, "Attention has 7 inputs"),
        (lambda m: _node(m, "Attention").attributes.add(ir.AttrInt64("is_causal", 1)), "is_causal is 1"),
        (
            lambda m: _node(m, "Attention").attributes.add(ir.AttrInt64("left_window_size", 4)),
            "left_window_size is 4",
        ),
        (
            lambda m: _node(m, "RotaryEmbedding").attributes.add(ir.AttrInt64("interleaved", 1)),
            "interleaved is 1",
        ),
        (
            lambda m: _node(m, "TensorScatter").attributes.add(ir.AttrString("mode", "circular")),
            "mode is 'circular'",
        ),
        (
            lambda m: m.graph.inputs.append(ir.val("spare", ir.DataType.INT64, ["B"])),
            "input spare is consumed by no node",
        ),
        (lambda m: setattr(_node(m, "Sigmoid"), "domain", "com.microsoft"), "not a standard op"),
        (lambda m: setattr(_node(m, "Sigmoid"), "op_type", "NonZero"), "NonZero does not build"),
        (lambda m: setattr(m.graph.inputs[3], "name", "kv_lengths"), "the contract says ('kv_len'"),
        (lambda m: m.graph.opset_imports.update({"": 25}), "expected the standard opset 24"),
        (lambda m: m.graph.outputs.pop(), "outputs, the contract says"),
    ],
)
def test_lint_finds_planted_faults(fault, said):
    model, dims = _graph()
    fault(model)
    with pytest.raises(DllmError, match="breaks"):
        lint.check(model, "refine", dims, "statistics")
    assert any(said in breach for breach in lint.find(model, "refine", dims, "statistics"))


def test_no_weight_is_in_the_graph_files(tiny_artifact):
    for role in contract.ROLES:
        assert (tiny_artifact / f"{role}.onnx").stat().st_size < 60_000
        model = onnx.load(tiny_artifact / f"{role}.onnx", load_external_data=False)
        inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert sum(len(t.raw_data) + 8 * len(t.int64_data) for t in inside) < 1000


def test_bf16_graphs_pass_the_checker(tmp_path):
    for role in contract.ROLES:
        model, _ = _graph(role, "bf16")
        ir.save(model, tmp_path / f"{role}.onnx")
        proto = onnx.load(tmp_path / f"{role}.onnx", load_external_data=False)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)


def test_exposed_values_are_outputs(tiny_artifact):
    names = [
        o.name for o in onnx.load_from_string(exposed(tiny_artifact, "refine", ["logits", "x"])).graph.output
    ]
    assert names.count("logits") == 1 and "x" in names
