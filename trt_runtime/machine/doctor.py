"""`dllm-trt doctor`: what this machine can do, what it lacks for more, and how to mend it. Changes
nothing."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from trt_runtime.backends.cuda import bindings_major
from trt_runtime.machine.devices import GIB, meminfo
from trt_runtime.system import commands, processor

PYTHONS = ((3, 10), (3, 13))
OK, ABSENT, WARNING, FAILURE = "ok", "absent", "warning", "failure"


@dataclass(frozen=True)
class Package:
    """A row of the support table: versions from `least` on and below `below` are supported; `extra` installs
    it.

    `needed`: without it the runtime does not run at all.
    """

    name: str
    module: str
    least: str
    below: str
    purpose: str
    mend: str
    needed: bool = False
    others: tuple[str, ...] = ()  # names that it may be installed by as well


def packages() -> tuple[Package, ...]:
    """The support table."""
    install, package, by_driver = commands.install, commands.package, commands.by_driver
    return (
        Package("numpy", "numpy", "1.26", "3", "runtime", package("numpy"), needed=True),
        Package("tokenizers", "tokenizers", "0.19", "1", "runtime: text", package("tokenizers"), needed=True),
        Package(
            "jinja2", "jinja2", "3.1.6", "4", "runtime: chat templates", package("jinja2>=3.1.6"), needed=True
        ),
        Package("onnxruntime", "onnxruntime", "1.20", "2", "backend ort on a CPU", install("ort")),
        Package("onnxruntime-gpu", "onnxruntime", "1.31", "2", "backend ort on a GPU", install("ort-gpu")),
        Package(
            "tensorrt",
            "tensorrt",
            "8.6",
            "12",
            "TensorRT engines",
            by_driver("trt"),
            others=("tensorrt-cu13", "tensorrt-cu12"),
        ),
        Package(
            "tensorrt-rtx-cu13-bindings",
            "tensorrt_rtx_bindings",
            "1.7",
            "2",
            "building TensorRT-RTX engines",
            by_driver("rtx"),
            others=("tensorrt-rtx-cu12-bindings",),
        ),
        Package("cuda-bindings", "cuda", "12.6", "14", "TensorRT engines, kernels", by_driver("trt")),
        Package("onnx", "onnx", "1.21", "2", "export", install("export")),
        Package("onnx-ir", "onnx_ir", "0.1.16", "2", "export", install("export")),
        Package("onnxscript", "onnxscript", "0.6", "1", "export", install("export")),
        Package("ml_dtypes", "ml_dtypes", "0.5", "1", "export", install("export")),
        Package(
            "wcwidth", "wcwidth", "0.2.13", "1", "runtime: --stream, chat", package("wcwidth"), needed=True
        ),
        Package("huggingface_hub", "huggingface_hub", "0.30", "3", "export: downloads", install("export")),
        Package("torch", "torch", "2.6", "3", "verify, the reference", install("reference")),
        Package("transformers", "transformers", "5.8", "6", "verify, the reference", install("reference")),
        Package("polygraphy", "polygraphy", "0.50.3", "1", "debugging engines", install("debug")),
    )


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `mend` says what to do where it is not ok."""

    what: str
    status: str
    said: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.status:8} {self.what:31} {self.said}" + (
            f"\n{'':40} -> {self.mend}" if self.mend else ""
        )


def findings() -> Iterator[Finding]:
    """Everything, in the order in which it is worth reading."""
    yield _python()
    yield from _packages()
    yield from _both_runtimes()
    yield from _gpu()
    yield from _providers()
    yield _processor()
    yield from _products()
    yield _memory()
    yield _disk()


def run(*, as_json: bool) -> tuple[str, bool, list[str]]:
    """The findings as text or JSON, whether the runtime can run here, and the mends of what keeps it from
    that."""
    found = list(findings())
    mends = [finding.mend for finding in found if finding.status == FAILURE]
    if as_json:
        made = {"healthy": not mends, "findings": [asdict(finding) for finding in found]}
        return json.dumps(made, indent=1), not mends, mends
    return "\n".join([*map(str, found), "", summary(found)]), not mends, mends


def summary(found: list[Finding]) -> str:
    """A sentence: what this machine can do now."""
    good = {finding.what for finding in found if finding.status == OK}
    can = [
        name
        for name, needs in (
            ("decode on the CPU (ort)", {"provider CPUExecutionProvider"}),
            ("build TensorRT-RTX engines", {"tensorrt-rtx-cu13-bindings", "onnx"}),
            ("export", {"onnx", "onnx-ir", "onnxscript", "ml_dtypes"}),
            (
                "verify",
                {
                    "onnx",
                    "onnx-ir",
                    "onnxscript",
                    "ml_dtypes",
                    "torch",
                    "transformers",
                    "provider CPUExecutionProvider",
                },
            ),
        )
        if needs <= good
    ]
    return f"This machine can: {', '.join(can) or 'nothing yet; mend the failures first'}."


def _python() -> Finding:
    version, (least, most) = sys.version_info[:2], PYTHONS
    said = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    wanted = f"use Python {least[0]}.{least[1]} to {most[0]}.{most[1]}"
    if version < least:
        return Finding("Python", FAILURE, said, wanted)
    return (
        Finding("Python", OK, said)
        if version <= most
        else Finding("Python", WARNING, f"{said}: newer than tested", wanted)
    )


def _packages() -> Iterator[Finding]:
    for package in packages():
        yield package_finding(package)


def package_finding(package: Package) -> Finding:
    """A package's version against the support table, and whether it can be imported."""
    version = next(filter(None, map(_version, (package.name, *package.others))), None)
    if version is None:
        status = FAILURE if package.needed else ABSENT
        return Finding(package.name, status, f"not installed; for: {package.purpose}", package.mend)
    if not _numbers(package.least) <= _numbers(version) < _numbers(package.below):
        status = FAILURE if package.needed else WARNING
        said = f"{version}; supported from {package.least}, below {package.below}; for: {package.purpose}"
        return Finding(package.name, status, said, package.mend)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(package.module)
    except (Exception, SystemExit) as error:  # a broken package can raise anything
        said = f"{version}, but its import fails: {type(error).__name__}: {_first_line(error)}"
        return Finding(
            package.name, FAILURE if package.needed else WARNING, said, f"install it again: {package.mend}"
        )
    return Finding(package.name, OK, f"{version}; for: {package.purpose}")


def _both_runtimes() -> Iterator[Finding]:
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        yield Finding(
            "onnxruntime",
            WARNING,
            "onnxruntime and onnxruntime-gpu are both installed: one hides the other",
            f"{commands.pip()} uninstall onnxruntime onnxruntime-gpu, then {commands.install('ort')} or "
            f"{commands.install('ort-gpu')}",
        )


def _gpu() -> Iterator[Finding]:
    """The driver and its devices, asked through libcuda: no CUDA toolkit and no package is needed."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        if not all(hasattr(cuda, name) for name in ("cuDriverGetVersion", "cuDeviceTotalMem_v2")):
            raise OSError("a stub of the driver's library")
    except OSError:
        yield Finding("GPU", ABSENT, "no NVIDIA driver (libcuda.so.1)", "install the driver, or use the CPU")
        return
    number, version = ctypes.c_int(), ctypes.c_int()
    if code := cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number)):
        yield Finding(
            "GPU",
            WARNING,
            f"the driver does not start (CUDA error {code})",
            "check nvidia-smi; in a container, start it with --gpus all",
        )
        return
    cuda.cuDriverGetVersion(ctypes.byref(version))
    yield _driver(version.value)
    for index in range(number.value):
        yield Finding("GPU", OK, _describe_gpu(cuda, index))
    if not number.value:
        yield Finding("GPU", ABSENT, "the driver has no device", "check nvidia-smi and CUDA_VISIBLE_DEVICES")


def _driver(version: int) -> Finding:
    """Whether the installed cuda-bindings run on it: theirs must not be of a newer CUDA."""
    driver, bindings = version // 1000, bindings_major()
    said = f"CUDA {driver}.{version % 1000 // 10}"
    if bindings is None or bindings <= driver:
        return Finding("NVIDIA driver", OK, said)
    return Finding(
        "NVIDIA driver",
        WARNING,
        f"{said}, and cuda-bindings is of CUDA {bindings}: no call will work",
        f"{commands.package(f'cuda-bindings<{driver + 1}')}, or update the driver",
    )


def _describe_gpu(cuda: Any, index: int) -> str:
    device, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
    major, minor = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    for value, attribute in (
        (major, 75),
        (minor, 76),
    ):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return (
        f"{name.value.decode(errors='replace')}, {size.value / GIB:.1f} GiB, compute capability "
        f"{major.value}.{minor.value}"
    )


# a ModelProto, opset 17: y = Identity(x), both float [1]
_IDENTITY = (
    b"\x08\x08\x3a\x37\x0a\x10\x0a\x01x\x12\x01y\x22\x08Identity\x12\x01g"
    b"\x5a\x0f\x0a\x01x\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01"
    b"\x62\x0f\x0a\x01y\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01\x42\x02\x10\x11"
)


def _providers() -> Iterator[Finding]:
    """Execution providers that a session really gets: ONNX Runtime falls back to the CPU without an error."""
    try:
        import onnxruntime
    except Exception:  # reported with the packages
        return
    onnxruntime.set_default_logger_severity(4)
    for name in onnxruntime.get_available_providers():
        if name not in (
            "CPUExecutionProvider",
            "CUDAExecutionProvider",
            "TensorrtExecutionProvider",
            "NvTensorRTRTXExecutionProvider",
        ):
            continue
        try:
            got = onnxruntime.InferenceSession(_IDENTITY, providers=[name]).get_providers()
            said = (
                "a session runs on it"
                if name in got
                else f"listed, but a session falls back to {', '.join(got)}"
            )
        except Exception as error:  # onnxruntime raises several unrelated types
            got, said = [], f"listed, but no session opens: {_first_line(error)}"
        mend = (
            f"install it again: {commands.package('--force-reinstall', 'onnxruntime')}"
            if name.startswith("CPU")
            else f"its libraries are missing or too old: install CUDA and cuDNN "
            f"({commands.package('onnxruntime-gpu[cuda,cudnn]')})"
        )
        yield Finding(f"provider {name}", OK if name in got else WARNING, said, "" if name in got else mend)


def _processor() -> Finding:
    sets = ", ".join(processor.instruction_sets()) or "its instruction sets are not known"
    return Finding("processor", OK, f"{processor.name()}: {sets}")


def _products() -> Iterator[Finding]:
    """Whether 8-bit products are right here, with what settings: by trying them (backends/int8.py)."""
    try:
        from trt_runtime.backends.ort import int8
    except Exception:  # ONNX Runtime is missing or broken, which is reported with the packages
        return
    for probe in int8.PROBES:
        try:
            settings = int8.exact_with(probe)
        except Exception as error:  # onnxruntime raises several unrelated types
            said, mend = (
                f"{probe}: cannot be tried: {_first_line(error)}",
                "install onnxruntime 1.24 or newer",
            )
            yield Finding("8-bit products", WARNING, said, mend)
            continue
        if settings is None:
            mend = "install another version of onnxruntime, or use artifacts that are not quantised"
            yield Finding("8-bit products", WARNING, f"{probe}: wrong on this processor", mend)
            continue
        words = ", ".join(f"{key} = {value}" for key, value in settings.items())
        said = (
            f"exact with {words}, which opening an artifact sets; slower than with VNNI"
            if settings
            else "exact"
        )
        yield Finding("8-bit products", OK, f"{probe}: {said}")


def _memory() -> Finding:
    total, free = meminfo("MemTotal"), meminfo("MemAvailable")
    said = f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB of it available"
    return Finding("memory", OK, said + "; 'dllm-trt plan' says what a model needs")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    mend = (
        ""
        if free > 40 * GIB
        else "an 8 B model in bf16 takes 15 GiB, and as much again for its checkpoint (less with --weights "
        "link)"
    )
    return Finding(
        "disk",
        OK if free > 40 * GIB else WARNING,
        f"{free / GIB:.1f} GiB free in the current directory",
        mend,
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+", maxsplit=1)[0])[:3])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
