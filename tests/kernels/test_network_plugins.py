"""The kernels of the head and of attention as TensorRT plugins: their definition as TensorRT reads it, and
their place in parsed networks. What stands in their place here are ordinary layers
(test_tensorrt_plugins.py)."""

from __future__ import annotations

import re

import pytest
from bindings import VERSIONS, agrees, told
from places import GOLDENS, export_quietly
from plugin_layers import built, needed_layers, ordinary_layers, outputs_of

from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.tensorrt import kernels
from trt_runtime.backends.tensorrt.store import BuildConfig
from trt_runtime.errors import DllmError

pytest.importorskip("triton")
rtx = pytest.importorskip("tensorrt_rtx_bindings")
_HALF = "float16"

# LLaDA-8B's sizes
HEAD = {
    "partial": (
        [["rows", 4096], [126464, 4096]],
        [_HALF, _HALF],
        [[6, "rows", 988], ["rows", 988]],
        ["FLOAT", "INT32"],
        ("(FLOOR_DIV (SUM rows 31) 32)", "988"),
    ),
    "merge": (
        [[6, "rows", 988], ["rows", 988]],
        ["float32", "int32"],
        [["rows"]] * 4,
        ["INT64", *["FLOAT"] * 3],
        ("rows", "1"),
    ),
}


@pytest.mark.parametrize("kernel", HEAD)
def test_tensorrt_is_told_what_the_kernels_of_the_head_are(kernel, tmp_path):
    shapes, types, outputs, kinds, grid = HEAD[kernel]
    seen = told(VERSIONS[0], tmp_path, f"head_{kernel}", "126464 4096 126336 fp16", shapes, types)
    agrees(seen, outputs, kinds, grid, "rows", len(shapes))


# Dream-7B's sizes; the query heads are rows of 4 KV heads
ATTENTION = {
    "attend": (
        [["batch", 4, "rows", 128], ["batch", 4, 4096, 128], ["batch", 4, 4096, 128], ["batch"]],
        [*[_HALF] * 3, "int64"],
        [["(PROD (PROD batch 4) rows)", 4, 128], ["(PROD (PROD batch 4) rows)", 4, 2]],
        ["FLOAT", "FLOAT"],
        ("(PROD (PROD batch 4) (FLOOR_DIV (SUM rows 31) 32))", "4"),
    ),
    "combine": (
        [["batch", 4, "rows", 128], ["count", 4, 128], ["count", 4, 2]],
        [_HALF, "float32", "float32"],
        [["batch", 4, "rows", 128]],
        ["HALF"],
        ("(PROD (PROD batch 4) rows)", "1"),
    ),
}


@pytest.mark.parametrize("kernel", ATTENTION)
def test_tensorrt_is_told_what_the_kernels_of_attention_are(kernel, tmp_path):
    shapes, types, outputs, kinds, grid = ATTENTION[kernel]
    seen = told(VERSIONS[0], tmp_path, f"attention_{kernel}", "4 128 4096 0.0625 fp16 1", shapes, types)
    agrees(seen, outputs, kinds, grid, "rows", len(shapes))


@pytest.mark.parametrize(
    ("family", "lowering", "dtype"),
    [
        ("llada", "modern", "bf16"),
        ("dream", "modern", "fp16"),
        ("illada", "legacy", "fp16"),
        ("llada", "modern", "fp32"),
    ],
)
def test_the_head_is_replaced_in_a_parsed_network(tmp_path, family, lowering, dtype):
    """The product of the head and the float32 copy of its weights are not needed any more; outputs keep
    names, order, types and shapes; TensorRT-RTX builds it. iLLaDA's head is its embedding."""
    from plugins.tensorrt_networks import replace_head

    artifact = export_quietly(
        GOLDENS / f"{family}_tiny", tmp_path / "artifact", lowering=lowering, dtype=dtype
    )
    manifest, seen = manifests.load(artifact), []
    names = {"fp32": rtx.float32, "fp16": rtx.float16, "bf16": rtx.bfloat16}

    def make(network):
        def added(sizes, tensors):
            hidden, head = tensors
            assert sizes == (manifest.model.vocab_size, manifest.model.hidden_size, mask, dtype)
            assert (hidden.dtype, head.dtype) == (names[dtype],) * 2 and tuple(head.shape) == sizes[:2]
            none, transposed = rtx.MatrixOperation.NONE, rtx.MatrixOperation.TRANSPOSE
            product = network.add_matrix_multiply(hidden, none, head, transposed).get_output(0)
            return ordinary_layers(network)(network.add_cast(product, rtx.float32).get_output(0), mask)

        return added

    mask = manifest.decoding.mask_token_id

    def edit(network, trt):
        before, old = outputs_of(network), _head_of(network)
        replace_head(network, trt, mask, make(network))
        assert outputs_of(network) == before
        needed = needed_layers(network)
        assert old not in needed and not [name for name in needed if "ReduceSum" in name]
        with pytest.raises(DllmError, match=r"is .*, expected"):
            replace_head(network, trt, mask, lambda sizes, tensors: [tensors[0]] * 4)
        seen.append(network)

    made = built(artifact, manifest, edit)
    assert made is not None and len(seen) == 1


def _head_of(network) -> str:
    """The name of the product whose output has the vocabulary's width in float32."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    products = [layer for layer in layers if layer.type == rtx.LayerType.MATRIX_MULTIPLY]
    return products[-1].name


def test_a_head_that_cannot_be_replaced_is_refused(tmp_path):
    from plugins.tensorrt_networks import replace_head

    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "logits", dtype="fp16", head="logits")
    manifest = manifests.load(artifact)
    with pytest.raises(DllmError, match="the artifact returns logits"):
        BuildConfig(head_plugin=True).checked(manifest)
    with pytest.raises(DllmError, match="--head-plugin needs --backend tensorrt"):
        BuildConfig("tensorrt-rtx", head_plugin=True).checked(manifest)
    said = []

    def edit(network, trt):
        with pytest.raises(DllmError, match="the logits are an output"):
            replace_head(network, trt, 0, lambda sizes, tensors: [])
        said.append(True)

    built(artifact, manifest, edit, max_batch=1)
    assert said
    statistics = export_quietly(GOLDENS / "llada_tiny", tmp_path / "statistics", dtype="fp16")
    assert BuildConfig(head_plugin=True).checked(manifests.load(statistics)).plugins


@pytest.mark.parametrize(("family", "dtype"), [("llada", "bf16"), ("dream", "fp16"), ("llada", "fp32")])
def test_attention_is_replaced_in_a_parsed_network(tmp_path, family, dtype):
    """Queries without the parser's factor, and the caches themselves; nothing of the old attention is needed;
    TensorRT-RTX builds it."""
    from plugins.tensorrt_networks import replace_attention

    artifact = export_quietly(GOLDENS / f"{family}_tiny", tmp_path / "artifact", dtype=dtype)
    manifest, seen = manifests.load(artifact), []
    scale = kernels.attention_scale(artifact / "refine.onnx")
    assert scale == pytest.approx(1 / 16 if dtype != "fp32" else manifest.model.head_dim**-0.5)

    def make(network):
        def added(sizes, tensors, group):
            query, key, value, kv_len = tensors
            model = manifest.model
            assert sizes == (model.num_kv_heads, model.head_dim, 64, scale, dtype) and group == 1
            assert re.fullmatch(r"updated_key\.\d", key.name) and re.fullmatch(
                r"updated_value\.\d", value.name
            )
            assert kv_len.name == "kv_len" and query.shape[1:2] == key.shape[1:2]
            none, transposed = rtx.MatrixOperation.NONE, rtx.MatrixOperation.TRANSPOSE
            scores = network.add_matrix_multiply(query, none, key, transposed).get_output(0)
            softmax = network.add_softmax(scores)
            softmax.axes = 1 << 3
            return network.add_matrix_multiply(softmax.get_output(0), none, value, none).get_output(0)

        return added

    def edit(network, trt):
        count = replace_attention(network, trt, scale, dtype, manifest.model.num_layers, make(network))
        assert count == manifest.model.num_layers
        assert not [name for name in needed_layers(network) if "Attention" in name]
        with pytest.raises(DllmError, match="attention layers, expected 9"):
            replace_attention(network, trt, scale, dtype, 9, make(network))
        seen.append(network)

    made = built(artifact, manifest, edit, "split")
    assert made is not None and len(seen) == 1


def test_where_attention_cannot_be_replaced_the_build_says_so(tmp_path):
    modern = manifests.load(export_quietly(GOLDENS / "llada_tiny", tmp_path / "modern", dtype="fp16"))
    legacy = manifests.load(
        export_quietly(GOLDENS / "llada_tiny", tmp_path / "legacy", dtype="fp16", lowering="legacy")
    )
    blocks = manifests.load(export_quietly(GOLDENS / "sdar_tiny", tmp_path / "blocks", dtype="fp16"))
    for manifest, layout, said in (
        (modern, "shared", "the layout is shared: add --layout split"),
        (legacy, "split", "the lowering is legacy: export with --lowering modern"),
        (blocks, "split", "the model has block-causal attention: remove it"),
    ):
        with pytest.raises(DllmError, match=said):
            BuildConfig(layout=layout, attention_plugin=True).checked(manifest)
    assert BuildConfig(layout="split", attention_plugin=True).checked(modern).plugins
