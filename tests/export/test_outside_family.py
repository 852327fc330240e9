"""A family and a feed-forward from outside, each in one file: exported, verified against PyTorch, quantised,
and decoded."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from outside import OUTSIDE, added, command
from places import export_quietly
from tiny import write_checkpoint

from export import families, schemes
from export.families.base import Piece
from export.graph.decoder import weight_shapes
from export.parity.verify import verify
from export.pipeline import ExportConfig, export, read
from export.weights import accounts
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError
from trt_runtime.measure import cases, replay
from trt_runtime.model import load

NAMES = {"toy": "outside_family", "squared": "outside_feed_forward"}


@pytest.fixture(params=NAMES)
def family(request, monkeypatch):
    monkeypatch.syspath_prepend(str(OUTSIDE))
    made = __import__(NAMES[request.param]).FAMILY
    with added(families.FAMILIES, made, request.param):
        yield made
    sys.modules.pop(NAMES[request.param])


def test_it_is_exported_and_agrees_with_pytorch(family, tmp_path):
    path = write_checkpoint(family, tmp_path / "checkpoint")
    for dtype in ("fp32", "bf16"):
        artifact = export_quietly(path, tmp_path / dtype, dtype=dtype)
        stages = list(verify(artifact))
        assert [stage.name for stage in stages] == ["weights", "range", "logits", "cache", "decode"]
        assert all(stage.passed for stage in stages), [str(stage) for stage in stages]


def test_it_decodes_and_is_quantised(family, tmp_path):
    path = write_checkpoint(family, tmp_path / "checkpoint")
    artifact = export_quietly(path, tmp_path / "fp32", head="logits")
    backend = OrtBackend(artifact, threads=1)
    recorded = replay.record(backend, cases.random_cases(backend.manifest, 6))["cases"]
    assert all(replay.compare(case, replay.replay(backend, case)) is None for case in recorded)
    export(
        ExportConfig(str(path), tmp_path / "w8a8"),
        lambda total: lambda done: None,
        scheme=schemes.find("w8a8")("fp32"),
    )
    mine, theirs = (
        load(tmp_path / name, threads=1).generate([[5, 6, 7]], GenerationConfig(gen_length=32))[0]
        for name in ("fp32", "w8a8")
    )
    assert len(mine.tokens) == len(theirs.tokens) > 0


def test_weights_of_several_tensors_and_slices_of_one(monkeypatch, tmp_path):
    """Queries, keys and values are rows of one tensor; gate and up are two tensors each."""
    monkeypatch.syspath_prepend(str(OUTSIDE))
    from outside_family import FAMILY

    with added(families.FAMILIES, FAMILY, "toy"):
        tensors = {}
        path = write_checkpoint(FAMILY, tmp_path / "checkpoint", change=tensors.update)
        assert {"toy.0.qkv", "toy.1.gate_proj.first", "toy.1.gate_proj.second"} <= set(
            tensors
        ) and "toy.0.q_proj" not in tensors
        artifact = export_quietly(path, tmp_path / "out")
        manifest = load(artifact, threads=1).manifest
        largest = manifest.weight_maxima
        assert largest["layers.0.k_proj"] == pytest.approx(float(np.abs(tensors["toy.0.qkv"][64:96]).max()))
        halves = [np.abs(tensors[f"toy.1.up_proj.{half}"]).max() for half in ("first", "second")]
        assert largest["layers.1.up_proj"] == pytest.approx(float(max(halves)))
        with pytest.raises(DllmError, match="is stored as 2 tensors, which --weights link cannot join"):
            export_quietly(path, tmp_path / "linked", weights="link")

        short = write_checkpoint(
            FAMILY,
            tmp_path / "short",
            change=lambda held: held.update({"toy.0.qkv": held["toy.0.qkv"][:100]}),
        )
        with pytest.raises(
            DllmError, match=r"toy.0.qkv has 100 rows, the weights of this config take them up to 128"
        ):
            export_quietly(short, tmp_path / "no")

        class Forgetful(type(FAMILY)):
            def pieces(self, weight):
                return tuple(
                    Piece(piece.tensor, (0, 32) if piece.rows == (64, 96) else piece.rows)
                    for piece in super().pieces(weight)
                )

        forgetful = Forgetful()
        source = read(str(path))
        with pytest.raises(DllmError, match="take them up to"):
            accounts.check(
                {name: forgetful.pieces(name) for name in weight_shapes(source.decoder)},
                forgetful,
                source.checkpoint,
            )


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_know_an_installed_one(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(OUTSIDE))
    made = __import__(NAMES[name]).FAMILY
    sys.modules.pop(NAMES[name])
    path = write_checkpoint(made, tmp_path / "checkpoint")
    done = command(
        "-m",
        "export",
        "--checkpoint",
        path,
        "--out",
        tmp_path / "out",
        "--verify",
        "yes" if name == "toy" else "no",  # the other test verifies both
        cwd=OUTSIDE.parents[2],
    )
    assert done.returncode == 0 and ("verified" in done.stdout + done.stderr) == (name == "toy"), done.stderr
    planned = command("-m", "trt_runtime.cli", "plan", path, "--device", "cpu")
    assert planned.returncode == 0, planned.stderr
