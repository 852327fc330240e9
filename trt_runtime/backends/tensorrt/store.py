"""Where engines are stored, found and built. The builder of one graph is builder.py.

Engines are a cache next to the artifact, never part of it: `OUT/<key>/NAME.engine` with an engine.json that
lists what the key stands for, so that a mismatch can be explained. An engine file can run code: its hash is
checked before it is deserialised.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import FileFacts, Manifest
from trt_runtime.backends import cuda
from trt_runtime.backends.tensorrt import builder, fused_attention
from trt_runtime.backends.tensorrt.build_config import (
    CAPACITY_STEP,
    ENGINE_LAYOUTS,
    SCHEME_FROM,
    SHARED,
    SM_TARGETS,
    SPLIT,
    BuildConfig,
    check_scheme,
    check_version,
    plans,
)
from trt_runtime.backends.tensorrt.builder import BuildJob
from trt_runtime.backends.tensorrt.kernels import kernels_of
from trt_runtime.errors import DllmError
from trt_runtime.system import atomic, commands

# in addition to those defined here
__all__ = [
    "CAPACITY_STEP",
    "ENGINE_LAYOUTS",
    "SCHEME_FROM",
    "SHARED",
    "SM_TARGETS",
    "SPLIT",
    "BuildConfig",
    "plans",
    "replace",
]
FILE_NAME, SUFFIX, TIMING = "engine.json", ".engine", "timing.cache"
# bytes of an engine's file in host memory at a time while it is opened (from TensorRT 10.7)
PIECE = 256 << 20
# the modules that a backend's package may have, and the extra that installs it (advice.by_driver)
_MODULES = {
    "tensorrt": (("tensorrt",), "trt"),
    "tensorrt-rtx": (("tensorrt_rtx", "tensorrt_rtx_bindings"), "rtx"),
}


def load(backend: str) -> Any:
    """The package of a backend. Raises DllmError that says what to install."""
    modules, kind = _MODULES[backend]
    for name in modules:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            missing = error
    index = " (tensorrt is on NVIDIA's index)" if backend == "tensorrt" else ""
    raise DllmError(
        f"the backend '{backend}' needs a package that is missing ({missing}): "
        f"{commands.by_driver(kind)}{index}."
    )


def circumstances(manifest: Manifest, backend: str, trt: Any, gpu: cuda.Facts | None) -> dict[str, Any]:
    """What engines depend on besides their configuration: files, versions, and the GPU (None: built for named
    targets)."""
    files = {
        name: facts.sha256
        for name, facts in sorted(manifest.files.items())
        if not name.startswith("tokenizer/")
    }
    return {
        "backend": backend,
        "version": trt.__version__,
        "files": files,
        "gpu": asdict(gpu) if gpu else None,
    }


def describe(
    manifest: Manifest,
    config: BuildConfig,
    trt: Any,
    gpu: cuda.Facts | None = None,
    kernels: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything an engine depends on, in words: what its key is made from. kernels: facts about the
    plugins."""
    facts = manifest.decoding
    return circumstances(manifest, config.backend, trt, gpu) | {
        "layout": config.layout,
        "targets": sorted(config.targets),
        "optimization_level": config.optimization_level,
        "capacity": config.capacity,
        "strip": config.strip,
        "inspect": config.inspect,
        "plugins": kernels or {},
        "workarounds": [item.why for item in builder.workarounds(config.backend, trt)],
        "profiles": {
            plan.name: [asdict(profile) for profile in plan.profiles] for plan in plans(config, facts)
        },
    }


def key_of(description: dict[str, Any]) -> str:
    """The directory's name: a hash of the description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def build(
    artifact: Path, out: Path, config: BuildConfig, note: Callable[[str], object] = lambda text: None
) -> Path:
    """The directory with the engines of an artifact, which are built unless they exist. note: called with
    what a user should know about built engines. Raises DllmError."""
    manifest = manifests.load(artifact, check_hashes=True)
    manifests.check_runs_on_gpu(manifest, str(artifact))
    config, trt = config.checked(manifest), load(config.backend)
    check_version(manifest, config, trt)
    gpu = None if config.targets else _gpu(config)
    check_scheme(
        manifest,
        [gpu.compute_capability] if gpu else [int(name.removeprefix("sm")) for name in config.targets],
    )
    edit_of, kernels, ptx = kernels_of(artifact, manifest, config, gpu)
    description = describe(manifest, config, trt, gpu, kernels)
    directory = out / key_of(description)
    if (directory / FILE_NAME).is_file():
        check(directory, description)
        return directory
    timing = out / f"{TIMING}-{trt.__version__}-sm{gpu.compute_capability if gpu else 0}"
    with atomic.sealed(directory) as target:
        seconds, attention = {}, {}
        for plan in plans(config, manifest.decoding):
            job = BuildJob(
                plan.name,
                artifact / manifest.graphs[plan.role].file,
                plan.role,
                plan.profiles,
                config.capacity,
                config.targets,
                config.optimization_level,
                config.strip,
                config.inspect,
                edit_of(plan),
            )
            begin = time.perf_counter()
            fused = _build_one(job, target / (plan.name + SUFFIX), manifest, config, trt, timing)
            seconds[plan.name] = round(time.perf_counter() - begin, 2)
            attention[plan.name] = fused_attention.as_list(fused)
            complaint = fused_attention.complaint(fused, manifest.model.dtype, plan.name)
            if complaint and not config.replaces_attention(plan):
                note(complaint)
        for name, text in ptx.items():
            (target / name).write_text(text, encoding="utf-8")
        files = {
            file.name: asdict(FileFacts(file.stat().st_size, manifests.sha256_of(file)))
            for file in sorted(target.iterdir())
        }
        facts = {
            "format": "dllm-trt engines",
            "format_version": 1,
            "built_for": description,
            "files": files,
            "seconds": seconds,
            "attention": attention,
        }
        (target / FILE_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return directory


def _build_one(
    job: BuildJob, file: Path, manifest: Manifest, config: BuildConfig, trt: Any, timing: Path
) -> dict[fused_attention.FusedKernel, int]:
    """Build an engine into a file; returns its fused attention kernels. timing: the timing cache, which is
    read and replaced."""
    learnt = None if config.backend != "tensorrt" else timing.read_bytes() if timing.is_file() else b""
    engine, learnt = builder.serialised(job, manifest, config.backend, trt, learnt)
    file.write_bytes(engine)
    if learnt is not None:
        atomic.replace(timing, learnt)
    if config.inspect:
        file.with_suffix(".layers.json").write_text(_inspected(file, trt), encoding="utf-8")
    return fused_attention.found(engine)


def check(directory: Path, description: dict[str, Any]) -> dict[str, Any]:
    """What the engines were built for. Raises DllmError, naming the field, if that differs from
    `description`, or if a file is missing or changed."""
    built_for, files = _read(directory)
    for name, expected in description.items():
        if built_for.get(name) != json.loads(json.dumps(expected)):
            raise DllmError(
                f"{directory}: its engines were built for {name} {built_for.get(name)}, expected "
                f"{expected}: build them again."
            )
    for name, facts in files.items():
        file = directory / name
        if (
            not file.is_file()
            or file.stat().st_size != facts.size
            or manifests.sha256_of(file) != facts.sha256
        ):
            raise DllmError(f"{file}: missing, or changed since it was built: build the engines again.")
    return built_for


@dataclass(frozen=True)
class Needs:
    """What a caller needs of engines: rows per call, tokens of the longest canvas, and the commit kernel."""

    batch: int = 1
    length: int = 1
    commit: bool = False


def find(root: Path, wanted: dict[str, Any], needs: Needs | None = None) -> Path:
    """The engines below `root` that fit `circumstances` and `needs`. Raises DllmError, saying what is there
    instead. Preferred are engines with kernels, then those for more rows, then those for the shorter
    canvas."""
    needs, fitting, others = needs or Needs(), [], []
    for file in sorted(root.glob(f"*/{FILE_NAME}")):
        built_for, _ = _read(file.parent)
        targets, gpu = built_for.get("targets"), wanted.get("gpu")
        asked = dict(wanted)
        if targets and gpu and f"sm{gpu['compute_capability']}" in targets:
            del asked["gpu"]  # built for a kind of GPU, which this one is
        differing = [name for name, value in asked.items() if built_for.get(name) != value]
        batch = max(
            (profile["batch"][2] for listed in built_for["profiles"].values() for profile in listed),
            default=0,
        )
        sizes = (("max_batch", batch, needs.batch), ("capacity", built_for["capacity"], needs.length))
        differing += [
            f"{name} ({limit}, requested: {least})" for name, limit, least in sizes if limit < least
        ]
        differing += ["plugins (none built)"] if needs.commit and "commit" not in built_for["plugins"] else []
        if differing:
            others.append(f"{file.parent.name}, mismatch: {', '.join(differing)}")
        else:
            fitting.append((bool(built_for["plugins"]), batch, -built_for["capacity"], file.parent))
    if not fitting:
        said = "; ".join(others[:3]) or "none were built"
        raise DllmError(
            f"{root}: no engines of this artifact for this machine ({said}): build them with 'dllm-trt "
            f"build'."
        )
    return max(fitting)[-1]


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, FileFacts]]:
    path = directory / FILE_NAME
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return dict(facts["built_for"]), {str(k): FileFacts(**v) for k, v in facts["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DllmError(f"{path}: not readable ({error}): build the engines again.") from error


def _gpu(config: BuildConfig) -> cuda.Facts:
    try:
        return cuda.CudaDevice().facts
    except DllmError as error:
        known = f", or give --target ({', '.join(SM_TARGETS)})" if config.backend == "tensorrt-rtx" else ""
        raise DllmError(
            f"engines are built on the GPU that runs them: {str(error).rstrip('.')}{known}."
        ) from error


def _inspected(file: Path, trt: Any) -> str:
    """The builder's report on each layer, as JSON."""
    runtime = trt.Runtime(builder.Logger(trt).native)
    engine = runtime.deserialize_cuda_engine(file.read_bytes())
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
