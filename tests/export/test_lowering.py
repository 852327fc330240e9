"""Both lowerings compute the same: on the goldens, on every family, in a ragged batch, with grouped heads."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import pytest
from calls import logits, window
from places import export_quietly
from safetensors.numpy import save_file
from tiny import WHOLE_FAMILIES, random_tensors, write_checkpoint

from export import families, options
from export.graph.attention import Attention
from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.measure import replay, tolerances


@pytest.fixture(scope="module")
def legacy_golden(golden_checkpoint, tmp_path_factory):
    return export_quietly(golden_checkpoint, tmp_path_factory.mktemp("legacy") / "fp32", lowering="legacy")


def test_all_goldens_exactly_in_legacy(legacy_golden, golden_cases):
    manifest = manifests.load(legacy_golden)
    assert (manifest.lowering, manifest.opset) == ("legacy", 17)
    backend = OrtBackend(legacy_golden, threads=1)
    assert [replay.compare(case, replay.replay(backend, case)) for case in golden_cases] == [None] * 79


@pytest.mark.parametrize(("dtype", "allowed"), [("fp32", 1e-5), ("fp16", tolerances.LOGITS["fp16"])])
@pytest.mark.parametrize("name", WHOLE_FAMILIES)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_legacy_equals_modern(tmp_path, name, dtype, allowed, kv_heads):
    """Logits of a prefix pass and of a refine step, and the caches. Relative to the largest value."""
    family = families.find(name)
    config = family.tiny_config() | {
        key: kv_heads for key in family.tiny_config() if key in ("n_kv_heads", "num_key_value_heads")
    }
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(family, config), tmp_path / "checkpoint" / "model.safetensors")
    rng, made = np.random.default_rng(0), {}
    full = window(rng.integers(0, 120, (2, 30)), kv_len=[30, 24])
    step = window(rng.integers(0, 120, (2, 5)), 9, [30, 24])
    for lowering in ("modern", "legacy"):
        artifact = export_quietly(
            tmp_path / "checkpoint", tmp_path / lowering, lowering=lowering, dtype=dtype, head="logits"
        )
        for role in ("prefix", "refine"):
            backend = OrtBackend(artifact, role=role, threads=1)
            cache = backend.new_cache(2, 30)
            results = [logits(backend, cache, full)[:, :24]]
            if role == "refine":
                results.append(logits(backend, cache, step))
            made[lowering, role] = results + [array[:, :, :24] for array in cache.buffers.arrays.values()]
    for role in ("prefix", "refine"):
        for mine, theirs in zip(made["legacy", role], made["modern", role], strict=True):
            assert np.abs(mine.astype(np.float32) - theirs).max() < allowed * max(
                1.0, float(np.abs(theirs).max())
            )


@pytest.mark.parametrize("lowering", contract.LOWERINGS)
@pytest.mark.parametrize("name", ["dream", "illada", "rnd1", "llada_moe"])
def test_folded_groups_give_the_same_bits(tmp_path, monkeypatch, name, lowering):
    """Query heads of a KV head as rows of one head: no copies of keys and values, and not a bit differs."""
    path = write_checkpoint(families.find(name), tmp_path / "checkpoint")
    outputs, nodes = [], []
    ids, kv_len = np.random.default_rng(0).integers(0, 120, (3, 32)), [32, 25, 17]
    for folds in (True, False):
        if not folds:
            monkeypatch.setattr(Attention, "fold", 1)
        artifact = export_quietly(path, tmp_path / str(folds), lowering=lowering, head="logits")
        graph = onnx.load(artifact / "refine.onnx", load_external_data=False).graph
        nodes.append(Counter(node.op_type for node in graph.node))
        backend = OrtBackend(artifact, threads=1)
        cache = backend.new_cache(3, 40)
        outputs.append(
            [
                logits(backend, cache, call)
                for call in (window(ids, 0, kv_len), window(ids[:, 4:12], 4, kv_len))
            ]
        )
    folded, plain = nodes
    assert folded["Expand"] == 0 and (plain["Expand"] > 0) == (lowering == "legacy")
    assert lowering == "legacy" or folded["Reshape"] == plain["Reshape"] + 2 * 3  # layers
    for mine, theirs in zip(*outputs, strict=True):
        assert (mine == theirs).all() and mine.std() > 0.1


def test_the_lowering_follows_the_onnx_runtime_that_is_installed(monkeypatch, capsys):
    versions = {"1.23.2": "legacy", "1.24.0": "modern", "1.32.0": "modern", "2.0.1": "modern"}
    for version, expected in versions.items():
        monkeypatch.setattr(options.importlib.metadata, "version", lambda _, version=version: version)
        assert options.lowering_of("auto") == expected
        assert options.lowering_of("modern") == "modern"
    assert "onnxruntime 1.23 has no opset 24" in capsys.readouterr().out
