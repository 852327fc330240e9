"""Forecasts of quantised exports and of this machine's CPU: bytes as an export stores them, times from rates
that are given."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from places import DEMO, GOLDENS, export_quietly
from tiny import write_checkpoint

from export import families
from export.pipeline import ExportConfig, read
from export.quantize import export as quantize
from export.quantize import forecast
from export.schemes import SCHEMES
from export.schemes.base import Calibration
from export.weights import plan as weights
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import Quantization
from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError
from trt_runtime.machine import devices, roofline
from trt_runtime.machine import forecast as plan
from trt_runtime.machine.roofline import MEMORY_LAYOUTS, Work

CPU = devices.DeviceSpec("a CPU", 16 * devices.GIB, devices.GIB, 20.0, None, 0.1, is_cpu=True, rate8=0.4)


class _AnyCalibration(dict):
    def __missing__(self, name):
        return np.ones(1, np.float32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.name}-{scheme.target}")
@pytest.mark.parametrize(
    "checkpoint", [DEMO, GOLDENS / "llada_tiny", GOLDENS / "dream_tiny"], ids=lambda path: path.name
)
def test_bytes_are_those_of_the_schemes_own_parts(scheme, checkpoint, tmp_path):
    """As an export plans them over the real files; of config.json alone as of the whole checkpoint."""
    dtype = "fp32" if scheme.dtypes == ("fp32",) else "bf16"
    source, held = read(str(checkpoint)), Calibration(_AnyCalibration(), _AnyCalibration())
    shutil.copyfile(checkpoint / "config.json", tmp_path / "config.json")
    try:
        planned = weights.plan(
            source.decoder, source.family, source.checkpoint, dtype, scheme=scheme(dtype, held)
        )
    except DllmError as error:  # int4 for TensorRT takes multiples of 64 alone: the forecast says so as well
        with pytest.raises(DllmError, match=re.escape(str(error))):
            forecast.quantised(str(checkpoint), None, scheme.name, scheme.target)
        return
    expected = planned[-1].offset + planned[-1].size
    for path in (checkpoint, tmp_path):
        facts, how = forecast.quantised(str(path), None, scheme.name, scheme.target)
        assert (facts.weight_bytes, facts.dtype) == (expected, dtype)
        assert how == Quantization(scheme.name, scheme.target)


@pytest.mark.parametrize("name", ["w8a8", "int4"])
def test_an_export_takes_the_disk_that_was_forecast(name, tmp_path, capsys):
    done = quantize.export(
        ExportConfig(str(DEMO), tmp_path / name),
        quantize.QuantizeConfig(name, gate=False),
        lambda total: lambda done: None,
    )
    assert cli.main(["plan", str(DEMO), "--device", "cpu", "--quantize", name, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (
        made["disk"]["artifact"]
        == (tmp_path / name / "weights.data").stat().st_size
        == done.files["weights.data"].size
    )
    assert made["disk"]["engines, shared"] is None and list(made["memory"]) == [MEMORY_LAYOUTS[0].name]
    assert made["quantised"] == {"scheme": name, "target": "ort-cpu"}
    (row,) = made["devices"].values()
    assert row["rates"]["measured"] and row["prefix_pass_seconds"] > 0 and row["fits"] == {"ort": True}
    assert (
        cli.main(["plan", str(tmp_path / name), "--json", "--device", "cpu"]) == 0
    )  # the artifact itself says the same
    artifact = json.loads(capsys.readouterr().out)
    assert artifact["memory"] == made["memory"] and artifact["quantised"] == made["quantised"]


def test_the_dtype_of_the_files_counts_where_they_are_here(tmp_path):
    """An embedding stays as it is stored; config.json may say nothing of it."""
    path = write_checkpoint(families.find("llada"), tmp_path / "checkpoint")
    config = json.loads((path / "config.json").read_text())
    config.pop("torch_dtype", None)
    (path / "config.json").write_text(json.dumps(config))
    made = export_quietly(path, tmp_path / "plain").parent / "quantised"
    quantize.export(
        ExportConfig(str(path), made),
        quantize.QuantizeConfig("w8a8", gate=False),
        lambda total: lambda done: None,
    )
    assert (
        forecast.quantised(str(path), None, "w8a8", None)[0].weight_bytes
        == (made / "weights.data").stat().st_size
    )
    (path / "model.safetensors").write_bytes(b"cut short")
    assert forecast.quantised(str(path), None, "w8a8", None)[0].weight_bytes > 0


def test_times_on_a_cpu_follow_its_rates():
    """fp16 is computed in fp32; quantised layers at the 8-bit rate, attention not; bf16 is not computed."""
    facts = manifests.ModelFacts("llada", 32, 32, 32, 128, 4096, 12288, 126464, 4096, "fp32", 8_015_581_184)
    work = Work(1, 1280, 32)
    layers, everything = roofline.flops(facts, 1280, 0, 32), roofline.flops(facts, 1280, 1280, 32)
    full = roofline.seconds(facts, work, CPU, rows=1280)
    assert (
        full == pytest.approx(everything / 0.1e12)
        and roofline.seconds(plan.replace(facts, dtype="fp16"), work, CPU, rows=1280) == full
    )
    assert roofline.seconds(plan.replace(facts, dtype="bf16"), work, CPU, rows=1280) is None
    quantised = plan.replace(facts, weight_bytes=8 << 30)
    how = Quantization("w8a8", "ort-cpu")
    assert roofline.seconds(quantised, work, CPU, rows=1280, quantised=how) == pytest.approx(
        (layers / 0.4e12) + (everything - layers) / 0.1e12
    )
    slow = plan.replace(CPU, bandwidth=1e-3)
    step = roofline.seconds(quantised, work, slow, rows=32, quantised=how)
    assert step == pytest.approx(((8 << 30) - 2 * 126464 * 4096 + roofline.cache_bytes(facts, work)) / 1e6)


def test_this_machine_is_measured_once(monkeypatch):
    device = devices.this_machine()
    assert (
        device.bandwidth > 0.05
        and device.rate32 > 1e-5
        and device.rate8 >= device.rate32
        and device.rate16 is None
    )
    assert (device.rate8 > device.rate32) == devices.has_int8()
    calls = []
    monkeypatch.setattr(devices, "_bandwidth", lambda: calls.append(1))
    assert devices.this_machine() == device and not calls

    def fails():
        raise MemoryError

    monkeypatch.setattr(devices, "_bandwidth", fails)
    devices._rates.cache_clear()
    try:
        assert (
            devices.this_machine().rate32 is None
            and roofline.seconds(
                manifests.ModelFacts("llada", 1, 1, 1, 2, 2, 2, 9, 9, "fp32", 99),
                Work(1, 4, 2),
                devices.this_machine(),
                rows=4,
            )
            is None
        )
    finally:
        devices._rates.cache_clear()


def test_a_forecast_says_what_it_is(capsys):
    assert cli.main(["plan", str(DEMO), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert (
        re.search(r"this machine's CPU +[\d.]+ GiB +[\d.]+ +[\d.]+  ort, torch", said)
        and "times are lower bounds" in said
    )
    assert re.search(
        r"for this CPU, measured just now: copies at \d+ GB/s, products at \d+ GFLOP/s in fp32", said
    )
    assert " MiB" in said and " KiB" in said and not re.search(r"\de-\d", said)
    assert cli.main(["plan", str(DEMO), "--quantize", "fp8"]) == 0
    said = capsys.readouterr().out
    assert (
        "fp8 for tensorrt" in said
        and "this machine's CPU" not in said
        and "measured" not in said.split("forecast, at")[0]
    )
    assert re.search(r"A100 80 GB .* - +-  nothing", said) and re.search(
        r"H100 SXM .*trt shared, trt split", said
    )
    assert cli.main(["plan", str(DEMO), "--quantize", "int4", "--device", "l4"]) == 0
    assert "int4 for tensorrt" in capsys.readouterr().out
    assert cli.main(["plan", str(DEMO), "--quantize", "int4"]) == 0
    assert "int4 for ort-cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--quantize", "w8a"], "unknown scheme of quantisation 'w8a': did you mean 'w8a8'?"),
        (
            ["--quantize", "fp8", "--device", "cpu"],
            "--quantize fp8 does not run on cpu: quantise with w8a8 or int4",
        ),
        (
            ["--quantize", "w8a8", "--device", "l4"],
            "--quantize w8a8 does not run on l4: quantise with fp8 or int8-sq or int4",
        ),
        (
            ["--quantize", "fp8", "--device", "a100-80g"],
            "fp8 for tensorrt does not run on A100 80 GB: give --device h100",
        ),
        (["--quantize", "w8a8", "--dtype", "bf16"], "keeps everything else in fp32, but --dtype is bf16"),
        (["--quantize", "w8a8", "--device", "l44"], "unknown device 'l44': did you mean 'l4'"),
    ],
)
def test_what_is_refused(arguments, error, capsys):
    assert cli.main(["plan", str(DEMO), *arguments]) == 1
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1


def test_an_artifact_is_not_quantised_again(demo_artifact, capsys):
    assert cli.main(["plan", str(demo_artifact), "--quantize", "w8a8"]) == 1
    assert f"forecasts the export of a checkpoint: give {DEMO}." in capsys.readouterr().err


@pytest.mark.parametrize(
    "files",
    [["adapter_config.json", "adapter_model.safetensors"], ["adapter_config.json", "adapter_model.bin"]],
)
def test_an_adapter_gets_the_line_that_an_export_gives(files, tmp_path, capsys):
    from export import cli as exporter

    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in files:
        (folder / name).write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    assert exporter.main(["--checkpoint", str(folder), "--out", str(tmp_path / "out")]) == 1
    exported = capsys.readouterr().err
    assert cli.main(["plan", str(folder)]) == 1
    planned = capsys.readouterr().err
    if "adapter" in exported.replace(
        str(folder), ""
    ):  # what says that an adapter must be merged says it in both
        assert planned == exported
    assert planned.startswith("error: ") and planned.count("\n") == 1


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (75_000, "73.2 KiB"),
        (3 << 20, "3.0 MiB"),
        (5 << 29, "2.50 GiB"),
    ],
)
def test_sizes_are_told_in_their_unit(size, said):
    assert devices.size_text(size) == said
