"""Engines: TensorRT-RTX parses and builds every kind of graph for several GPUs, without one; and the cache of
engines."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace

import onnx
import pytest
from places import export_quietly
from tiny import write_checkpoint

from export import families
from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.tensorrt import build_config, store
from trt_runtime.backends.tensorrt.store import BuildConfig
from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError
from trt_runtime.system import commands

pytest.importorskip("tensorrt_rtx_bindings")
SMALL = BuildConfig(
    "tensorrt-rtx", "shared", ("sm86", "sm89", "sm120"), max_batch=2, max_length=64, block_length=8
)
KINDS = [*itertools.product(["modern", "legacy"], ["fp16", "bf16"]), ("modern", "fp32"), ("legacy", "fp32")]


@pytest.mark.parametrize(("lowering", "dtype"), KINDS)
def test_both_graphs_build_for_three_gpus_with_one_and_two_profiles(golden_family, tmp_path, lowering, dtype):
    """Of one layer each: test_fused_attention builds all layers."""
    layers = {"llada": "n_layers", "dream": "num_hidden_layers"}[golden_family]
    checkpoint = write_checkpoint(families.find(golden_family), tmp_path / "checkpoint", model={layers: 1})
    artifact = export_quietly(checkpoint, tmp_path / "artifact", lowering=lowering, dtype=dtype)
    weights = (artifact / "weights.data").stat().st_size
    layouts = {"shared": ["shared"], "split": ["prefix", "refine"]}
    if dtype == "fp32":  # for CPUs and parity: that both graphs build is enough
        del layouts["shared"]
    for layout, names in layouts.items():
        made = store.build(artifact, tmp_path / "engines", store.replace(SMALL, layout=layout))
        assert sorted(file.stem for file in made.glob("*.engine")) == names
        assert all(file.stat().st_size > weights for file in made.glob("*.engine"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    from places import GOLDENS

    return export_quietly(
        GOLDENS / "dream_tiny", tmp_path_factory.mktemp("engine") / "artifact", dtype="fp16"
    )


def _changed(artifact, path, change):
    """A copy of an artifact with its refine graph changed, hash and all."""
    copy = shutil.copytree(artifact, path)
    model = onnx.load(copy / "refine.onnx", load_external_data=False)
    change(model.graph)
    (copy / "refine.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((copy / "manifest.json").read_text())
    file = copy / "refine.onnx"
    manifest["files"]["refine.onnx"] = {"size": file.stat().st_size, "sha256": manifests.sha256_of(file)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def _mask_by_nonpad(graph):
    """Valid lengths by Attention's nonpad_kv_seqlen in the place of the mask: the parser takes it and ignores
    it."""
    for node in graph.node:
        if node.op_type == "Attention":
            del node.input[3:]
            node.input.extend(["", "", "", "kv_len"])


def _spare_input(graph):
    graph.input.append(onnx.helper.make_tensor_value_info("spare", onnx.TensorProto.INT64, ["B"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [(_mask_by_nonpad, "no output depends on the input kv_len"), (_spare_input, "the inputs are")],
)
def test_an_input_that_is_ignored_fails_the_build(artifact, tmp_path, change, said):
    broken = _changed(artifact, tmp_path / "broken", change)
    with pytest.raises(DllmError, match=said):
        store.build(broken, tmp_path / "engines", SMALL)
    assert list((tmp_path / "engines").iterdir()) == []


def test_a_graph_that_does_not_parse_is_one_clear_line(artifact, tmp_path):
    def unknown_op(graph):
        next(node for node in graph.node if node.op_type == "Sigmoid").op_type = "NoSuchOp"

    broken = _changed(artifact, tmp_path / "broken", unknown_op)
    with pytest.raises(DllmError, match="cannot parse it") as error:
        store.build(broken, tmp_path / "engines", SMALL)
    assert "\n" not in str(error.value)


def test_engines_are_found_again_and_every_change_is_another_key(artifact, tmp_path):
    first = store.build(artifact, tmp_path, SMALL)
    written = (first / "shared.engine").stat().st_mtime_ns
    assert (
        store.build(artifact, tmp_path, SMALL) == first
        and (first / "shared.engine").stat().st_mtime_ns == written
    )
    manifest, trt = manifests.load(artifact), store.load("tensorrt-rtx")
    keys = {store.key_of(store.describe(manifest, SMALL, trt))}
    for change in (
        {"layout": "split"},
        {"targets": ("sm86",)},
        {"max_batch": 3},
        {"max_length": 32},
        {"block_length": 4},
        {"optimization_level": 2},
    ):
        keys.add(store.key_of(store.describe(manifest, store.replace(SMALL, **change), trt)))
    assert len(keys) == 7 and first.name in keys
    facts = json.loads((first / "engine.json").read_text())
    assert facts["built_for"]["version"] == trt.__version__ and facts["built_for"]["files"]["weights.data"]
    assert [profile["name"] for profile in facts["built_for"]["profiles"]["shared"]] == ["prefix", "refine"]


def test_engines_that_were_changed_or_are_of_something_else_are_refused(artifact, tmp_path):
    directory = store.build(artifact, tmp_path, SMALL)
    wanted = store.describe(manifests.load(artifact), SMALL, store.load("tensorrt-rtx"))
    for field, value in (("version", "9.9"), ("capacity", 128), ("targets", ["sm75"])):
        with pytest.raises(DllmError, match=f"were built for {field} .*, expected"):
            store.check(directory, wanted | {field: value})
    data = bytearray((directory / "shared.engine").read_bytes())
    data[1000] ^= 1
    (directory / "shared.engine").write_bytes(data)
    with pytest.raises(DllmError, match="changed since it was built"):
        store.build(artifact, tmp_path, SMALL)
    (directory / "engine.json").write_text("{}")
    with pytest.raises(DllmError, match="not readable"):
        store.build(artifact, tmp_path, SMALL)


def test_profiles_hold_what_the_loop_asks_for(artifact):
    """A prefix pass takes up to the canvas, a refine step up to the block (and the block before it, where
    that is stored by the same call); all of them any batch up to the most."""
    facts = manifests.load(artifact).decoding
    blocks = replace(facts, attention="block_causal", block_length=8, block_origin="absolute")
    for those, most in ((blocks, 16), (replace(blocks, next_from_store=True), 8)):
        assert store.plans(SMALL, those)[0].profiles[1].rows == (1, 8, most)
    (shared,) = store.plans(SMALL, facts)
    whole, window = shared.profiles
    assert (whole.rows, window.rows, whole.batch, window.asked) == (
        (1, 64, 64),
        (1, 8, 8),
        (1, 1, 2),
        (1, 8, 8),
    )
    specs = {spec.name: spec for spec in contract.inputs("refine", contract.Dims(1, 2, 32, 100, "float16"))}
    assert window.shapes(specs["input_ids"], 64) == [(1, 1), (1, 8), (2, 8)]
    assert whole.shapes(specs["cache_key.0"], 64) == [(1, 2, 64, 32), (1, 2, 64, 32), (2, 2, 64, 32)]


def test_the_command(artifact, tmp_path, capsys, monkeypatch):
    out = tmp_path / "engines"
    command = [
        "build",
        str(artifact),
        "--backend",
        "tensorrt-rtx",
        "--target",
        "sm89",
        "--max-length",
        "64",
        "--out",
        str(out),
    ]
    assert cli.main(command) == 0
    assert "shared.engine" in capsys.readouterr().out and len(list(out.glob("*/shared.engine"))) == 1
    for change, said in (
        (["--target", "sm42"], "unknown target 'sm42'"),
        (["--layout", "one"], "unknown layout 'one'"),
        (["--max-batch", "0"], "--max-batch is 0"),
        (["--optimization-level", "9"], "--optimization-level is 9"),
        (["--backend", "tensorrt"], "needs --backend tensorrt-rtx"),
        (["--backend", "cuda"], "unknown backend 'cuda'"),
    ):
        assert cli.main([*command, *change]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    monkeypatch.setattr(store, "_MODULES", {"tensorrt": (("no_such_module",), "trt")})
    assert cli.main(["build", str(artifact), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert (
        "needs a package that is missing" in error
        and f"{commands.by_driver('trt')} (tensorrt is on NVIDIA's index)" in error
    )


def test_an_older_tensorrt_is_told_to_take_the_legacy_lowering(artifact):
    class Old:
        __version__ = "10.9.0.34"

    with pytest.raises(
        DllmError, match=r"which needs tensorrt 10\.16 or newer, got 10\.9\.0\.34: .* --lowering legacy"
    ):
        build_config.check_version(manifests.load(artifact), BuildConfig("tensorrt"), Old)
