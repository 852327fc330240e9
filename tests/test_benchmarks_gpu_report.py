"""`make gpu-report`: the CPU twin of every stage, one that fails, and the table and plot made of the results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from conftest import ROOT

pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("matplotlib")
REPORT, RENDER = (str(ROOT / "benchmarks" / name) for name in ("gpu_report.py", "render.py"))


def _run(*command, **environment):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | environment)  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All stages of the twin, with the stage 'ort' sabotaged in a second directory."""
    out = tmp_path_factory.mktemp("report")
    done = _run(REPORT, "--twin", "--output", out / "good", "--work", out / "work")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_stage_has_a_twin(results):
    held = {file.stem[4:]: json.loads(file.read_text()) for file in (results / "good").glob("gpu-*.json")}
    assert set(held) == {"environment", "ceilings", "kernels", "model", "torch", "torch_graph", "ort", "tensorrt", "tensorrt86"}
    assert not [name for name, made in held.items() if "failed" in made]
    assert held["ort"]["parity"]["passed"] and held["ort"]["parity"]["refine"]["tokens_as_fp32"] == 1.0
    assert len(held["ort"]["speeds"]) == 4 and all(row["refine_share"] > 0 for row in held["ort"]["speeds"])
    assert held["ort"]["tokens_per_second"]["nfe"] == held["ort"]["tokens_per_second_looking_every_4"]["nfe"] == 6
    assert held["kernels"]["row_statistics"][0]["tokens_equal"] and held["kernels"]["commit"]["cases"] == 5
    assert held["tensorrt86"]["exported"] == "legacy, fp16" and held["tensorrt"]["engine_bytes"] > 100_000


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
    made = json.loads((results / "bad" / "gpu-ort.json").read_text())
    assert "further from PyTorch in fp32 than rounding explains" in made["failed"] and made["tokens_per_second"]
    assert "failed" not in json.loads((results / "bad" / "gpu-environment.json").read_text())


def test_the_results_become_a_table_and_a_plot(results, tmp_path):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- gpu-report: begin -->\nold\n<!-- gpu-report: end -->\nafter\n")
    for _ in range(2):  # and again over its own output
        done = _run(RENDER, "--results", results / "good", "--document", document)
        assert done.returncode == 0, done.stderr
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    rows = [line for line in text.splitlines() if line.startswith(("| PyTorch", "| ONNX"))]
    assert [row.split("|")[1].strip() for row in rows] == ["PyTorch, eager", "PyTorch, CUDA graph (*)", "ONNX Runtime"]
    assert "| 1.00 |" in rows[0] and "`ort`: parity passed" in text and "`tensorrt86`: not run" in text
    drawn = (tmp_path / "gpu-report.svg").read_text()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")


def test_wrong_use_is_one_line(tmp_path):
    for command, said in (((REPORT, "--output", tmp_path), "PyTorch sees no GPU here"), ((REPORT, "--twin", "--stages", "x"), "unknown stage 'x'"),
                          ((RENDER, "--results", tmp_path), "no gpu-environment.json there")):  # fmt: skip
        done = _run(*command, CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
