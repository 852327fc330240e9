"""Row statistics as a TensorRT plugin: its definition as TensorRT 10.16 and 11.4 read it, and its place in
parsed networks.

No engine with a plugin can be built without a GPU: TensorRT-RTX has none of this kind. What stands in its
place here are ordinary layers.
"""

from __future__ import annotations

import re

import pytest
from bindings import VERSIONS, agrees, told
from places import GOLDENS, export_quietly
from plugin_layers import built, needed_layers, ordinary_layers, outputs_of

from trt_runtime.artifact import manifest as manifests
from trt_runtime.errors import DllmError

pytest.importorskip("triton")
rtx = pytest.importorskip("tensorrt_rtx_bindings")


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt_is_told_what_the_kernel_is(version, tmp_path):
    """Types, shapes, launch and PTX."""
    seen = told(version, tmp_path, "row_statistics", "126464 126336", [["rows", 126464]], ["float32"])
    assert seen["extra"] == []
    assert seen["kinds"] == ["DataType.INT64", *["DataType.FLOAT"] * 3] and seen["shapes"] == [["rows"]] * 4
    assert seen["launch"]["grid_x"] == "rows" and seen["launch"]["block_x"] == "128"
    assert seen["name"] == "dllm_row_statistics_126464_126336"


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
    seen = told(VERSIONS[0], tmp_path, f"experts_{kernel}", "64 1024 2048 8 fp16", shapes, types)
    agrees(seen, outputs, kinds, grid, rows, len(shapes))


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

    def edit(network, trt):
        before = outputs_of(network)
        replace_statistics(network, trt, manifest.decoding.mask_token_id, ordinary_layers(network))
        assert outputs_of(network) == before
        needed = needed_layers(network)
        assert not [name for name in needed if "TopK_node" in name or "ReduceSum" in name]
        with pytest.raises(DllmError, match=r"is .*, expected"):
            replace_statistics(network, trt, 0, lambda logits, _: [logits] * 4)
        seen.append(network)

    made = built(artifact, manifest, edit)
    assert made is not None and len(seen) == 1
