"""Mixture-of-experts models: the router and the experts against a plain computation and the recorded numbers
of the official code; ONNX Runtime's own operator against the standard graph; faults injected."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from official import EXPERTS, name_of
from places import GOLDENS, export_quietly, refused
from safetensors.numpy import load_file
from tiny import write_checkpoint

from export import families
from export.families.base import ConfigReader, tensor_shapes
from export.parity import verify_graphs
from export.weights import sources
from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.cli import main as cli
from trt_runtime.decoding.backend import Window
from trt_runtime.decoding.blocks import row_lengths
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError
from trt_runtime.measure import recordings, replay
from trt_runtime.model import Model


@pytest.fixture(scope="module", params=EXPERTS, ids=name_of)
def official(request):
    return request.param


@pytest.fixture(scope="module")
def numbers(official):
    return load_file(GOLDENS / f"{official.name}_forward.safetensors")


def _chosen(official, logits, layer):
    """The experts [T, k] and weights [T, k] that a router's logits [T, E] mean, restated without a graph."""
    config = json.loads((official.checkpoint / "config.json").read_text())
    k, x = config["num_experts_per_tok"], logits.astype(np.float64)
    if official.name in ("lladamoe", "rnd1"):
        p = np.exp(x - x.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        chosen = np.argsort(-p, axis=-1, kind="stable")[:, :k]
        weights = np.take_along_axis(p, chosen, 1)
        return chosen, weights / weights.sum(-1, keepdims=True) if official.name == "rnd1" else weights
    bias = load_file(official.checkpoint / "model.safetensors")[
        f"model.layers.{layer}.mlp.gate.expert_bias"
    ].astype(np.float64)
    scores = 1 / (1 + np.exp(-x))
    ranked = (scores + bias).reshape(len(x), config["n_group"], -1)
    sums = np.sort(ranked, axis=-1)[..., -2:].sum(-1)
    kept = np.argsort(-sums, axis=-1, kind="stable")[:, : config["topk_group"]]
    allowed = np.zeros_like(sums, dtype=bool)
    np.put_along_axis(allowed, kept, True, 1)
    ranked = np.where(allowed[..., None], ranked, -np.inf).reshape(len(x), -1)
    chosen = np.argsort(-ranked, axis=-1, kind="stable")[:, :k]
    weights = np.take_along_axis(scores, chosen, 1)
    return chosen, weights / weights.sum(-1, keepdims=True) * config["routed_scaling_factor"]


@pytest.mark.parametrize("lowering", contract.LOWERINGS)
@pytest.mark.parametrize("target", [None, "ort-cpu"])
def test_the_graphs_compute_the_recorded_numbers(official, numbers, tmp_path, lowering, target):
    """Router logits, the experts and weights that follow from them, keys after RoPE, values, and logits of a
    whole canvas."""
    artifact = official.export(tmp_path / "artifact", lowering=lowering, target=target)
    facts = json.loads((GOLDENS / f"{official.name}_forward_meta.json").read_text())
    mixed = [layer for layer in range(3) if f"c0.experts.{layer}" in numbers]
    assert len(mixed) == manifests.load(artifact).model.experts.num_layers
    names = [f"layers.{layer}.router_logits" for layer in mixed]
    backend = OrtBackend(
        artifact, threads=1, model_bytes=verify_graphs.exposed(artifact, "refine", [*names, contract.LOGITS])
    )
    for case in ("c0", "c1"):
        ids, length = numbers[f"{case}.input_ids"].astype(np.int64), facts[case]["L"]
        rows = np.arange(length)[None]
        reach = None
        if official.is_block_causal:
            reach = row_lengths(np.arange(length), length, facts[case]["block_length"])[None]
        window = Window(ids, rows, np.zeros(1, np.int64), np.array([length]), rows, reach)
        cache = backend.new_cache(1, length)
        got = backend.run(cache, slice(0, 1), window, [*names, contract.LOGITS])
        expected = numbers[f"{case}.full_logits"]
        assert np.abs(got[contract.LOGITS] - expected).max() < 2e-4 * np.abs(expected).max()
        for layer, name in zip(mixed[:-1], names, strict=False):  # the last layer has other rows
            theirs = numbers[f"{case}.router_logits.{layer}"]
            assert np.abs(got[name] - theirs).max() < 2e-4 * np.abs(theirs).max()
            chosen, weights = _chosen(official, got[name], layer)
            recorded = numbers[f"{case}.experts.{layer}"]
            assert (np.sort(chosen, 1) == np.sort(recorded, 1)).all()
            own = np.take_along_axis(weights, np.argsort(chosen, 1), 1)
            applied = np.take_along_axis(
                numbers[f"{case}.expert_weights.{layer}"], np.argsort(recorded, 1), 1
            )
            assert np.abs(own - applied).max() < 1e-4


def test_all_recorded_cases_exactly_by_onnx_runtime_s_operator(official, tmp_path):
    artifact = official.export(tmp_path / "artifact", target="ort-cpu")
    assert manifests.load(artifact).model.experts.is_fused
    backend, cases = OrtBackend(artifact, threads=1), official.cases()
    assert len(cases) == official.count
    assert [replay.compare(case, replay.replay(backend, case)) for case in cases] == [None] * len(cases)


def test_the_answer_of_replay_is_the_recording(official, tmp_path, capsys):
    """In the form of the file. LLaDA2's loop stops where the answer is decided: its steps are the first ones
    of the recording."""
    out, artifact = tmp_path / "answers.json", official.export(tmp_path / "artifact")
    assert cli.main(["replay", str(artifact), str(official.file), "--output", str(out)]) == 0
    count = official.count
    assert f"{count} cases on ort in fp32: {count} with expectations, 0 mismatches" in capsys.readouterr().out
    expected = {case["id"]: case for case in official.recording()["cases"]}
    answers = json.loads(out.read_text())["cases"]
    assert len(answers) == count
    for answer in answers:
        case = expected[answer["id"]]
        assert answer["output"] == case["output"], answer["id"]
        steps = [step[:-1] for step in answer["trace"]]  # without confidences
        theirs = [step for step in case["trace"] if official.name != "rnd1" or step[3]]
        if official.name == "lladamoe":
            theirs = [step for step in theirs if step[3]]
        assert steps == theirs[: len(steps)], answer["id"]
        assert len(steps) == len(theirs) or official.name == "llada2"
        if official.name == "llada21":
            assert sum(len(step[5]) for step in steps) == case["n_edited"]


def test_quirks_of_the_official_loop_are_not_repeated(tmp_path):
    """LLaDA2.0 with an end token in the prompt: the official answer is empty."""
    (official,) = (item for item in EXPERTS if item.name == "llada2")
    backend = OrtBackend(official.export(tmp_path / "artifact"), threads=1)
    (case,) = official.recording()["quirk_cases"]
    read = recordings.as_case({k: v for k, v in case.items() if k not in ("output", "trace", "nfe")}, 1)
    done = replay.replay(backend, read)
    assert 0 < len(done.result["output"][0]) <= case["gen_length"]


def test_the_target_is_for_models_with_experts(tmp_path):
    dense = write_checkpoint(families.find("llada"), tmp_path / "dense")
    refused(dense, tmp_path / "out", "--target ort-cpu without --quantize", target="ort-cpu")
    moe = write_checkpoint(families.find("rnd1"), tmp_path / "moe")
    refused(moe, tmp_path / "out", "computes in fp32 or fp16, got bf16", target="ort-cpu", dtype="bf16")


def test_names_of_tensors_are_those_of_the_official_checkpoints(official):
    config = json.loads((official.checkpoint / "config.json").read_text())
    _, family = families.of(config)
    shapes = tensor_shapes(family, family.decoder(ConfigReader(config, "config.json")))
    there = load_file(official.checkpoint / "model.safetensors")
    assert shapes == {name: tensor.shape for name, tensor in there.items()}


@pytest.mark.parametrize("name", ["llada_moe", "llada2"])
def test_tensors_of_experts_are_joined_whatever_the_size_of_a_piece(monkeypatch, tmp_path, name):
    """Down side by side, gate and up row by row in turn: a few rows at a time, as in one piece."""
    path = write_checkpoint(families.find(name), tmp_path / "checkpoint", shards=2)
    given = {}
    for file in path.glob("*.safetensors"):
        given |= load_file(file)
    monkeypatch.setattr(sources, "_WIDE_PIECE", 1000)
    monkeypatch.setattr(sources, "_PIECE", 512)

    def of_experts(kind):
        return [given[f"model.layers.1.mlp.experts.{e}.{kind}_proj.weight"] for e in range(8)]

    expected = {
        None: {
            "layers.1.experts_gate_proj": np.concatenate(of_experts("gate")),
            "layers.1.experts_down_proj": np.concatenate(of_experts("down"), 1),
        },
        "ort-cpu": {
            "layers.1.experts_inner_proj": np.stack(
                [
                    np.stack(pair, 1).reshape(-1, pair[0].shape[1])
                    for pair in zip(of_experts("gate"), of_experts("up"), strict=True)
                ]
            ),
            "layers.1.experts_outer_proj": np.stack(of_experts("down")),
        },
    }
    for target, arrays in expected.items():
        artifact = export_quietly(path, tmp_path / str(target), target=target)
        graph = onnx.load(artifact / "refine.onnx")
        stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
        for weight, array in arrays.items():
            assert (stored[weight] == array).all(), weight


def test_weights_of_the_router_stay_in_float32(tmp_path):
    path = write_checkpoint(families.find("llada2"), tmp_path / "checkpoint")
    graph = onnx.load(export_quietly(path, tmp_path / "fp16", dtype="fp16") / "refine.onnx")
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    for name in ("layers.1.router", "layers.1.router.bias"):
        assert types[name] == onnx.TensorProto.FLOAT
    assert types["layers.1.experts_up_proj"] == onnx.TensorProto.FLOAT16


def test_an_artifact_that_does_not_know_its_mask_only_replays(official, tmp_path, capsys):
    artifact = official.export(tmp_path / "artifact")
    if official.name == "rnd1":
        assert manifests.load(artifact).decoding.is_mask_known
        return
    assert not manifests.load(artifact).decoding.is_mask_known
    assert cli.main(["generate", str(artifact), "--ids", "1,2,3"]) == 1
    assert "export it again with MASK_TOKEN=id (--mask-token)" in capsys.readouterr().err
    told = official.export(tmp_path / "told", mask_token="1000")
    assert manifests.load(told).decoding.mask_token_id == 1000
    assert cli.main(["generate", str(told), "--ids", "1,2,3", "--gen-length", "8"]) == 0
    case = official.cases()[0]
    backend = OrtBackend(told, threads=1)
    assert replay.compare(case, replay.replay(backend, case)) is None


def test_the_closing_token_is_seen_and_never_decoded(tmp_path):
    """RND1's last position holds the padding token."""
    (official,) = (item for item in EXPERTS if item.name == "rnd1")
    with Model(tmp_path, OrtBackend(official.export(tmp_path / "artifact"), threads=1)) as model:
        config = GenerationConfig(gen_length=12, cache="none", stop_at_eos=False)
        row = model.sequence([1, 2, 3], config)
        assert row.canvas[-1] == 1002 and row.length == row.end + 1 == 16
        (result,) = model.generate([[1, 2, 3]], config)
        assert len(result.tokens) == 12 and len(result.canvas) == 15
        assert result.trace[0].length == 16
        for cache in ("prefix", "dual"):
            (other,) = model.generate([[1, 2, 3]], replace(config, cache=cache, block_length=4))
            assert len(other.tokens) == 12 and 1000 not in other.tokens
        with pytest.raises(DllmError, match="together more than the 511 that the model has room for"):
            model.generate([[1] * 500], config)
