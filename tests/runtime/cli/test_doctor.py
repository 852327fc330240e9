"""doctor: it sees what is there, and says how to mend what is not."""

from __future__ import annotations

import json
import sys
import types

import onnxruntime
import pytest

from trt_runtime.backends.tensorrt import store
from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError
from trt_runtime.machine import doctor, gpu_check, packages
from trt_runtime.machine.packages import ABSENT, FAILURE, OK, WARNING, Package
from trt_runtime.system import commands


def test_this_machine_is_healthy_and_every_flaw_has_its_mend(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    can = said.splitlines()[-1]
    assert can.startswith("This machine can: decode on the CPU (ort), ") and "export" in can
    assert cli.main(["doctor", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    found = {finding["what"]: finding for finding in made["findings"]}
    assert made["healthy"] and found["provider CPUExecutionProvider"]["status"] == OK
    assert found["onnxruntime"]["said"].startswith(onnxruntime.__version__)
    assert all(finding["mend"] for finding in made["findings"] if finding["status"] != OK)


@pytest.mark.parametrize(
    ("version", "needed", "status", "said"),
    [
        (None, False, ABSENT, "not installed; for: x"), (None, True, FAILURE, "not installed"),
        ("1.4", False, WARNING, "1.4; supported from 1.5, below 2"), ("1.4", True, FAILURE, "supported from"),
        ("2.0.1", False, WARNING, "below 2"), ("1.10.0+cpu", False, OK, "1.10.0"), ("1.5", True, OK, "1.5"),
    ],
)  # fmt: skip
def test_versions_against_the_table(monkeypatch, version, needed, status, said):
    monkeypatch.setattr(packages, "installed_version", lambda package: version)
    finding = packages.package_finding(Package("json", "json", "1.5", "2", "x", "pip install json", needed))
    assert (
        finding.status == status
        and said in finding.said
        and (finding.mend == "pip install json") == (status != OK)
    )


def test_a_package_that_does_not_import_is_found(monkeypatch):
    monkeypatch.setattr(packages, "installed_version", lambda package: "1.5")
    finding = packages.package_finding(
        Package("broken", "no_such_module", "1.5", "2", "x", "pip install broken")
    )
    assert (
        finding.status == WARNING
        and "import fails: ModuleNotFoundError" in finding.said
        and "install it again" in finding.mend
    )


def test_a_provider_that_only_falls_back_is_not_ok(monkeypatch):
    """ONNX Runtime lists CUDA and opens a session on the CPU without an error."""
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    real = onnxruntime.InferenceSession

    def falls_back(model, providers):
        return real(model, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", falls_back)
    found = {finding.what: finding for finding in doctor._providers()}
    assert found["provider CUDAExecutionProvider"].status == WARNING
    assert "falls back to CPUExecutionProvider" in found["provider CUDAExecutionProvider"].said
    assert found["provider CPUExecutionProvider"].status == OK
    assert "decode on the GPU" not in doctor.summary(list(found.values()))


def test_two_runtimes_at_once_are_a_conflict(monkeypatch):
    monkeypatch.setattr(packages, "installed_version", lambda package: "1.30")
    assert [finding.status for finding in packages.both_runtimes()] == [WARNING]
    monkeypatch.setattr(packages, "installed_version", lambda package: None)
    assert list(packages.both_runtimes()) == []


@pytest.mark.parametrize(
    ("version", "status"), [((3, 9), FAILURE), ((3, 10), OK), ((3, 13), OK), ((3, 14), WARNING)]
)
def test_python_versions(monkeypatch, version, status):
    monkeypatch.setattr(sys, "version_info", (*version, 0))
    assert doctor._python().status == status


class _Cuda:
    """Stands in for libcuda."""

    def __init__(self, devices, error=0):
        self.devices, self.error = devices, error

    def cuInit(self, flags):
        return self.error

    def cuDeviceGetCount(self, number):
        number._obj.value = len(self.devices)
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = 13010

    def cuDeviceGet(self, device, index):
        device._obj.value = index

    def cuDeviceGetName(self, name, size, device):
        name.value = self.devices[device.value]

    def cuDeviceTotalMem_v2(self, size, device):
        size._obj.value = 24 << 30

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 8, 76: 9}[attribute]


@pytest.mark.parametrize(
    ("cuda", "expected"),
    [
        (
            _Cuda([b"NVIDIA L4"]),
            [("NVIDIA driver", OK, "CUDA 13.1"), ("GPU", OK, "NVIDIA L4, 24.0 GiB, compute capability 8.9")],
        ),
        (_Cuda([]), [("NVIDIA driver", OK, "CUDA 13.1"), ("GPU", ABSENT, "the driver reports no GPU")]),
        (_Cuda([], 999), [("GPU", WARNING, "the driver failed to initialise (CUDA error 999)")]),
    ],
)
def test_gpus_are_asked_through_the_driver(monkeypatch, cuda, expected):
    monkeypatch.setattr(
        gpu_check, "ctypes", types.SimpleNamespace(**{**vars(gpu_check.ctypes), "CDLL": lambda name: cuda})
    )
    assert [(finding.what, finding.status, finding.said) for finding in gpu_check.gpu_findings()] == expected


def test_a_driver_that_is_older_than_the_bindings_is_found(monkeypatch):
    """cuda-bindings of CUDA 13 on a driver of CUDA 12: every call would fail."""
    monkeypatch.setattr(gpu_check, "bindings_major", lambda: 13)
    found = gpu_check._driver(12040)
    assert (
        found.status == packages.WARNING
        and "CUDA 12.4, but cuda-bindings is for CUDA 13" in found.said
        and "cuda-bindings<13" in found.mend
    )
    assert gpu_check._driver(13000).status == packages.OK
    monkeypatch.setattr(gpu_check, "bindings_major", lambda: None)
    assert gpu_check._driver(12040).status == packages.OK


@pytest.mark.parametrize(("driver", "extra"), [(12, "trt-cu12"), (13, "trt-cu13"), (0, "trt-cu13")])
def test_the_extra_of_the_drivers_cuda_is_advised(monkeypatch, driver, extra):
    monkeypatch.setattr(commands, "driver_cuda", lambda: driver)
    assert extra in next(package.mend for package in packages.packages() if package.name == "tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DllmError, match=extra):
        store.load("tensorrt")
