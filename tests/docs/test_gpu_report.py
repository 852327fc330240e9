"""`make gpu-report`: the CPU twin of every stage, one that fails, and the table and plot of the results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from places import ROOT

pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("matplotlib")
REPORT, RENDER = (str(ROOT / "benchmarks" / name) for name in ("gpu/report.py", "reports/gpu.py"))


def _run(*command, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All stages of the twin, with the stage 'ort' sabotaged in a second directory."""
    out = tmp_path_factory.mktemp("report")
    done = _run(REPORT, "--twin", "--output", out / "good", "--work", out / "work")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def stages_of(folder) -> dict:
    (file,) = folder.glob("*.json")
    report = json.loads(file.read_text())
    assert (
        file.name == "gpu-report-twin.json"
        and report["format"] == "dllm-trt gpu report"
        and report["format_version"] == 1
    )
    return report["stages"]


def test_every_stage_has_a_twin(results):
    """In one file, with the machine, the versions and the hashes of what was run."""
    stages = stages_of(results / "good")
    assert list(stages) == [
        "environment",
        "ceilings",
        "kernels",
        "model",
        "torch",
        "ort",
        "torch_graph",
        "tensorrt86",
        "build",
        "tensorrt",
    ]
    assert not [name for name, result in stages.items() if "failed" in result]
    assert stages["ort"]["parity"]["passed"] and stages["ort"]["parity"]["refine"]["tokens_as_fp32"] == 1.0
    assert len(stages["ort"]["speeds"]) == 4 and all(
        row["refine_share"] > 0 for row in stages["ort"]["speeds"]
    )
    assert (
        stages["ort"]["tokens_per_second"]["nfe"]
        == stages["ort"]["tokens_per_second_looking_every_4"]["nfe"]
        == 6
    )
    assert (
        stages["kernels"]["row_statistics"][0]["tokens_equal"] and stages["kernels"]["commit"]["cases"] == 5
    )
    assert [row["rows"] for row in stages["kernels"]["experts"]] == [3, 20]
    assert [row["rows"] for row in stages["kernels"]["head"]] == [3, 33]
    assert [row["batch"] for row in stages["kernels"]["attention"]] == [1, 2]
    assert stages["tensorrt86"]["exported"] == "legacy, fp16" and stages["build"]["engine_bytes"] > 100_000
    assert (
        stages["environment"]["machine"]["instruction_sets"] is not None
        and "no engine" in stages["tensorrt"]["skipped"]
    )
    artifacts = json.loads((results / "good" / "gpu-report-twin.json").read_text())["artifacts"]
    assert len(artifacts["artifact"]["refine.onnx"]) == 64


def test_a_stage_that_fails_says_so_and_stops_no_other(results):
    """A graph that is wrong by a scale: the stage of ONNX Runtime fails for its parity; the others do not."""
    import shutil

    import onnx

    work = shutil.copytree(results / "work", results / "wrong")
    graph = work / "artifact" / "refine.onnx"
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Attention" and attribute.name == "scale":
                attribute.f *= 1.5
    graph.write_bytes(model.SerializeToString())
    manifest = json.loads((work / "artifact" / "manifest.json").read_text())
    manifest["files"]["refine.onnx"]["size"] = graph.stat().st_size
    (work / "artifact" / "manifest.json").write_text(json.dumps(manifest))
    done = _run(REPORT, "--twin", "--output", results / "bad", "--work", work, "--stages", "ort,environment")
    assert done.returncode == 1 and "failed: ort; the other stages' results are in" in done.stderr
    stages = stages_of(results / "bad")
    assert (
        "further from PyTorch in fp32 than rounding explains" in stages["ort"]["failed"]
        and stages["ort"]["tokens_per_second"]
    )
    assert (
        "failed" not in stages["environment"]
        and "| ONNX Runtime |" in done.stdout
        and "`ort`: parity FAILED" in done.stdout
    )


def test_engines_have_a_time_of_their_own_and_nobody_waits_for_them(results, tmp_path):
    """All else is measured first; when the total is spent, engines are still built and run."""
    done = _run(
        REPORT,
        "--twin",
        "--output",
        tmp_path,
        "--work",
        results / "work",
        "--stages",
        "environment,ort,build",
        "--total-seconds",
        "1",
    )
    stages = stages_of(tmp_path)
    assert (
        done.returncode == 0
        and stages["ort"]["skipped"] == "no time was left"
        and stages["build"]["engine_bytes"] > 100_000
    )
    done = _run(
        REPORT,
        "--twin",
        "--output",
        tmp_path,
        "--work",
        tmp_path / "empty",
        "--stages",
        "build",
        "--build-seconds",
        "1",
    )
    assert "no time was left" in done.stdout


def test_the_model_fits_the_gpu():
    sys.path[:0] = [str(ROOT / "benchmarks" / "gpu")]
    import report as gpu_report
    from random_checkpoint import PRESETS

    from export import families
    from export.families.base import ConfigReader
    from export.pipeline import facts_of_config

    sizes = {gib: gpu_report.preset_for(gib) for gib in (7.6, 15.7, 23.6, 39.4, 79.6, 140)}
    assert list(sizes.values()) == ["llada-1.5b"] * 4 + ["llada-8b"] * 2
    config = PRESETS["llada-1.5b"][0]
    parameters = facts_of_config(
        families.find("llada").decoder(ConfigReader(config, "config.json")), config, "bf16"
    ).parameters
    assert 1.4e9 < parameters < 1.7e9 and 2 * parameters < 0.5 * 7.6 * 2**30
    assert (
        gpu_report._slug("NVIDIA GeForce RTX 4090") == "rtx-4090"
        and gpu_report._slug("NVIDIA H200") == "h200"
    )


def test_reports_become_a_table_and_a_plot_and_are_merged(results, tmp_path):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- gpu-report: begin -->\nold\n<!-- gpu-report: end -->\nafter\n")
    report = results / "good" / "gpu-report-twin.json"
    for _ in range(2):  # and again over its own output
        done = _run(RENDER, report, "--document", document)
        assert done.returncode == 0, done.stderr
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    rows = [line for line in text.splitlines() if line.startswith(("| PyTorch", "| ONNX"))]
    assert [row.split("|")[1].strip() for row in rows] == [
        "PyTorch, eager",
        "PyTorch, CUDA graph (*)",
        "ONNX Runtime",
    ]
    assert "| 1.00 |" in rows[0] and "`ort`: parity passed" in text and "`tensorrt86`: not run" in text
    drawn = (tmp_path / "gpu-report.svg").read_text()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    other = json.loads(report.read_text())
    other["stages"]["environment"]["gpu"] = {"name": "NVIDIA L4"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    done = _run(RENDER, report, tmp_path / "other.json", "--print")
    merged = [line for line in done.stdout.splitlines() if "| ONNX Runtime |" in line and "canvas 64" in line]
    assert len(merged) == 2 and merged[1].startswith("| NVIDIA L4 |") and merged[1].endswith("| passed |")


def test_wrong_use_is_one_line(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    for command, message in (
        ((REPORT, "--output", tmp_path), "PyTorch sees no GPU here"),
        ((REPORT, "--twin", "--stages", "x"), "unknown stage 'x'"),
        ((RENDER, tmp_path / "x.json"), "not a report of 'make gpu-report'"),
        ((RENDER, tmp_path / "none.json"), "not a report"),
    ):
        done = _run(*command, CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
