"""The packages that the runtime, the exporter and the engines need: the versions that are supported, and how
to install them."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from trt_runtime.system import commands

OK, ABSENT, WARNING, FAILURE = "ok", "absent", "warning", "failure"


@dataclass(frozen=True)
class Package:
    """A row of the support table: versions from `least` and below `below` are supported; `mend` is the
    command that installs it. needed: the runtime does not run without it."""

    name: str
    module: str
    least: str
    below: str
    purpose: str
    mend: str
    needed: bool = False
    others: tuple[str, ...] = ()  # other distributions that provide it


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
    """The result of one check. mend: what to do, if it is not ok."""

    what: str
    status: str
    said: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.status:8} {self.what:31} {self.said}" + (
            f"\n{'':40} -> {self.mend}" if self.mend else ""
        )


def package_finding(package: Package) -> Finding:
    """Whether a package's version is supported, and whether it can be imported."""
    version = next(filter(None, map(installed_version, (package.name, *package.others))), None)
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
        said = f"{version}, but its import fails: {type(error).__name__}: {first_line(error)}"
        return Finding(
            package.name, FAILURE if package.needed else WARNING, said, f"install it again: {package.mend}"
        )
    return Finding(package.name, OK, f"{version}; for: {package.purpose}")


def both_runtimes() -> Iterator[Finding]:
    if installed_version("onnxruntime") and installed_version("onnxruntime-gpu"):
        yield Finding(
            "onnxruntime",
            WARNING,
            "onnxruntime and onnxruntime-gpu are both installed: one hides the other",
            f"{commands.pip()} uninstall onnxruntime onnxruntime-gpu, then {commands.install('ort')} or "
            f"{commands.install('ort-gpu')}",
        )


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+", maxsplit=1)[0])[:3])


def first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
