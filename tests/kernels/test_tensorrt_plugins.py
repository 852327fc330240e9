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
from plugin_layers import ordinary_layers

from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.tensorrt import builder, store
from trt_runtime.backends.tensorrt.store import BuildConfig
from trt_runtime.errors import DllmError

pytest.importorskip("triton")
rtx = pytest.importorskip("tensorrt_rtx_bindings")


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt_is_told_what_the_kernel_is(version, tmp_path):
    """Types, shapes, launch and PTX, through the real tensorrt.plugin of the version."""
    environment = {
        key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"
    } | bindings_of(version, tmp_path)
    environment["PYTHONPATH"] += f":{ROOT}"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "plugin_harness.py"), "126464", "126336", "90"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["version"], told["aot"], told["extra"]) == (version, True, 0)
    assert told["kinds"] == ["DataType.INT64", *["DataType.FLOAT"] * 3] and told["shapes"] == [["rows"]] * 4
    assert told["launch"]["grid_x"] == "rows" and told["launch"]["block_x"] == "128"
    assert told["name"] == "dllm_row_statistics_126464_126336" and f".entry {told['name']}(" in told["ptx"]
    assert "rejected the plugin dllm::row_statistics" in told["refused"]
    assert str(ROOT) not in told["ptx"]


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
    from plugins.tensorrt_plugins import replace_statistics

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
        makers = {
            layer.get_output(k).name: layer
            for layer in builder._layers(network)
            for k in range(layer.num_outputs)
        }
        waiting, needed = [name for name, _, _ in before], set()
        while waiting:
            layer = makers.get(waiting.pop())
            if layer is not None and layer.name not in needed:
                needed.add(layer.name)
                waiting += [
                    tensor.name for k in range(layer.num_inputs) if (tensor := layer.get_input(k)) is not None
                ]
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
