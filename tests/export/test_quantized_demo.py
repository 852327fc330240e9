"""The demo model quantised: the gate, the manifest, refusals, and engines of every scheme."""

from __future__ import annotations

import json
import shutil

import demo_prompts
import demo_task
import onnxruntime as ort
import pytest
from exports import quantised, scheme_id
from places import DEMO, GOLDENS
from tiny import write_checkpoint

from export import cli, families, schemes
from export.parity import verify
from export.pipeline import read
from export.quantize import export as quantize
from export.quantize import gate as quality
from export.schemes import blocks
from export.weights.plan import plan
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.ort import OrtCudaBackend
from trt_runtime.backends.tensorrt import store
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError
from trt_runtime.measure import tolerances
from trt_runtime.model import load

KINDS = schemes.SCHEMES
LLADA = families.find("llada")


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


@pytest.mark.parametrize("kind", KINDS[1:], ids=scheme_id)
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
    (["--quantize", "w8a8", "--weights", "link", "--gate", "no"], "--weights link cannot quantise"),
    (["--quantize", "w8a8", "--lowering", "legacy", "--gate", "no"], "modern lowering"),
    (["--gate", "no"], "--gate needs --quantize"),
    (["--target", "tensorrt"], "--target tensorrt needs --quantize"),
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
    assert "--data is not used" in capsys.readouterr().err


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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.target == "tensorrt"], ids=scheme_id)
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
        with pytest.raises(DllmError, match="needs a GPU of SM89 or newer, got SM86"):
            store.build(artifact, tmp_path / "engines", store.replace(config, targets=("sm86",)))
