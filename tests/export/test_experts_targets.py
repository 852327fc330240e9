"""Models with experts on their targets: commands, forecasts, quantised experts, TensorRT-RTX engines."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import demo_prompts
import demo_task
import numpy as np
import onnx
import pytest
from places import BLOCK_CAUSAL_DEMO, GOLDENS, export_quietly
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny import write_checkpoint

from export import families
from export.parity.verify import verify
from export.pipeline import ExportConfig
from export.quantize import export as quantize
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import ExpertFacts, ModelFacts
from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError
from trt_runtime.machine import roofline
from trt_runtime.model import load


@pytest.mark.parametrize("fused", [False, True])
def test_the_commands_know_experts(tmp_path, capsys, fused):
    artifact, source = tmp_path / "artifact", GOLDENS / "llada2_tiny"
    command = ["export", "--checkpoint", str(source), "--out", str(artifact), "--verify", "no"]
    assert cli.main([*command, *(["--target", "ort-cpu"] if fused else [])]) == 0
    assert "replay" in capsys.readouterr().err  # what it can do next
    assert cli.main(["info", str(artifact)]) == 0
    said = capsys.readouterr().out
    assert "in 2 layers 4 of 16 experts of 16 for each row and one of 16 for all" in said
    assert ("by ONNX Runtime's own operator" in said) == fused
    assert cli.main(["plan", str(artifact), "--device", "h200", "--length", "512"]) == (1 if fused else 0)
    said = capsys.readouterr()
    if fused:
        assert cli.main(["plan", str(artifact), "--device", "cpu", "--length", "512"]) == 0
        assert "a refine step of 32 rows reads" in capsys.readouterr().out
        assert cli.main(["build", str(artifact), "--backend", "tensorrt-rtx", "--target", "sm89"]) == 1
        assert "for a GPU export it without --target ort-cpu" in capsys.readouterr().err
    else:
        assert "experts: 4 of 16 for each row; a row passes 0.54 M parameters" in said.out
        assert "the dense graph is fine up to this many rows" in said.out


def test_a_forecast_counts_what_a_row_passes():
    """Active parameters, the experts that rows hit, and the arithmetic of both forms."""
    facts = ModelFacts("x", 2, 4, 2, 32, 128, 160, 1024, 512, "fp32", 10**6)
    experts = ExpertFacts(16, 4, 16, 1, shared_size=16)
    dense, fused = (replace(facts, experts=replace(experts, is_fused=value)) for value in (False, True))
    assert roofline.active_parameters(dense) == 10**6 - 3 * 128 * 16 * 12
    assert roofline.experts_hit(experts, 1) == pytest.approx(0.25)
    assert roofline.experts_hit(experts, 32) == pytest.approx(1 - 0.75**32)
    assert roofline.flops(dense, 8, 0, 8) - roofline.flops(fused, 8, 0, 8) == 2 * 8 * 3 * 128 * 16 * 12
    one, many = roofline.read_bytes(fused, 1), roofline.read_bytes(fused, 1000)
    assert many == pytest.approx(roofline.read_bytes(dense, 1), rel=1e-6)
    assert many - one == pytest.approx(4 * 3 * 128 * 16 * 12, rel=1e-3)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """The block-causal demo as a mixture: 8 copies of its feed-forward, 2 of which each row passes, are the
    same model whatever the router chooses. With prompts and their right answers."""
    folder = tmp_path_factory.mktemp("mixture")
    path = folder / "checkpoint"
    shutil.copytree(BLOCK_CAUSAL_DEMO, path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"], "norm_topk_prob": True}
    config |= {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": config["intermediate_size"],
    }
    (path / "config.json").write_text(json.dumps(config))
    with safe_open(path / "model.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    rng = np.random.default_rng(0)
    for name in [name for name in tensors if ".mlp." in name]:
        for expert in range(8):
            tensors[name.replace(".mlp.", f".mlp.experts.{expert}.")] = tensors[name]
        del tensors[name]
    for layer in range(config["num_hidden_layers"]):
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = rng.standard_normal((8, 192)).astype(np.float32)
    save_file(tensors, path / "model.safetensors")
    examples = demo_prompts.held_out(24)
    data = folder / "data.jsonl"
    data.write_text(
        "\n".join(
            json.dumps({"prompt": e.prompt, "answers": list(map(json.dumps, demo_task.spellings(e.plan)))})
            for e in examples
        ),
        encoding="utf-8",
    )
    return path, data, examples


def test_the_mixture_answers_as_the_demo(mixture, tmp_path):
    path, _, examples = mixture
    with load(export_quietly(path, tmp_path / "dense"), "ort", threads=1) as model:
        results = model.generate([e.prompt for e in examples])
    assert sum(demo_task.is_right(r.text, e.plan) for r, e in zip(results, examples, strict=True)) == 24


def _quantised(mixture, out, scheme, dtype="fp32"):
    path, data, _ = mixture
    return quantize.export(
        ExportConfig(str(path), out, dtype),
        quantize.QuantizeConfig(scheme, data=data, match="json"),
        lambda total: lambda done: None,
    )


def _operators(artifact):
    graph = onnx.load(artifact / "refine.onnx", load_external_data=False).graph
    return {node.op_type for node in graph.node}


def test_four_bit_experts_keep_the_answers_of_a_trained_model(mixture, tmp_path):
    """By QMoE, through the gate."""
    made = _quantised(mixture, tmp_path / "int4", "int4")
    assert made.quantization.quality["right"] >= 23 and made.model.experts.is_fused
    operators = _operators(tmp_path / "int4")
    assert {"QMoE", "MatMulNBits"} <= operators and "MoE" not in operators


@pytest.mark.parametrize(
    ("scheme", "dtype", "targets"),
    [
        ("fp8", "fp16", ("sm89", "sm120")),
        ("int8-sq", "bf16", ("sm86", "sm89", "sm120")),
    ],
)
def test_eight_bit_experts_pass_the_gate_and_build(mixture, tmp_path, scheme, dtype, targets):
    """QuantizeLinear and DequantizeLinear around the dense experts' Gemms, for TensorRT."""
    pytest.importorskip("tensorrt_rtx_bindings")
    from trt_runtime.backends.tensorrt import store

    artifact = tmp_path / scheme
    made = _quantised(mixture, artifact, scheme, dtype)
    quality = made.quantization.quality
    assert quality["judged"] == 12 and quality["right"] >= 11 and not made.model.experts.is_fused
    stored = manifests.load(artifact).files
    assert stored and {"QuantizeLinear", "DequantizeLinear", "Gemm"} <= _operators(artifact)
    config = store.BuildConfig("tensorrt-rtx", targets=targets, max_length=128, block_length=8)
    assert list(store.build(artifact, tmp_path / "engines", config).glob("*.engine"))
    with pytest.raises(DllmError, match="takes fp32, fp16 and bf16 weights"):
        store.BuildConfig(experts_plugin=True).checked(manifests.load(artifact))


@pytest.mark.parametrize("scheme", ["w8a8", "int4"])
@pytest.mark.parametrize("name", ["llada_moe", "llada2", "rnd1"])
def test_quantised_experts_compute_what_their_numbers_say(tmp_path, name, scheme):
    """Each graph as this processor computes it, against the same one in standard operators."""
    width = "expert_intermediate_size" if name == "llada_moe" else "moe_intermediate_size"
    path = write_checkpoint(
        families.find(name), tmp_path / "checkpoint", model={"hidden_size": 128, width: 32}
    )
    artifact = tmp_path / scheme
    quantize.export(
        ExportConfig(str(path), artifact),
        quantize.QuantizeConfig(scheme, gate=False),
        lambda total: lambda done: None,
    )
    stages = {stage.name: stage for stage in verify(artifact)}
    assert stages["weights"].passed and stages["canvases"].passed, [str(stage) for stage in stages.values()]


def test_four_bit_experts_need_widths_in_whole_blocks(tmp_path):
    path = write_checkpoint(families.find("rnd1"), tmp_path / "checkpoint")
    with pytest.raises(
        DllmError, match="experts of width 24 in a model of width 48: expected multiples of 16"
    ):
        quantize.export(
            ExportConfig(str(path), tmp_path / "out"),
            quantize.QuantizeConfig("int4", gate=False),
            lambda total: lambda done: None,
        )


@pytest.mark.parametrize("name", ["llada_moe", "llada2"])
@pytest.mark.parametrize(("dtype", "lowering"), [("fp16", "modern"), ("bf16", "modern"), ("fp16", "legacy")])
def test_tensorrt_rtx_builds_experts(tmp_path, name, dtype, lowering):
    pytest.importorskip("tensorrt_rtx_bindings")
    from trt_runtime.backends.tensorrt import store

    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    path = write_checkpoint(families.find(name), tmp_path / "checkpoint", model=sizes)
    made = export_quietly(path, tmp_path / "artifact", dtype=dtype, lowering=lowering)
    config = store.BuildConfig(
        "tensorrt-rtx", targets=("sm86", "sm89", "sm120"), max_batch=2, max_length=64, block_length=8
    )
    layouts = {"shared": ["shared"], "split": ["prefix", "refine"]}
    for layout in layouts if lowering == "modern" else ["split"]:
        engines = store.build(made, tmp_path / "engines", store.replace(config, layout=layout))
        assert sorted(file.stem for file in engines.glob("*.engine")) == layouts[layout]


@pytest.mark.parametrize("sizes", [{"num_experts_per_tok": 8}, {"num_experts": 1, "num_experts_per_tok": 1}])
def test_models_without_a_choice_of_experts_are_verified_and_stay_readable(tmp_path, sizes):
    """Where every row passes all experts, no expert is the next best one."""
    path = write_checkpoint(families.find("llada_moe"), tmp_path / "checkpoint", model=sizes)
    assert cli.main(["export", "--checkpoint", str(path), "--out", str(tmp_path / "out")]) == 0
    stage = manifests.load(tmp_path / "out").verified["stages"]["experts"]
    assert stage["passed"] and "smallest gap over rounding" not in stage


@pytest.mark.parametrize("name", ["llada_moe", "llada2", "rnd1"])
@pytest.mark.parametrize("leaf", ["up_proj", "down_proj"])
@pytest.mark.parametrize("fused", [False, True])
def test_experts_of_several_types_are_refused(tmp_path, capsys, name, leaf, fused):
    """They were read as if all had the first one's type: other weights, without a word."""
    path = write_checkpoint(families.find(name), tmp_path / "checkpoint")
    with safe_open(path / "model.safetensors", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    odd = next(key for key in tensors if f".experts.3.{leaf}" in key)
    other = np.float16 if tensors[odd].dtype == np.float32 else np.float32
    tensors[odd] = tensors[odd].astype(other)
    save_file(tensors, path / "model.safetensors")
    command = ["export", "--checkpoint", str(path), "--out", str(tmp_path / "out"), "--verify", "no"]
    assert cli.main([*command, *(["--target", "ort-cpu"] if fused else [])]) == 1
    assert "expected one type" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
