"""Verification: passes on an intact export, fails on a broken one, and says at which stage."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from places import DEMO, GOLDENS, export_quietly
from tiny import write_checkpoint

from export import cli as export_cli
from export import families, pipeline
from export.graph import lint
from export.graph.attention import Attention
from export.graph.decoder import Decoder
from export.graph.linears import Linears
from export.graph.lowering import modern
from export.parity.report import memory_needed
from export.parity.verify import bisect, verify
from export.weights import plan as weights
from export.weights.sources import FromCheckpoint
from trt_runtime.artifact import manifest as manifests
from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError
from trt_runtime.measure import tune


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_an_intact_export_is_verified_and_the_manifest_says_so(tmp_path, dtype):
    artifact = export_quietly(DEMO, tmp_path / "artifact", dtype=dtype)
    assert manifests.load(artifact).verified is None
    stages = list(verify(artifact))
    assert [stage.name for stage in stages] == ["weights", "range", "logits", "cache", "decode"]
    assert all(stage.passed for stage in stages), [str(stage) for stage in stages]
    verified = manifests.load(artifact, check_hashes=True).verified
    assert verified["passed"] and "transformers" in verified["against"]
    assert verified["stages"]["decode"]["cases"] == 12
    assert ("fp32 twin" in verified["backend"]) == (dtype == "bf16")
    if dtype == "fp32":
        assert (
            verified["stages"]["decode"]["decisions"] > 100 and verified["stages"]["decode"]["ambiguous"] < 20
        )


def _swap_gate_and_up(monkeypatch):
    real = Linears.gated
    monkeypatch.setattr(
        Linears,
        "gated",
        lambda self, op, h, names, weight: real(self, op, h, (names[1], names[0], names[2]), weight),
    )


def _swap_heads(monkeypatch):
    """The first two query heads change places in one layer."""
    real = Attention._heads

    def wrong(self, on, h, layer, name, heads, rows):
        made = real(self, on, h, layer, name, heads, rows)
        order = [1, 0, *range(2, heads)]
        return on.op.Gather(made, order, axis=1) if (layer, name) == (1, "q_proj") else made

    monkeypatch.setattr(Attention, "_heads", wrong)


def _wrong_scale(monkeypatch):
    real = modern.attention
    monkeypatch.setattr(
        modern, "attention", lambda *v, scale, **more: real(*v, scale=scale * 1.1**-0.5, **more)
    )


def _with_theta(config, factor):
    return replace(
        config, attention=replace(config.attention, rope_theta=config.attention.rope_theta * factor)
    )


def _wrong_rope_base(monkeypatch):
    real = weights.rope_tables
    monkeypatch.setattr(weights, "rope_tables", lambda config: real(_with_theta(config, 1.05)))


def _interleaved_rotation(monkeypatch):
    monkeypatch.setattr(
        modern,
        "rotate",
        lambda op, x, cos, sin, positions: op.RotaryEmbedding(x, cos, sin, positions, interleaved=1),
    )
    monkeypatch.setattr(lint, "find", lambda *_: [])  # the lint would refuse it first


def _position_off_by_one(monkeypatch):
    """All positions: logits know only differences, but the keys in the cache are rotated too far."""
    real = modern.rotate
    monkeypatch.setattr(
        modern, "rotate", lambda op, x, cos, sin, positions: real(op, x, cos, sin, op.Add(positions, 1))
    )


def _position_off_by_one_in_refine_steps(monkeypatch):
    """Rows of a window that does not begin at 0 stand one position too far, against a cache that is right."""
    real = modern.rotate

    def wrong(op, x, cos, sin, positions):
        first = op.ReduceMin(positions, [1], keepdims=1)
        return real(op, x, cos, sin, op.Add(positions, op.Min(first, 1)))

    monkeypatch.setattr(modern, "rotate", wrong)


def _wrong_scale_in_the_prefix_graph(monkeypatch):
    """The refine graph is right, and ONNX Runtime decodes with that one: only TensorRT would meet the
    fault."""
    real = pipeline.roles.build

    def wrong(role, *arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            if role == "prefix":
                _wrong_scale(patch)
            return real(role, *arguments, **options)

    monkeypatch.setattr(pipeline.roles, "build", wrong)


def _stale_cache(monkeypatch):
    """A refine step leaves the block's rows as the prefix pass made them."""
    real = modern.extend

    def wrong(op, cache, update, write_index):
        is_prefix_pass = op.Unsqueeze(op.Equal(write_index, 0), [1, 2, 3])
        rows = op.Range(0, op.Squeeze(op.Shape(update, start=2, end=3)), 1)
        index = op.Unsqueeze(op.Add(op.Unsqueeze(write_index, [1]), rows), [1, 3])
        old = op.GatherElements(cache, op.Expand(index, op.Shape(update)), axis=2)
        return real(op, cache, op.Where(is_prefix_pass, update, old), write_index)

    monkeypatch.setattr(modern, "extend", wrong)


def _cache_written_at_the_wrong_row(monkeypatch):
    real = modern.extend
    monkeypatch.setattr(
        modern, "extend", lambda op, cache, update, index: real(op, cache, update, op.Mul(index, 0))
    )


def _one_tensor_not_loaded(monkeypatch):
    real = FromCheckpoint.converted

    def wrong(self, piece, dtype, largest):
        return real(
            self,
            piece * 0 if self.name.endswith("2.up_proj.weight") or ".2.mlp.up_proj" in self.name else piece,
            dtype,
            largest,
        )

    monkeypatch.setattr(FromCheckpoint, "converted", wrong)


def _shift_off_by_one(monkeypatch):
    real = pipeline._manifest

    def wrong(*arguments):
        manifest = real(*arguments)
        shift = 1 - manifest.decoding.logit_shift
        return replace(
            manifest, decoding=replace(manifest.decoding, logit_shift=shift, first_commit=shift == 1)
        )

    monkeypatch.setattr(pipeline, "_manifest", wrong)


FAULTS = [
    (_one_tensor_not_loaded, "weights"),
    (_wrong_scale, "logits"),
    (_wrong_scale_in_the_prefix_graph, "logits"),
    (_swap_heads, "logits"),
    (_wrong_rope_base, "weights"),
    (_interleaved_rotation, "logits"),
    (_swap_gate_and_up, "logits"),
    (_position_off_by_one, "cache"),
    (_position_off_by_one_in_refine_steps, "cache"),
    (_stale_cache, "cache"),
    (_cache_written_at_the_wrong_row, "cache"),
    (_shift_off_by_one, "decode"),
]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(("fault", "stage"), FAULTS, ids=lambda item: getattr(item, "__name__", item))
def test_an_injected_fault_is_caught_and_its_stage_named(
    golden_checkpoint, monkeypatch, tmp_path, fault, stage, dtype
):
    """The first stage that fails is where the fault lies. It is injected into the export alone, not into what
    verifies it."""
    with monkeypatch.context() as patch:
        fault(patch)
        artifact = export_quietly(golden_checkpoint, tmp_path / "broken", dtype=dtype)
    stages = list(verify(artifact))
    assert [s.name for s in stages if not s.passed][:1] == [stage], [str(s) for s in stages]
    assert manifests.load(artifact).verified["passed"] is False
    if stage == "logits":
        assert not all(row.passed for rows in bisect(artifact).values() for row in rows)


@pytest.mark.parametrize(
    ("relative", "passes"), [(2.0**-23, True), (-(2.0**-23), True), (1e-4, False), (np.nan, False)]
)
def test_rotation_tables_may_differ_in_the_last_bit_of_their_frequencies(
    golden_checkpoint, monkeypatch, tmp_path, relative, passes
):
    """As another processor computes them: an artifact travels."""

    def other(config):
        frequency = config.attention.rope_theta ** -(
            np.arange(0, size := config.attention.head_dim, 2) / size
        ) * (1 + relative)
        angles = np.outer(np.arange(config.max_length), frequency)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "rope_tables", other)
        artifact = export_quietly(golden_checkpoint, tmp_path / "a")
    stage = next(iter(verify(artifact)))
    assert (stage.name, stage.passed) == ("weights", passes), str(stage)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_no_false_alarm_on_a_golden_checkpoint(golden_checkpoint, tmp_path, dtype):
    _passes(export_quietly(golden_checkpoint, tmp_path / "artifact", dtype=dtype))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_no_false_alarm_on_a_tiny_one(tiny_checkpoint, tmp_path, dtype):
    _passes(export_quietly(tiny_checkpoint, tmp_path / "artifact", dtype=dtype))


def _passes(artifact):
    assert [s.passed for s in verify(artifact)] == [True] * 5
    assert all(row.passed for rows in bisect(artifact).values() for row in rows)


def test_the_layers_show_where_a_fault_begins(golden_checkpoint, monkeypatch, tmp_path, capsys):
    """Heads swapped in layer 1: layer 0 agrees, layer 1 is the first that does not."""
    with monkeypatch.context() as patch:
        _swap_heads(patch)
        artifact = export_quietly(golden_checkpoint, tmp_path / "broken")
    rows = bisect(artifact)["prefix pass, prefix graph"]
    assert [row.name for row in rows] == [f"layers.{i}.output" for i in range(4)] + ["logits"]
    assert [row.passed for row in rows] == [True, False, False, False, False]
    assert rows[0].cosine > 0.999999 > rows[1].cosine and rows[0].norm_ratio == pytest.approx(1, abs=1e-5)
    assert cli.main(["verify", str(artifact), "--layers"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said if "<-- first bad" in line] == ["layers.1.output"] * 3
    assert cli.main(["verify", str(export_quietly(golden_checkpoint, tmp_path / "good")), "--layers"]) == 0
    said = capsys.readouterr().out
    assert "bad" not in said and said.endswith("all layers agree\n")


def test_values_that_are_no_number_are_counted(golden_checkpoint, monkeypatch, tmp_path):
    real = Decoder._layer

    def wrong(self, i, *arguments, **options):
        x, written = real(self, i, *arguments, **options)
        return (self.op.Sqrt(x) if i == 2 else x), written

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "_layer", wrong)
        artifact = export_quietly(golden_checkpoint, tmp_path / "broken")
    rows = bisect(artifact)["prefix pass, refine graph"]
    assert [row.bad_values > 0 for row in rows[:3]] == [False, False, True] and not rows[2].passed


def _outlier(family, value):
    """A model whose layer 1 has one large MLP unit: its weights are fine, its activations are `value` times
    as large."""

    def change(tensors):
        tensors[family.tensor_name("layers.1.up_proj")][3] *= value
        tensors[family.tensor_name("layers.1.down_proj")][:, 3] /= value

    return change


def test_fp16_is_warned_about_and_refused_by_what_activations_need(tiny_checkpoint, tmp_path, capsys):
    family = families.find(json.loads((tiny_checkpoint / "config.json").read_text())["model_type"])
    usual = _range_of(family, tmp_path / "usual", 1e3) / 1e3  # what the unit gives per unit of its size
    for largest, passed, said in (
        (3e4, True, "is close to the limit of fp16's range"),
        (2e5, False, "leaves fp16's range"),
    ):
        checkpoint = write_checkpoint(
            family, tmp_path / f"c{largest:g}", change=_outlier(family, largest / usual)
        )
        stage = _range_stage(export_quietly(checkpoint, tmp_path / f"a{largest:g}", dtype="fp16"))
        assert stage.passed == passed and said in stage.advice
        assert "layers.1.mlp.down_proj (input)" in stage.advice and "DTYPE=bf16" in stage.advice
        assert _range_stage(export_quietly(checkpoint, tmp_path / f"b{largest:g}", dtype="bf16")).passed
    quiet = _range_stage(export_quietly(tiny_checkpoint, tmp_path / "quiet", dtype="fp16"))
    assert quiet.passed and not quiet.advice


def _range_stage(artifact):
    return next(stage for stage in verify(artifact) if stage.name == "range")


def _range_of(family, path, value) -> float:
    checkpoint = write_checkpoint(family, path, change=_outlier(family, value))
    stage = _range_stage(export_quietly(checkpoint, path.with_name(path.name + "-artifact")))
    assert stage.measured["in"] == "layers.1.mlp.down_proj (input)"
    return stage.measured["largest activation"]


def test_a_changed_weight_is_caught_before_anything_runs(tmp_path):
    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "artifact")
    data = np.memmap(artifact / "weights.data", np.uint8, "r+")
    data[100_000] ^= 1
    data.flush()
    with pytest.raises(DllmError, match=r"weights\.data: SHA-256"):
        list(verify(artifact))


def _reseal(artifact, **change):
    """Hashes fixed after an edit by hand, and facts changed: what only a comparison with the checkpoint can
    find."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    for name in manifest["files"]:
        data = artifact / name
        manifest["files"][name] = {"size": data.stat().st_size, "sha256": manifests.sha256_of(data)}
    for key, value in change.items():
        group, _, item = key.partition("__")
        manifest[group][item] = value
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    return artifact


@pytest.mark.parametrize(
    "change",
    [
        {"decoding__eos_token_ids": [3, 4]},
        {"model__max_length": 100_000},
        {"model__num_heads": 2},
        {"model__parameters": 5},
        {"decoding__defaults": {"gen_length": 7}},
        {"decoding__pad_token_id": 3},
        {"model__family": "other"},
    ],
)
def test_facts_that_are_not_the_checkpoints_are_found(tmp_path, change):
    artifact = _reseal(export_quietly(GOLDENS / "llada_tiny", tmp_path / "a"), **change)
    assert "decode" in _failing(artifact)


def _failing(artifact) -> list[str]:
    return [stage.name for stage in verify(artifact) if not stage.passed]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_graph_that_was_changed_by_hand_is_found(tmp_path, dtype):
    """Also a bf16 one, which cannot run here, and one under another name than usual."""
    import onnx

    artifact = export_quietly(GOLDENS / "dream_tiny", tmp_path / "a", dtype=dtype)
    for role in ("prefix", "refine"):
        other = shutil.copytree(artifact, tmp_path / role)
        model = onnx.load(other / f"{role}.onnx", load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = 0.5
        (other / f"{role}.onnx").write_bytes(model.SerializeToString())
        assert _failing(_reseal(other))[:1] == (["weights"] if dtype == "bf16" else ["logits"])
        moved = shutil.copytree(other, tmp_path / f"{role}-moved")
        shutil.copyfile(artifact / f"{role}.onnx", moved / f"{role}.onnx")
        (moved / "evil.onnx").write_bytes(model.SerializeToString())
        manifest = json.loads((moved / "manifest.json").read_text())
        manifest["graphs"][role]["file"] = "evil.onnx"
        manifest["files"]["evil.onnx"] = {"size": 0, "sha256": ""}
        (moved / "manifest.json").write_text(json.dumps(manifest))
        assert _failing(_reseal(moved))


def test_graphs_with_another_mask_token_and_damaged_ones_are_refused(tmp_path):
    """Their statistics would propose the mask; nothing hangs."""
    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "a")
    config = json.loads((GOLDENS / "llada_tiny" / "config.json").read_text()) | {"mask_token_id": 999}
    other = shutil.copytree(GOLDENS / "llada_tiny", tmp_path / "checkpoint")
    (other / "config.json").write_text(json.dumps(config))
    wrong = export_quietly(other, tmp_path / "b")
    for role in ("prefix", "refine"):
        mixed = shutil.copytree(artifact, tmp_path / role)
        shutil.copyfile(wrong / f"{role}.onnx", mixed / f"{role}.onnx")
        with pytest.raises(DllmError, match="the graph is not of this artifact"):
            list(verify(_reseal(mixed)))
        (mixed / f"{role}.onnx").write_bytes(b"no graph")
        with pytest.raises(DllmError, match=r"no ONNX graph|cannot open"):
            list(verify(_reseal(mixed)))


def test_a_model_too_large_to_verify_here_is_exported_and_says_so(tmp_path, capsys, monkeypatch):
    """A user with an 8 B model and 16 GiB must not be killed by the verification after the export."""
    command = ["--checkpoint", str(GOLDENS / "llada_tiny"), "--out", str(tmp_path / "a"), "--overwrite"]
    monkeypatch.setattr(export_cli, "meminfo", lambda key: 1_000_000)
    assert export_cli.main(command) == 0
    assert "not verified: it would take about" in capsys.readouterr().out
    assert manifests.load(tmp_path / "a").verified is None
    assert export_cli.main([*command, "--verify", "yes"]) == 0
    assert manifests.load(tmp_path / "a").verified["passed"]
    facts = replace(manifests.load(tmp_path / "a").model, parameters=8_000_000_000, dtype="bf16")
    assert 55e9 < memory_needed(facts) < 75e9


def test_the_command_verifies_and_fails_loudly(tmp_path, capsys, monkeypatch):
    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "artifact")
    assert cli.main(["verify", str(artifact)]) == 0
    said = capsys.readouterr().out
    assert said.count("ok  ") == 5 and "verified: the result is in the manifest" in said
    assert "yes, against transformers" in _info(artifact, capsys)
    real = modern.attention
    monkeypatch.setattr(
        modern, "attention", lambda *a, scale, **more: real(*a, scale=scale * 2**-0.5, **more)
    )
    command = [
        "--checkpoint",
        str(GOLDENS / "llada_tiny"),
        "--out",
        str(tmp_path / "broken"),
        "--verify",
        "yes",
    ]
    assert export_cli.main(command) == 1
    assert "NOT VERIFIED: do not deploy" in capsys.readouterr().out
    assert "FAILED" in _info(tmp_path / "broken", capsys)


def _info(artifact, capsys) -> str:
    assert cli.main(["info", str(artifact)]) == 0
    return capsys.readouterr().out


def test_the_wrong_checkpoint_is_refused(tmp_path, capsys):
    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "artifact")
    assert cli.main(["verify", str(artifact), "--checkpoint", str(DEMO)]) == 1
    assert "is not the one that" in capsys.readouterr().err
    moved = shutil.copytree(artifact, tmp_path / "moved")
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["source"]["checkpoint"] = str(tmp_path / "gone")
    (moved / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["verify", str(moved)]) == 1
    assert "no such directory" in capsys.readouterr().err


def test_what_was_tuned_is_no_fact_of_the_checkpoint(tmp_path):
    """A tuned artifact is verified as before, and keeps what was tuned; a changed fact beside it is still
    found."""
    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "artifact")
    tune.write(artifact, {"policy": "eb", "gamma": 0.05, "block_length": 16, "cache": "prefix"})
    assert all(stage.passed for stage in verify(artifact))
    held = manifests.load(artifact)
    assert held.verified["passed"] and held.decoding.tuned["gamma"] == 0.05
    manifests.write(
        replace(held, decoding=replace(held.decoding, pad_token_id=held.decoding.pad_token_id - 1)), artifact
    )
    stages = {stage.name: stage for stage in verify(artifact)}
    assert not stages["decode"].passed and "pad_token_id" in str(stages["decode"])
