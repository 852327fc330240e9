"""8-bit products: right on every processor, with the settings that this one needs; and as if it had fewer
instruction sets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import cpu_without
import numpy as np
import onnx
import pytest
from places import DEMO, ROOT, export_quietly

from export.parity import verify, verify_graphs
from export.pipeline import ExportConfig
from export.quantize import export as quantize
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.ort import OrtBackend, int8
from trt_runtime.errors import DllmError
from trt_runtime.system import processor

PROBE = next(iter(int8.PROBES))
WITHOUT = sorted(cpu_without.SETS)


def without(sets: str, *command: str) -> str:
    """What a command prints on a processor without these sets; skips where this machine cannot leave them
    out."""
    made = subprocess.run(
        [sys.executable, str(ROOT / "tools/cpu_without.py"), sets, "--", sys.executable, *command],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    if made.returncode == cpu_without.UNABLE:
        pytest.skip(f"this machine has no CPUID faulting, or no gcc: {made.stderr.strip()}")
    assert made.returncode == 0, made.stderr
    return made.stdout


@pytest.fixture(scope="module", params=["w8a8", "int4"])
def quantised(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("int8") / request.param
    how = quantize.QuantizeConfig(request.param, gate=False)
    quantize.export(ExportConfig(str(DEMO), out), how, lambda total: lambda done: None)
    return out


@pytest.mark.parametrize("name", int8.PROBES)
def test_probes_are_exact_here_with_some_settings(name):
    model, x, wanted = int8.PROBES[name]()
    onnx.checker.check_model(onnx.load_from_string(model))
    assert int8.exact_with(name) in int8.SETTINGS
    assert (
        np.abs(wanted).max() > 2 * 32767 and int8.exact(name) == wanted[0, 0]
    )  # no pair of products would fit 16 bits, let alone all
    assert not np.array_equal(x[0], x[1])


def test_the_first_settings_that_are_exact_are_taken(monkeypatch):
    monkeypatch.setattr(
        int8,
        "_runs",
        lambda name, options: [
            (np.array([[32640.0 if not options else 4129024.0]]), np.array([[4129024.0]]))
        ],
    )
    int8.exact_with.cache_clear()
    try:
        assert int8.settings_for("w8a8") == {int8.PRECISION: "1"}
        assert int8.settings_for("a scheme of a later version") == {int8.PRECISION: "1"}
    finally:
        int8.exact_with.cache_clear()


def test_a_processor_that_is_always_wrong_runs_no_quantised_artifact(quantised, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "exact_with", lambda name: None)
    monkeypatch.setattr(int8, "computed", lambda name, options: 32640.0)
    with pytest.raises(
        DllmError, match=r"multiplies 8-bit numbers incorrectly on this processor .* got 32640"
    ):
        OrtBackend(quantised)
    OrtBackend(export_quietly(DEMO, tmp_path / "fp32")).close()  # the others do


@pytest.mark.parametrize("sets", WITHOUT)
def test_without_vnni_the_product_saturates_and_the_option_mends_it(sets):
    code = (
        "import json; from trt_runtime.backends.ort import int8; p = next(iter(int8.PROBES));"
        "print(json.dumps([int8.computed(p, s) for s in int8.SETTINGS] + [int8.settings_for(s) for s in "
        "('w8a8', 'int4')]))"
    )
    plain, mended, w8a8, int4 = json.loads(without(sets, "-c", code))
    assert plain == 32640.0  # else this test shows nothing: the sets were not left out
    assert mended == int8.exact(PROBE) == 4129024.0 and w8a8 == {int8.PRECISION: "1"} and int4 == {}


_COMPARE = """
import json, sys
from pathlib import Path
from export.parity import verify_graphs
from trt_runtime.artifact import manifest
from trt_runtime.backends.ort import int8
made, artifact = [], Path(sys.argv[1])
for settings in json.loads(sys.argv[2]):
    if settings is not None:
        int8.session_entries = lambda manifest: settings
    worst = verify_graphs.compare_quantised(artifact, manifest.load(artifact))
    made.append([worst.logits, worst.refine_logits, worst.caches])
print(json.dumps(made))
"""


@pytest.mark.parametrize("sets", WITHOUT)
def test_a_whole_artifact_is_right_without_vnni(quantised, sets):
    settings = [None, {}] if quantised.name == "w8a8" else [None]
    worst, *saturated = json.loads(without(sets, "-c", _COMPARE, str(quantised), json.dumps(settings)))
    assert max(worst) <= (1e-5 if quantised.name == "w8a8" else 5e-2)
    if quantised.name == "w8a8":  # and the comparison would show it
        assert min(saturated[0]) > 0.1


def test_a_quantised_artifact_is_run_by_its_verification(quantised, monkeypatch):
    stages = {stage.name: stage for stage in verify.verify(quantised)}
    assert stages["canvases"].passed
    real = verify_graphs.spelled

    def otherwise(model):
        """The graph spelled out with one layer's output doubled: what is run is then something else."""
        made = real(model)
        layer = next(
            node for node in made.graph.node if node.op_type == "MatMul" and ".spelled." in node.input[0]
        )
        old = layer.output[0]
        layer.output[0] = old + ".once"
        made.graph.node.insert(
            list(made.graph.node).index(layer) + 1,
            onnx.helper.make_node("Add", [old + ".once", old + ".once"], [old]),
        )
        return made

    monkeypatch.setattr(verify_graphs, "spelled", otherwise)
    stages = {stage.name: stage for stage in verify.verify(quantised)}
    assert not stages["canvases"].passed and manifests.load(quantised).verified["passed"] is False


def test_doctor_tells_of_the_processor_and_its_products(capsys):
    from trt_runtime.cli import main as cli

    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    said = [item["said"] for item in found if item["what"] == "8-bit products"]
    assert len(said) == len(int8.PROBES) and all("exact" in text for text in said)
    assert next(item["said"] for item in found if item["what"] == "processor").startswith(processor.name())


def test_doctor_names_the_setting_without_vnni():
    said = without("vnni", "-m", "trt_runtime.cli", "doctor")
    assert "MatMulIntegerToFloat (w8a8): exact with session.x64quantprecision = 1" in said


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_tool_passes_on_the_exit_status_and_refuses_nonsense():
    tool = [sys.executable, str(ROOT / "tools/cpu_without.py")]
    done = subprocess.run(
        [*tool, "vnni", "--", sys.executable, "-c", "raise SystemExit(7)"], check=False, capture_output=True
    )
    assert done.returncode in (7, cpu_without.UNABLE)
    assert (
        subprocess.run([*tool, "vnni", "--", "no-such-command"], check=False, capture_output=True).returncode
        == 2
    )
    assert subprocess.run([*tool, "sse2", "--", "true"], check=False, capture_output=True).returncode == 2


def test_the_benchmark_measures_every_spelling(tmp_path, monkeypatch, capsys):
    """On the demo model, one round: times and errors of each, and what is exact here."""
    sys.path.append(str(ROOT / "benchmarks" / "cpu"))
    import int8 as benchmark

    artifact = export_quietly(DEMO, tmp_path / "fp32")
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    monkeypatch.setattr(
        sys, "argv", ["int8.py", "--artifact", str(artifact), "--output", str(tmp_path / "out.json")]
    )
    benchmark.main()
    report = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["spelling"], row["precision"]): row for row in report["rows"]}
    assert list(rows) == [
        ("fp32", "0"),
        ("w8a8", "0"),
        ("w8a8", "1"),
        ("w7a8", "0"),
        ("int8", "0"),
        ("int4", "0"),
    ]
    assert (
        all(row["prefix_ms"] > row["refine_ms"] > 0 for row in rows.values())
        and rows["fp32", "0"]["error"] == 0
    )
    assert 0 < rows["w8a8", "1"]["error"] < rows["w7a8", "0"]["error"]  # seven bits round more
    assert report["machine"]["instruction_sets"] and "w7a8" in capsys.readouterr().out
