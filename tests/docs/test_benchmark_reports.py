"""The benchmark of the whole system: variants in one table, scaling compared with the roofline, and the
generated tables and plots. Other programs: test_other_programs.py."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from places import DEMO, GOLDENS, ROOT, export_quietly

from export.pipeline import ExportConfig
from export.quantize import export as quantize
from export.quantize.export import QuantizeConfig
from trt_runtime.cli import main as cli
from trt_runtime.model import load

sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "cpu")]
import system


@pytest.fixture(scope="module")
def w8a8(tmp_path_factory):
    out = tmp_path_factory.mktemp("system") / "w8a8"
    quantize.export(
        ExportConfig(str(DEMO), out), QuantizeConfig("w8a8", gate=False), lambda total: lambda done: None
    )
    return out


@pytest.fixture(scope="module")
def variants(demo_artifact, w8a8, tmp_path_factory):
    """A run of `dllm-trt bench` with quantised and PyTorch rows beside the artifact's."""
    out = tmp_path_factory.mktemp("variants") / "system-variants-1.json"
    command = [
        "bench",
        str(demo_artifact),
        "--prompt-length",
        "16",
        "--gen-length",
        "16",
        "--block-length",
        "8",
        "--tokens-per-step",
        "2",
        "--count",
        "1",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--variants",
        "vanilla,dual",
        "--beside",
        str(w8a8),
        "--reference",
        "dual",
        "--reference-dtypes",
        "fp32,bf16",
        "--output",
        str(out),
    ]
    assert cli.main(command) == 0
    return out


def test_quantised_and_reference_rows_stand_beside_the_artifacts(variants):
    report = json.loads(variants.read_text())
    rows = {row["variant"]: row for row in report["rows"]}
    assert list(rows) == [
        "ort vanilla",
        "ort dual",
        "ort w8a8 vanilla",
        "ort w8a8 dual",
        "torch fp32 dual",
        "torch bf16 dual",
    ]
    assert rows["ort vanilla"]["nfe"] == 16 and all(
        rows[name]["nfe"] == 8 for name in rows if name.endswith("dual")
    )
    assert rows["ort vanilla"]["refine_ms"] is None and all(
        row["tokens_per_second"] > 0 for row in rows.values()
    )
    assert set(report["peak_memory_mib"]) == {"ort", "ort w8a8", "torch fp32", "torch bf16"}
    assert report["peak_memory_mib"]["torch fp32"] > report["peak_memory_mib"]["ort"]


def test_beside_takes_the_same_model_only(demo_artifact, w8a8, tmp_path, capsys):
    other = export_quietly(GOLDENS / "llada_tiny", tmp_path / "other")
    command = [
        "bench",
        str(demo_artifact),
        "--count",
        "1",
        "--repeats",
        "1",
        "--prompt-length",
        "8",
        "--gen-length",
        "8",
    ]
    assert cli.main([*command, "--beside", str(other)]) == 1
    assert "not the same model as" in capsys.readouterr().err
    assert cli.main([*command, "--beside", str(w8a8), "--beside", str(w8a8)]) == 1
    assert "another artifact already has the label 'ort w8a8'" in capsys.readouterr().err
    assert cli.main([*command, "--reference", "dual", "--reference-dtypes", "fp8"]) == 1
    assert "fp8" in capsys.readouterr().err


@pytest.fixture(scope="module")
def scaling(demo_artifact, w8a8):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "BASE", {"prompt": 40, "gen_length": 16, "block": 8, "batch": 1, "threads": 1})
        patch.setattr(
            system,
            "SWEEPS",
            {"prompt": (16, 160), "gen_length": (8, 16), "block": (4, 8), "batch": (1, 4), "threads": (1,)},
        )
        rates = {"fp32": 1e11, "int8": 4e11, "bandwidth": 2e10}
        patch.setattr(system, "peaks", lambda threads: rates)
        return {"machine": {}, "base": system.BASE, **system.scaling(demo_artifact, w8a8)}


def test_forwards_grow_with_what_they_compute(scaling):
    points = scaling["points"]
    assert len(points) == 2 * 9
    by = {(p["sweep"], p[p["sweep"]], p["artifact"]): p for p in points}
    assert by["prompt", 160, "fp32"]["prefix_ms"] > by["prompt", 16, "fp32"]["prefix_ms"]
    assert by["batch", 4, "fp32"]["prefix_ms"] > by["batch", 1, "fp32"]["prefix_ms"]
    for point in points:
        blocks, steps = -(-point["gen_length"] // point["block"]), -(-point["block"] // 2)
        seconds = blocks * (point["prefix_ms"] + (steps - 1) * point["refine_ms"]) / 1000
        assert point["tokens_per_second"] == pytest.approx(point["batch"] * point["gen_length"] / seconds)


def test_the_roofline_counts_every_multiplication(demo_artifact):
    """Layer by layer, number by number: the last layer's queries, MLP and the head on the block alone."""
    facts = load(demo_artifact).manifest.model
    at = {"prompt": 40, "gen_length": 16, "block": 8, "batch": 3, "threads": 1}
    hidden, mlp, wide = facts.hidden_size, facts.intermediate_size, facts.num_heads * facts.head_dim
    linear = attention = 0
    for layer in range(facts.num_layers):
        rows = 8 if layer == facts.num_layers - 1 else 56
        linear += 56 * 2 * hidden * 2 * facts.num_kv_heads * facts.head_dim + rows * 2 * (
            2 * hidden * wide + 3 * hidden * mlp
        )
        attention += rows * 56 * 4 * wide
    linear += 8 * 2 * hidden * facts.vocab_size
    rates = {"fp32": 1e9, "int8": 4e9, "bandwidth": 1e15}
    assert system.rooflines(facts, at, rates, False)["prefix_roofline_ms"] == pytest.approx(
        3 * (linear + attention) / 1e6
    )
    assert system.rooflines(facts, at, rates, True)["prefix_roofline_ms"] == pytest.approx(
        3 * (linear / 4 + attention) / 1e6
    )
    slow = {"fp32": 1e15, "int8": 1e15, "bandwidth": 1e6}
    read = (facts.parameters - facts.vocab_size * hidden + facts.max_length * facts.head_dim) * 4
    assert system.rooflines(facts, at, slow, False)["refine_roofline_ms"] == pytest.approx(read / 1e3)


def test_peaks_are_rates_of_this_machine():
    rates = system.peaks(1)
    assert set(rates) == {"fp32", "int8", "bandwidth"} and all(1e8 < rate < 1e14 for rate in rates.values())


def test_windows_ask_for_the_first_block():
    canvas = np.arange(60).reshape(2, 30)
    window = system.window_of(canvas, 0, 30, 20, 4)
    assert window.logit_rows.tolist() == [[20, 21, 22, 23]] * 2 and window.write_index.tolist() == [0, 0]
    window = system.window_of(canvas, 20, 24, 20, 4)
    assert window.logit_rows.tolist() == [[0, 1, 2, 3]] * 2 and window.position_ids[1].tolist() == [
        20,
        21,
        22,
        23,
    ]
    assert window.input_ids[1].tolist() == [50, 51, 52, 53] and window.kv_len.tolist() == [30, 30]


def test_missing_files_and_parts_are_named(tmp_path):
    def errors_of(*options):
        return subprocess.run(
            [
                sys.executable,
                ROOT / "benchmarks" / "cpu" / "system.py",
                "--output",
                tmp_path / "out",
                *options,
            ],
            capture_output=True,
            text=True,
            check=False,
        ).stderr

    assert errors_of("--parts", "speed").startswith("error: --parts: speed: expected some of")
    assert "give --llama-cpp BINARY, --official DIR, or both" in errors_of("--parts", "others")
    assert "--llama-cpp /nowhere: does not exist" in errors_of("--llama-cpp", "/nowhere")
