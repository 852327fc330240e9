"""Faults put into the exporter on purpose: each is caught, by the stage that should catch it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from places import export_quietly

from export import pipeline
from export.graph import lint
from export.graph.attention import Attention
from export.graph.linears import Linears
from export.graph.lowering import modern
from export.parity.verify import bisect, verify
from export.weights import plan as weights
from export.weights.sources import FromCheckpoint
from trt_runtime.artifact import manifest as manifests
from trt_runtime.cli import main as cli


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
        modern, "attention", lambda *v: real(*v[:-1], replace(v[-1], scale=v[-1].scale * 1.1**-0.5))
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
    golden_checkpoint, monkeypatch, tmp_path, fault, stage, dtype, recorded_once
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
