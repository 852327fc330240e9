"""Faults put into the export of models with experts, and into token editing, on purpose: each is caught, by
the stage that should catch it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from official import EXPERTS

from export import pipeline
from export.graph.attention import Attention
from export.graph.experts import MixtureOfExperts, Router
from export.parity.verify import verify
from export.weights.sources import FromCheckpoint
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.editing import Editing
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.measure import replay

BY_NAME = {official.name: official for official in EXPERTS}


def _router(**wrong):
    """The router of the graph has other facts than the checkpoint's."""

    def fault(monkeypatch):
        real = Router.build
        monkeypatch.setattr(Router, "build", lambda self, *rest: real(replace(self, **wrong), *rest))

    return fault


def _top_k_before_softmax(monkeypatch):
    """The softmax of the chosen logits alone, which makes the weights sum to 1."""

    def wrong(self, on, h, layer):
        logits = on.op.Gemm(on.float32(h), on.weight(f"layers.{layer}.router"), transB=1)
        best, chosen = on.op.TopK(logits, [self.top_k], axis=-1, largest=1, sorted=1, _outputs=2)
        weights = on.op.Softmax(best, axis=-1)
        return on.op.ScatterElements(on.op.Mul(logits, 0.0), chosen, weights, axis=1), logits

    monkeypatch.setattr(Router, "build", wrong)


def _experts_in_another_order(monkeypatch):
    real = FromCheckpoint._stacked

    def wrong(self):
        turned = self if len(self.stored) == 1 else replace(self, stored=self.stored[::-1])
        yield from real(turned)

    monkeypatch.setattr(FromCheckpoint, "_stacked", wrong)


def _columns_in_another_order(monkeypatch):
    real = FromCheckpoint._beside
    monkeypatch.setattr(FromCheckpoint, "_beside", lambda self: real(replace(self, stored=self.stored[::-1])))


def _no_shared_expert(monkeypatch):
    real = MixtureOfExperts.build

    def wrong(self, on, h, layer):
        return on.op.Add(real(replace(self, shared=None), on, h, layer), on.op.Mul(h, 0.0))

    monkeypatch.setattr(MixtureOfExperts, "build", wrong)


def _last_entries_rotated(monkeypatch):
    """RoPE turns the last entries of a head, not the first."""
    real = Attention._rotate

    def wrong(self, on, x, rows, factor=None):
        if self.rotary_dim in (None, self.head_dim):
            return real(self, on, x, rows, factor)
        widths = [self.head_dim - self.rotary_dim, self.rotary_dim]
        first, last = on.op.Split(x, widths, axis=-1, _outputs=2)
        turned = on.lowering.rotate(on.op, last, *(on.narrow(t) for t in on.table), rows.positions)
        return on.op.Concat(first, turned, axis=-1) if factor is None else real(self, on, x, rows, factor)

    monkeypatch.setattr(Attention, "_rotate", wrong)


def _silent_manifest(**wrong):
    def fault(monkeypatch):
        real = pipeline._manifest

        def changed(*arguments):
            manifest = real(*arguments)
            return replace(manifest, decoding=replace(manifest.decoding, **wrong))

        monkeypatch.setattr(pipeline, "_manifest", changed)

    return fault


_FAULTS = [
    ("llada2", None, _router(has_bias=False), "experts"),
    ("llada2", None, _router(num_groups=1), "experts"),
    ("llada2", None, _router(scale=1.0), "logits"),
    ("llada2", None, _router(is_normalised=False), "logits"),
    ("llada2", None, _no_shared_expert, "weights"),
    ("llada2", None, _last_entries_rotated, "logits"),
    ("llada2", None, _columns_in_another_order, "logits"),
    ("llada2", None, _experts_in_another_order, "logits"),
    ("llada2", "ort-cpu", _experts_in_another_order, "logits"),
    ("llada2", None, _silent_manifest(is_threshold_strict=False), "decode"),
    ("lladamoe", None, _top_k_before_softmax, "logits"),
    ("lladamoe", None, _router(is_normalised=True), "logits"),
    ("lladamoe", "ort-cpu", _router(is_normalised=True), "logits"),
    ("rnd1", None, _router(is_normalised=False), "logits"),
    ("rnd1", None, _router(top_k=2), "logits"),
    ("rnd1", None, _silent_manifest(closing_token_id=None), "decode"),
]


@pytest.mark.parametrize(("name", "target", "fault", "stage"), _FAULTS, ids=range(len(_FAULTS)))
def test_a_fault_of_the_export_is_found(monkeypatch, tmp_path, name, target, fault, stage, recorded_once):
    """A router's faults show in the experts that rows pass too, with or before the logits."""
    with monkeypatch.context() as patch:
        fault(patch)
        broken = BY_NAME[name].export(tmp_path / "broken", target=target)
    failed = [item.name for item in verify(broken) if not item.passed]
    assert stage in failed, failed
    if fault.__qualname__.startswith("_router"):
        assert "experts" in failed, failed


def _prompt_is_edited(monkeypatch):
    real = Sequence.next_forward

    def wrong(self):
        """The whole block, where the prompt ends inside it."""
        forward = real(self)
        if forward.end < self.block[1]:
            return forward
        inside = np.arange(forward.end - self.rules.block_length, self.block[1])
        return replace(forward, editable=inside[~self.is_masked[inside]])

    monkeypatch.setattr(Sequence, "next_forward", wrong)


def _edits_up_to_the_threshold(monkeypatch):
    monkeypatch.setattr(
        Editing,
        "select",
        lambda self, stats, there: (stats.confidence > 0.5 * self.threshold) & (stats.token != there),
    )


def _own_commits_are_edited(monkeypatch):
    """A block is done as soon as it has no mask."""
    monkeypatch.setattr("trt_runtime.decoding.editing.EditState.is_done", lambda self, editing: True)


@pytest.mark.parametrize("fault", [_prompt_is_edited, _edits_up_to_the_threshold, _own_commits_are_edited])
def test_a_fault_of_editing_is_found_by_the_recorded_cases(monkeypatch, tmp_path, fault):
    official = BY_NAME["llada21"]
    backend, cases = OrtBackend(official.export(tmp_path / "artifact"), threads=1), official.cases()
    fault(monkeypatch)
    wrong = [replay.compare(case, replay.replay(backend, case)) for case in cases]
    assert np.count_nonzero([item is not None for item in wrong]) > 3
