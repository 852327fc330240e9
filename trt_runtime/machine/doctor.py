"""`dllm-trt doctor`: what this machine can do, what is missing, and how to fix it. It changes nothing."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from trt_runtime.machine.devices import GIB, meminfo
from trt_runtime.machine.gpu_check import gpu_findings
from trt_runtime.machine.packages import (
    FAILURE,
    OK,
    WARNING,
    Finding,
    both_runtimes,
    first_line,
    package_finding,
    packages,
)
from trt_runtime.system import commands, processor

PYTHONS = ((3, 10), (3, 13))


def findings() -> Iterator[Finding]:
    """The results of all checks, the most important first."""
    yield _python()
    yield from _packages()
    yield from both_runtimes()
    yield from gpu_findings()
    yield from _providers()
    yield _processor()
    yield from _products()
    yield _memory()
    yield _disk()


def run(*, as_json: bool) -> tuple[str, bool, list[str]]:
    """The findings as text or JSON, whether the runtime can run here, and the fixes for what prevents it."""
    results = list(findings())
    fixes = [finding.mend for finding in results if finding.status == FAILURE]
    if as_json:
        report = {"healthy": not fixes, "findings": [asdict(finding) for finding in results]}
        return json.dumps(report, indent=1), not fixes, fixes
    return "\n".join([*map(str, results), "", summary(results)]), not fixes, fixes


def summary(results: list[Finding]) -> str:
    """A sentence: what this machine can do now."""
    good = {finding.what for finding in results if finding.status == OK}
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
    return f"This machine can: {', '.join(can) or 'nothing yet; fix the failures first'}."


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


# a ModelProto, opset 17: y = Identity(x), both float [1]
_IDENTITY = (
    b"\x08\x08\x3a\x37\x0a\x10\x0a\x01x\x12\x01y\x22\x08Identity\x12\x01g"
    b"\x5a\x0f\x0a\x01x\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01"
    b"\x62\x0f\x0a\x01y\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01\x42\x02\x10\x11"
)


def _providers() -> Iterator[Finding]:
    """The execution providers that a session really uses: ONNX Runtime falls back to the CPU silently."""
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
            got, said = [], f"listed, but no session opens: {first_line(error)}"
        mend = (
            f"install it again: {commands.package('--force-reinstall', 'onnxruntime')}"
            if name.startswith("CPU")
            else f"its libraries are missing or too old: install CUDA and cuDNN "
            f"({commands.package('onnxruntime-gpu[cuda,cudnn]')})"
        )
        yield Finding(f"provider {name}", OK if name in got else WARNING, said, "" if name in got else mend)


def _processor() -> Finding:
    sets = ", ".join(processor.instruction_sets()) or "unknown instruction sets"
    return Finding("processor", OK, f"{processor.name()}: {sets}")


def _products() -> Iterator[Finding]:
    """Whether 8-bit matrix products are exact here, and with which settings: measured
    (backends/ort/int8.py)."""
    try:
        from trt_runtime.backends.ort import int8
    except Exception:  # ONNX Runtime is missing or broken; the packages' findings say so
        return
    for probe in int8.PROBES:
        try:
            settings = int8.exact_with(probe)
        except Exception as error:  # onnxruntime raises several unrelated types
            said, mend = (
                f"{probe}: the test failed: {first_line(error)}",
                "install onnxruntime 1.24 or newer",
            )
            yield Finding("8-bit products", WARNING, said, mend)
            continue
        if settings is None:
            mend = "install another version of onnxruntime, or use artifacts that are not quantised"
            yield Finding("8-bit products", WARNING, f"{probe}: wrong results on this processor", mend)
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
