"""Row statistics as a TensorRT plugin: its definition as TensorRT 10.16 and 11.4 read it, and its place in
parsed networks.

No engine with a plugin can be built without a GPU: TensorRT-RTX has none of this kind. What stands in its
place here are ordinary layers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from bindings import VERSIONS, bindings_of
from places import GOLDENS, ROOT, export_quietly
from plugin_layers import needed_layers, ordinary_layers

from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.tensorrt import builder, kernels, store
from trt_runtime.backends.tensorrt.store import BuildConfig
from trt_runtime.errors import DllmError

pytest.importorskip("triton")
rtx = pytest.importorskip("tensorrt_rtx_bindings")


def _told(version, folder, name, facts, shapes, types):
    """What TensorRT is told of a plugin, through the real tensorrt.plugin of the version."""
    environment = {
        key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"
    } | bindings_of(version, folder)
    environment["PYTHONPATH"] += f":{ROOT}"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "helpers" / "plugin_harness.py"),
            json.dumps([name, facts, 90, shapes, types]),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["version"], told["aot"]) == (version, True)
    assert f"rejected the plugin dllm::{name}" in told["refused"]
    assert f".entry {told['name']}(" in told["ptx"] and str(ROOT) not in told["ptx"]
    return told


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt_is_told_what_the_kernel_is(version, tmp_path):
    """Types, shapes, launch and PTX."""
    told = _told(version, tmp_path, "row_statistics", "126464 126336", [["rows", 126464]], ["float32"])
    assert told["extra"] == []
    assert told["kinds"] == ["DataType.INT64", *["DataType.FLOAT"] * 3] and told["shapes"] == [["rows"]] * 4
    assert told["launch"]["grid_x"] == "rows" and told["launch"]["block_x"] == "128"
    assert told["name"] == "dllm_row_statistics_126464_126336"


# LLaDA-MoE's sizes: kernel -> shapes and types of inputs, then shapes and types of outputs, grid, and rows
_ROUTED, _HALF = ["rows", 64], "float16"
EXPERTS = {
    "sort_rows": (
        [_ROUTED],
        ["float32"],
        [[64], [64, "rows"], ["rows", 64]],
        ["INT32"] * 3,
        ("64", "1"),
        "rows",
    ),
    "inner": (
        [["rows", 2048], [65536, 2048], [65536, 2048], [64], [64, "rows"]],
        [*[_HALF] * 3, "int32", "int32"],
        [["(PROD rows 8)", 1024]],
        ["HALF"],
        ("(SUM (FLOOR_DIV (PROD rows 8) 64) 64)", "16"),
        "rows",
    ),
    "outer": (
        [[["rows", 8], 1024], [2048, 65536], [64]],
        [_HALF, _HALF, "int32"],
        [["(PROD (FLOOR_DIV (PROD rows 8) 8) 8)", 2048]],
        ["FLOAT"],
        ("(SUM (FLOOR_DIV (PROD (FLOOR_DIV (PROD rows 8) 8) 8) 64) 64)", "32"),
        "(FLOOR_DIV (PROD rows 8) 8)",
    ),
    "combine": (
        [[["rows", 8], 2048], _ROUTED, [64], _ROUTED],
        ["float32", "float32", "int32", "int32"],
        [["rows", 2048]],
        ["HALF"],
        ("rows", "8"),
        "rows",
    ),
}


@pytest.mark.parametrize("kernel", EXPERTS)
def test_tensorrt_is_told_what_the_kernels_of_experts_are(kernel, tmp_path):
    shapes, types, outputs, kinds, grid, rows = EXPERTS[kernel]
    told = _told(VERSIONS[0], tmp_path, f"experts_{kernel}", "64 1024 2048 8 fp16", shapes, types)
    assert told["shapes"] == outputs and told["kinds"] == [f"DataType.{kind}" for kind in kinds]
    assert (told["launch"]["grid_x"], told["launch"].get("grid_y")) == grid
    assert told["extra"] == [rows]
    (declared,) = re.findall(rf"\.entry {told['name']}\((.*?)\)", told["ptx"], re.S)
    arguments = [line.split()[1] for line in declared.strip().splitlines()]
    assert arguments == [".u64"] * len(shapes) + [".u32"] + [".u64"] * len(outputs)


# LLaDA-8B's sizes, as above
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
    told = _told(VERSIONS[0], tmp_path, f"head_{kernel}", "126464 4096 126336 fp16", shapes, types)
    assert told["shapes"] == outputs and told["kinds"] == [f"DataType.{kind}" for kind in kinds]
    assert (told["launch"]["grid_x"], told["launch"].get("grid_y")) == grid
    assert told["extra"] == ["rows"]
    (declared,) = re.findall(rf"\.entry {told['name']}\((.*?)\)", told["ptx"], re.S)
    arguments = [line.split()[1] for line in declared.strip().splitlines()]
    assert arguments == [".u64"] * len(shapes) + [".u32"] + [".u64"] * len(outputs)


# Dream-7B's sizes, as above; the query heads are rows of 4 KV heads
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
    told = _told(VERSIONS[0], tmp_path, f"attention_{kernel}", "4 128 4096 0.0625 fp16 1", shapes, types)
    assert told["shapes"] == outputs and told["kinds"] == [f"DataType.{kind}" for kind in kinds]
    assert (told["launch"]["grid_x"], told["launch"].get("grid_y")) == grid
    assert told["extra"] == ["rows"]
    (declared,) = re.findall(rf"\.entry {told['name']}\((.*?)\)", told["ptx"], re.S)
    arguments = [line.split()[1] for line in declared.strip().splitlines()]
    assert arguments == [".u64"] * len(shapes) + [".u32"] + [".u64"] * len(outputs)


def test_ptx_loses_its_scratch_pointers_and_nothing_else():
    from plugins import row_statistics
    from plugins.compile import without_scratch

    made = row_statistics.compiled(1001, 7, 90)
    (declared,) = re.findall(r"\.entry \w+\((.*?)\)", made.ptx, re.S)
    assert [line.split()[1] for line in declared.strip().splitlines()] == [".u64"] * 5
    for ptx, said in (
        (made.ptx.replace(".entry", ".func"), "0 entries"),
        (made.ptx, "uses its scratch pointer"),
        (
            made.ptx.replace("_param_4", "_param_4 .x").replace(".param .u64", ".param .u32"),
            "expected two pointers",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            without_scratch(ptx)


@pytest.mark.parametrize(
    ("lowering", "dtype", "head"),
    [("modern", "fp16", "statistics"), ("modern", "bf16", "logits"), ("legacy", "fp32", "logits")],
)
def test_statistics_are_replaced_in_a_parsed_network(tmp_path, lowering, dtype, head):
    """Outputs keep names, order, types and shapes; nothing of the old statistics is needed any more;
    TensorRT-RTX builds it."""
    from plugins.tensorrt_networks import replace_statistics

    artifact = export_quietly(
        GOLDENS / "dream_tiny", tmp_path / "artifact", lowering=lowering, dtype=dtype, head=head
    )
    manifest, seen = manifests.load(artifact), []

    def outputs(network):
        held = [network.get_output(i) for i in range(network.num_outputs)]
        return [(tensor.name, tuple(tensor.shape), tensor.dtype) for tensor in held]

    def edit(network, trt):
        before = outputs(network)
        replace_statistics(network, trt, manifest.decoding.mask_token_id, ordinary_layers(network))
        assert outputs(network) == before
        needed = needed_layers(network)
        assert not [name for name in needed if "TopK_node" in name or "ReduceSum" in name]
        with pytest.raises(DllmError, match=r"is .*, expected"):
            replace_statistics(network, trt, 0, lambda logits, _: [logits] * 4)
        seen.append(network)

    config = BuildConfig("tensorrt-rtx", targets=("sm89",), max_batch=2, max_length=64, block_length=8)
    (plan,) = store.plans(config, manifest.decoding)
    job = builder.BuildJob(
        plan.name, artifact / "refine.onnx", plan.role, plan.profiles, 64, ("sm89",), edit=edit
    )
    made, _ = builder.serialised(job, manifest, "tensorrt-rtx", rtx)
    assert made is not None and len(seen) == 1


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

    def outputs(network):
        held = [network.get_output(i) for i in range(network.num_outputs)]
        return [(tensor.name, tuple(tensor.shape), tensor.dtype) for tensor in held]

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
        before, old = outputs(network), _head_of(network)
        replace_head(network, trt, mask, make(network))
        assert outputs(network) == before
        needed = needed_layers(network)
        assert old not in needed and not [name for name in needed if "ReduceSum" in name]
        with pytest.raises(DllmError, match=r"is .*, expected"):
            replace_head(network, trt, mask, lambda sizes, tensors: [tensors[0]] * 4)
        seen.append(network)

    config = BuildConfig("tensorrt-rtx", targets=("sm89",), max_batch=2, max_length=64, block_length=8)
    (plan,) = store.plans(config, manifest.decoding)
    job = builder.BuildJob(
        plan.name, artifact / "refine.onnx", plan.role, plan.profiles, 64, ("sm89",), edit=edit
    )
    made, _ = builder.serialised(job, manifest, "tensorrt-rtx", rtx)
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

    config = BuildConfig("tensorrt-rtx", targets=("sm89",), max_batch=1, max_length=64, block_length=8)
    (plan,) = store.plans(config, manifest.decoding)
    job = builder.BuildJob(
        plan.name, artifact / "refine.onnx", plan.role, plan.profiles, 64, ("sm89",), edit=edit
    )
    builder.serialised(job, manifest, "tensorrt-rtx", rtx)
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

    config = BuildConfig("tensorrt-rtx", "split", ("sm89",), max_batch=2, max_length=64, block_length=8)
    plan = store.plans(config, manifest.decoding)[1]
    assert plan.role == "refine"
    job = builder.BuildJob(
        plan.name, artifact / "refine.onnx", plan.role, plan.profiles, 64, ("sm89",), edit=edit
    )
    made, _ = builder.serialised(job, manifest, "tensorrt-rtx", rtx)
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
