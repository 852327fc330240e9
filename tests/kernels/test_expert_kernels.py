"""The kernels of experts in Triton's interpreter against their reference and the official code's recorded
layers, and compiled for every GPU that is supported."""

from __future__ import annotations

import json

import numpy as np
import pytest
from places import GOLDENS
from safetensors import safe_open
from triton_processes import interpreted

from trt_runtime.artifact.manifest import ExpertFacts

pytest.importorskip("triton")
pytest.importorskip("torch")

# the interpreter is chosen when a kernel is defined: a process of its own
_INTERPRET = """
import json, sys
import numpy as np
import torch
from plugins import experts
rng = np.random.default_rng(0)


def problem(rows, hidden, count, inner, top_k, kind, even=True):
    shapes = (rows, hidden), (count * inner, hidden), (count * inner, hidden), (hidden, count * inner)
    tensors = [torch.from_numpy(rng.normal(size=shape).astype(np.float32)).to(kind) for shape in shapes]
    tensors = [tensors[0], *(tensor * 0.1 for tensor in tensors[1:])]
    weights = np.zeros((rows, count), np.float32)
    for row in weights:
        busy = count if even else top_k  # uneven: all rows choose the same experts
        row[rng.choice(busy, top_k, replace=False)] = rng.random(top_k) + 0.01
    return tensors, weights


def off(tensors, weights, top_k):
    got = experts.launch(*tensors, torch.from_numpy(weights), top_k).float().numpy()
    expected = experts.reference(*(tensor.float().numpy() for tensor in tensors), weights)
    return float(np.abs(got - expected).max() / np.abs(expected).max())


worst = {"float32": 0.0, "float16": 0.0}
for sizes in json.loads(sys.argv[1]):
    for name in list(worst)[: 1 + (sizes[0] == 33)]:
        worst[name] = max(worst[name], off(*problem(*sizes[:5], getattr(torch, name), *sizes[5:]), sizes[4]))
tensors, weights = problem(20, 24, 6, 40, 3, torch.float32)
whole = experts.launch(*tensors, torch.from_numpy(weights), 3)
alone = experts.launch(tensors[0][7:8].clone(), *tensors[1:], torch.from_numpy(weights[7:8].copy()), 3)
fewer = weights.copy()
fewer[3] = 0.0  # no expert
fewer[4, np.flatnonzero(fewer[4])[0]] = 0.0  # one less
nothing = experts.launch(*tensors, torch.from_numpy(fewer), 3).numpy()
broken = weights.copy()
broken[5] = np.nan
spoilt = experts.launch(*tensors, torch.from_numpy(broken), 3).numpy()
every = np.full_like(weights, 0.5)  # more experts than there are places: nothing is written beyond them
experts.launch(*tensors, torch.from_numpy(every), 3)
print(json.dumps({
    "worst": worst,
    "alone": float((whole[7] - alone[0]).abs().max()),
    "fewer": off(tensors, fewer, 3),
    "none": float(np.abs(nothing[3]).max()),
    "nan": [bool(np.isnan(spoilt[5]).all()), bool(np.isnan(np.delete(spoilt, 5, 0)).any())],
}))
"""
# the kernel on the recorded input of a layer and the recorded choice of experts
_RECORDED = """
import sys
import numpy as np
import torch
from plugins import experts
held = np.load(sys.argv[1])
tensors = [torch.from_numpy(held[name]) for name in ("hidden", "gate", "up", "down", "weights")]
got = experts.launch(*tensors, int(held["top_k"])).numpy()
print(np.abs(got - held["expected"]).max() / np.abs(held["expected"]).max())
"""


def test_the_kernels_equal_their_reference():
    """Full and half tiles, experts without rows, all rows at the same experts, sizes that are no powers of
    two; NaN, fewer experts than usual, and a row in a batch as alone. The interpreter multiplies no bf16."""
    sizes = [
        (1, 32, 4, 16, 1),
        (5, 32, 4, 16, 2),
        (33, 48, 6, 40, 3),
        (70, 72, 20, 24, 2, False),
        (90, 270, 3, 70, 3),
    ]
    made = json.loads(interpreted(_INTERPRET, json.dumps(sizes)))
    assert made["worst"]["float32"] < 2e-6 and made["worst"]["float16"] < 2e-3
    assert made["alone"] == 0 and made["fewer"] < 2e-6 and made["none"] == 0
    assert made["nan"] == [True, False]


@pytest.mark.parametrize("family", ["lladamoe", "rnd1"])
def test_the_kernels_equal_the_official_layers(family, tmp_path):
    """mlp_in and the recorded experts and weights give mlp_out, with the checkpoint's own weights."""
    config = json.loads((GOLDENS / f"{family}_tiny" / "config.json").read_text())
    count, top_k = config["num_experts"], config["num_experts_per_tok"]
    with safe_open(GOLDENS / f"{family}_forward.safetensors", "np") as recorded:
        hidden, expected, chosen, shares = (
            recorded.get_tensor(f"c1.{name}.1") for name in ("mlp_in", "mlp_out", "experts", "expert_weights")
        )
    hidden, expected = (value.reshape(-1, value.shape[-1]) for value in (hidden, expected))
    weights = np.zeros((len(hidden), count), np.float32)
    np.put_along_axis(
        weights, chosen.reshape(-1, top_k).astype(np.int64), shares.reshape(-1, top_k).astype(np.float32), 1
    )
    with safe_open(GOLDENS / f"{family}_tiny" / "model.safetensors", "np") as stored:
        prefix = "model.layers.1.mlp.experts."
        gate, up, down = (
            [stored.get_tensor(f"{prefix}{i}.{name}_proj.weight") for i in range(count)]
            for name in ("gate", "up", "down")
        )
    np.savez(
        tmp_path / "layer.npz",
        hidden=hidden.astype(np.float32),
        gate=np.concatenate(gate),
        up=np.concatenate(up),
        down=np.concatenate(down, axis=1),
        weights=weights,
        expected=expected,
        top_k=top_k,
    )
    assert float(interpreted(_RECORDED, str(tmp_path / "layer.npz"))) < 2e-6


@pytest.mark.parametrize("target", [80, 86, 87, 89, 90, 120])
def test_the_kernels_compile_for_every_gpu(target):
    """16-bit products run on tensor cores, float32 ones in float32."""
    from plugins import experts

    for dtype, is_matrix in (("bf16", True), ("fp16", True), ("fp32", False)):
        sizes = experts.Sizes(64, 1024, 2048, 8, dtype)
        for name in experts.KERNELS if dtype == "bf16" else ("inner",):
            made = experts.compiled(name, sizes, target)
            assert f".entry {made.name}(" in made.ptx and made.threads == 128 and made.shared <= 48 * 1024
            if name in ("inner", "outer"):
                assert ("mma" in made.ptx) == is_matrix and "tf32" not in made.ptx


def test_experts_are_replaced_in_a_parsed_network(tmp_path):
    """Each layer's experts get the tensors of the contract, and nothing of the dense form is needed any more;
    TensorRT-RTX builds it, with ordinary layers in the place of the plugins."""
    from places import export_quietly
    from plugin_layers import needed_layers, ordinary_experts

    from plugins.experts import Sizes
    from plugins.tensorrt_networks import replace_experts
    from trt_runtime.artifact import manifest as manifests
    from trt_runtime.backends.tensorrt import builder, store
    from trt_runtime.errors import DllmError

    rtx = pytest.importorskip("tensorrt_rtx_bindings")
    artifact = export_quietly(GOLDENS / "lladamoe_tiny", tmp_path / "artifact", dtype="bf16")
    manifest, seen = manifests.load(artifact), []
    facts = manifest.model.experts
    assert facts is not None

    def edit(network, trt):
        def make(sizes, tensors):
            seen.append((sizes, [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]))
            return ordinary_experts(network)(sizes, tensors)

        before = needed_layers(network)
        with pytest.raises(DllmError, match="layers of dense experts, the manifest says 9"):
            replace_experts(network, trt, ExpertFacts(16, 4, 64, 9), "bf16", make)
        assert replace_experts(network, trt, facts, "bf16", make) == facts.num_layers
        dense = before - needed_layers(network)
        assert len([name for name in dense if "Gemm" in name]) == 3 * facts.num_layers

    config = store.BuildConfig("tensorrt-rtx", targets=("sm89",), max_batch=2, max_length=64, block_length=8)
    (plan,) = store.plans(config, manifest.decoding)
    job = builder.BuildJob(
        plan.name, artifact / "refine.onnx", plan.role, plan.profiles, 64, ("sm89",), edit=edit
    )
    made, _ = builder.serialised(job, manifest, "tensorrt-rtx", rtx)
    bf16, width, inner = rtx.bfloat16, manifest.model.hidden_size, facts.num_experts * facts.intermediate_size
    expected = [
        ((-1, width), bf16),
        ((inner, width), bf16),
        ((inner, width), bf16),
        ((width, inner), bf16),
        ((-1, facts.num_experts), rtx.float32),
    ]
    sizes = Sizes(facts.num_experts, facts.intermediate_size, width, facts.top_k, "bf16")
    assert made is not None and seen == [(sizes, expected)] * facts.num_layers
