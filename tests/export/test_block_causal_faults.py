"""Faults put into the export of block-causal models and into their decoding on purpose: each is caught, by
the stage that should catch it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from official import BY_NAME
from places import GOLDENS, refused

from export import pipeline
from export.graph.attention import Attention
from export.graph.lowering import modern
from export.parity.verify import bisect, verify
from trt_runtime.decoding.blocks import BlockCausal
from trt_runtime.decoding.cache_plan import STORE, Forward
from trt_runtime.decoding.plans import BlockCache


def _norm_after_rotation(monkeypatch):
    heads, rotate, seen = Attention._heads, Attention._rotate, []

    def without_norm(self, on, h, layer, name, count, rows):
        seen.append((layer, name))
        return heads(replace(self, qk_norm=False), on, h, layer, name, count, rows)

    def then_norm(self, on, x, rows, factor=None):
        layer, name = seen[-1]
        return on.norm(rotate(self, on, x, rows, factor), f"layers.{layer}.{name[0]}_norm")

    monkeypatch.setattr(Attention, "_heads", without_norm)
    monkeypatch.setattr(Attention, "_rotate", then_norm)


def _one_row_too_many(monkeypatch):
    """Each row of the refine graph sees one row of the cache more."""
    real = modern.valid_keys
    monkeypatch.setattr(
        modern,
        "valid_keys",
        lambda op, cache, window, index, length: real(op, cache, window, index, op.Add(length, 1)),
    )


def _one_row_too_few_in_the_prefix_graph(monkeypatch):
    real = modern.valid_rows
    monkeypatch.setattr(
        modern,
        "valid_rows",
        lambda op, window, length, axis=1: real(op, window, op.Max(op.Sub(length, 1), 1), axis),
    )


def _one_length_for_all_rows(monkeypatch):
    """As with full attention: every row sees what the last one sees."""
    real = modern.valid_rows
    monkeypatch.setattr(
        modern,
        "valid_rows",
        lambda op, window, length, axis=1: real(
            op, window, op.Add(op.Mul(length, 0), op.ReduceMax(length, [1], keepdims=1)), axis
        ),
    )


def _with_facts(**wrong):
    def fault(monkeypatch):
        real = pipeline._manifest

        def changed(*arguments):
            manifest = real(*arguments)
            return replace(manifest, decoding=replace(manifest.decoding, **wrong))

        monkeypatch.setattr(pipeline, "_manifest", changed)

    return fault


_GRAPHS = [
    ("sdar", _norm_after_rotation, "logits"),
    ("sdar", _one_row_too_many, "logits"),
    ("sdar", _one_row_too_few_in_the_prefix_graph, "logits"),
    ("sdar", _one_length_for_all_rows, "logits"),
    ("sdar", _with_facts(block_length=8), "decode"),
    ("a2d_qwen3", _with_facts(block_origin="absolute"), "decode"),
    ("fastdllm_v2", _with_facts(small_block=16), "decode"),
    ("fastdllm_v2", _with_facts(next_from_store=False, logit_shift=0), "decode"),
]


@pytest.mark.parametrize(("name", "fault", "stage"), _GRAPHS, ids=range(len(_GRAPHS)))
def test_a_fault_of_the_export_is_found(monkeypatch, tmp_path, name, fault, stage, recorded_once):
    with monkeypatch.context() as patch:
        fault(patch)
        broken = BY_NAME[name].export(tmp_path / "broken")
    failed = [item.name for item in verify(broken) if not item.passed]
    assert failed[:1] == [stage], failed
    if stage == "logits":
        assert not all(row.passed for rows in bisect(broken).values() for row in rows)


def _stale_block(monkeypatch):
    """A finished block is not stored: its keys stay those of its last step."""
    real = BlockCache.next_forward

    def wrong(self, row):
        forward = real(self, row)
        if forward.kind != STORE:
            return forward
        return real(self, replace(row, blocks=replace(row.blocks, stored=row.blocks.start)))

    monkeypatch.setattr(BlockCache, "next_forward", wrong)


def _block_too_short(monkeypatch):
    real = BlockCausal.reach
    monkeypatch.setattr(BlockCausal, "reach", lambda self, *lengths: np.maximum(real(self, *lengths) - 1, 1))


def _other_origin(monkeypatch):
    monkeypatch.setattr(BlockCausal, "_offset", lambda self, prompt_length: prompt_length % self.length)


def _next_token_from_the_row_before(monkeypatch):
    real = Forward.logit_rows

    def wrong(self, shift):
        rows = real(self, shift)
        return rows - 1 if self.is_forced and len(rows) else rows

    monkeypatch.setattr(Forward, "logit_rows", wrong)


_LOOPS = [
    ("sdar", _stale_block),
    ("fastdllm_v2", _stale_block),
    ("sdar", _block_too_short),
    ("a2d_qwen3", _block_too_short),
    ("sdar", _other_origin),
    ("a2d_qwen3", _other_origin),
    ("fastdllm_v2", _next_token_from_the_row_before),
]


@pytest.mark.parametrize(("name", "fault"), _LOOPS)
def test_a_fault_of_the_loop_is_found(monkeypatch, tmp_path, name, fault):
    """The runtime's loop decodes both sides of the stage 'decode', but not the naive side of 'blocks'."""
    made = BY_NAME[name].export(tmp_path / "artifact")
    fault(monkeypatch)
    failed = [item.name for item in verify(made) if not item.passed]
    assert failed == ["blocks"]


def test_a_head_dim_from_the_hidden_size_is_refused(tmp_path):
    """Its weights have other shapes: 4 heads of 32 over a hidden size of 96."""
    path = shutil.copytree(GOLDENS / "sdar_tiny", tmp_path / "checkpoint")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"head_dim": config["hidden_size"] // 4}))
    refused(path, tmp_path / "out", "self_attn.q_proj.weight has shape [128, 96]")
