"""Engines: which ones a layout needs, where they are kept, and whether one fits. What builds one graph is
builder.py.

Engines are a cache beside the artifact, never part of it: `OUT/<key>/NAME.engine` with an engine.json that
says in words what the key stands for, so that a mismatch can be explained. An engine file can run code: check
its hash before it is deserialised.

Layouts: `shared` is one engine of the refine graph with a profile for prefix passes and one for refine steps,
so that the weights are held once; `split` is an engine for each graph. The capacity of the cache is fixed in
an engine (TensorRT's cache update wants it).
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

from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.contract import MODERN
from trt_runtime.artifact.manifest import FileFacts, Manifest
from trt_runtime.backends import cuda
from trt_runtime.backends.tensorrt import builder, fused_attention
from trt_runtime.backends.tensorrt.builder import BuildJob, Profile, version_of
from trt_runtime.errors import DllmError, check_counts, unknown
from trt_runtime.optional import import_optional
from trt_runtime.system import atomic, commands

FILE_NAME, SUFFIX, TIMING = "engine.json", ".engine", "timing.cache"
ENGINE_LAYOUTS = SHARED, SPLIT = ("shared", "split")
SM_TARGETS = (
    "sm75",
    "sm80",
    "sm86",
    "sm89",
    "sm120",
    "sm121",
)  # compute capabilities that TensorRT-RTX builds for
PIECE = (
    256 << 20
)  # bytes of an engine's file that are in host memory at a time while it is opened (from TensorRT 10.7 on)
CAPACITY_STEP = (
    64  # rows of the cache come in steps of this: slots then begin at addresses that TensorRT takes
)
# the modules that a backend's package may be called, and the kind of extra that installs it
# (advice.by_driver)
_MODULES = {
    "tensorrt": (("tensorrt",), "trt"),
    "tensorrt-rtx": (("tensorrt_rtx", "tensorrt_rtx_bindings"), "rtx"),
}
# the first version of each that imports opset 24's Attention, RotaryEmbedding, RMSNormalization and
# TensorScatter
_MODERN_FROM = {"tensorrt": (10, 16), "tensorrt-rtx": (1, 7)}
_SINCE = {"strip": (10, 0), "plugins": (10, 16)}  # the first TensorRT that an option is written for
SCHEME_FROM = {"fp8": 89}  # the first compute capability that has a scheme's arithmetic
_LEAST = {"tensorrt": (8, 6), "tensorrt-rtx": (1, 7)}


@dataclass(frozen=True)
class BuildConfig:
    """What to build. Sizes: rows at a time, tokens of the longest canvas (the cache's capacity, rounded up),
    tokens of a block.

    max_rows: positions whose statistics one forward may ask for; None is block_length (a Dream without blocks
    asks for the canvas).
    targets: for TensorRT-RTX alone. optimization_level: 0 to 5; None is the builder's own. strip: leave the
    weights out, and put
    them in from the artifact when the engine is opened. plugins: kernels of plugins/ in the place of layers.
    inspect: also write what the builder made of each layer.
    """

    backend: str = "tensorrt"
    layout: str = SHARED
    targets: tuple[str, ...] = ()
    max_batch: int = 1
    max_length: int = 2048
    block_length: int = 32
    max_rows: int | None = None
    optimization_level: int | None = None
    strip: bool = False
    plugins: bool = False
    inspect: bool = False

    @property
    def capacity(self) -> int:
        return -(-self.max_length // CAPACITY_STEP) * CAPACITY_STEP

    def checked(self, manifest: Manifest) -> BuildConfig:
        """This configuration, with the canvas bounded by the model's. Raises DllmError."""
        for name, value, known in (
            ("backend", self.backend, tuple(_MODULES)),
            ("layout", self.layout, ENGINE_LAYOUTS),
        ):
            if value not in known:
                raise unknown(name, value, known)
        for target in self.targets:
            if target not in SM_TARGETS:
                raise unknown("target", target, SM_TARGETS)
        if self.targets and self.backend != "tensorrt-rtx":
            raise DllmError(
                f"--target {','.join(self.targets)} goes with --backend tensorrt-rtx: TensorRT builds for "
                f"its own GPU."
            )
        check_counts(self, "max_batch", "max_length", "block_length", "max_rows")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise DllmError(f"--optimization-level is {self.optimization_level}, expected 0 to 5.")
        for name in ("strip", "inspect"):
            if getattr(self, name) and self.backend != "tensorrt":
                raise DllmError(f"--{name} goes with --backend tensorrt: TensorRT-RTX is not asked to.")
        # a scheduler's slots are longer than the longest canvas by its spare rows
        length = min(self.max_length, manifest.model.max_length + contract.SPARE_ROWS)
        block = min(self.block_length, length)
        return replace(
            self, max_length=length, block_length=block, max_rows=min(self.max_rows or block, length)
        )


@dataclass(frozen=True)
class EnginePlan:
    """An engine to build: its name, the role whose graph it is, and its profiles in order."""

    name: str
    role: str
    profiles: tuple[Profile, ...]


def plans(config: BuildConfig) -> list[EnginePlan]:
    """The engines of a layout."""
    batch, block, rows = (1, 1, config.max_batch), config.block_length, config.max_rows or config.block_length
    whole = Profile("prefix", batch, (1, config.max_length, config.max_length), (1, min(block, rows), rows))
    window = Profile("refine", batch, (1, block, block), (1, min(block, rows), min(block, rows)))
    if config.layout == SHARED:
        return [EnginePlan(SHARED, "refine", (whole, window))]
    return [
        EnginePlan("prefix", "prefix", (whole,)),
        EnginePlan("refine", "refine", (window, replace(whole, name="suffix"))),
    ]


def load(backend: str) -> Any:
    """The package of a backend. Raises DllmError with what to install."""
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
    """What engines depend on beside their configuration: files, versions, and the GPU (None: built for named
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
    """All that an engine depends on, in words: what its key is made of. `kernels`: facts of the plugins."""
    return circumstances(manifest, config.backend, trt, gpu) | {
        "layout": config.layout,
        "targets": sorted(config.targets),
        "optimization_level": config.optimization_level,
        "capacity": config.capacity,
        "strip": config.strip,
        "inspect": config.inspect,
        "plugins": kernels or {},
        "workarounds": [item.why for item in builder.workarounds(config.backend, trt)],
        "profiles": {plan.name: [asdict(profile) for profile in plan.profiles] for plan in plans(config)},
    }


def key_of(description: dict[str, Any]) -> str:
    """The directory's name: a hash of the description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def build(
    artifact: Path, out: Path, config: BuildConfig, note: Callable[[str], object] = lambda text: None
) -> Path:
    """The engines of an artifact, built, or found if they are there already. Returns their directory; `note`
    is told what a user should know of engines that were built. Raises DllmError."""
    manifest = manifests.load(artifact, check_hashes=True)
    manifests.check_runs_on_gpu(manifest, str(artifact))
    config, trt = config.checked(manifest), load(config.backend)
    _check_version(manifest, config, trt)
    gpu = None if config.targets else _gpu(config)
    _check_scheme(
        manifest,
        [gpu.compute_capability] if gpu else [int(name.removeprefix("sm")) for name in config.targets],
    )
    edit, kernels, ptx = _plugins(manifest, config, gpu) if config.plugins and gpu else (None, {}, {})
    description = describe(manifest, config, trt, gpu, kernels)
    directory = out / key_of(description)
    if (directory / FILE_NAME).is_file():
        check(directory, description)
        return directory
    timing = out / f"{TIMING}-{trt.__version__}-sm{gpu.compute_capability if gpu else 0}"
    with atomic.sealed(directory) as made:
        seconds, attention = {}, {}
        for plan in plans(config):
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
                edit,
            )
            begin = time.perf_counter()
            kernels_of = _build_one(job, made / (plan.name + SUFFIX), manifest, config, trt, timing)
            seconds[plan.name], attention[plan.name] = (
                round(time.perf_counter() - begin, 2),
                fused_attention.as_list(kernels_of),
            )
            if complaint := fused_attention.complaint(kernels_of, manifest.model.dtype, plan.name):
                note(complaint)
        for name, text in ptx.items():
            (made / name).write_text(text, encoding="utf-8")
        files = {
            file.name: asdict(FileFacts(file.stat().st_size, manifests.sha256_of(file)))
            for file in sorted(made.iterdir())
        }
        facts = {
            "format": "dllm-trt engines",
            "format_version": 1,
            "built_for": description,
            "files": files,
            "seconds": seconds,
            "attention": attention,
        }
        (made / FILE_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return directory


def _build_one(
    job: BuildJob, file: Path, manifest: Manifest, config: BuildConfig, trt: Any, timing: Path
) -> dict[fused_attention.FusedKernel, int]:
    """Build an engine into a file; returns what became of its attention. `timing`: the timing cache, which is
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
    """What the engines were built for. Raises DllmError, naming the field, if that is something else, or a
    file was changed."""
    built_for, files = _read(directory)
    for name, expected in description.items():
        if built_for.get(name) != json.loads(json.dumps(expected)):
            raise DllmError(
                f"{directory}: its engines were built for {name} {built_for.get(name)}, wanted is "
                f"{expected}: build them again."
            )
    for name, facts in files.items():
        file = directory / name
        if (
            not file.is_file()
            or file.stat().st_size != facts.size
            or manifests.sha256_of(file) != facts.sha256
        ):
            raise DllmError(f"{file}: is missing or was changed since it was built: build the engines again.")
    return built_for


@dataclass(frozen=True)
class Needs:
    """What a caller wants of engines: rows at a time, tokens of the longest canvas, and the commit kernel."""

    batch: int = 1
    length: int = 1
    commit: bool = False


def find(root: Path, wanted: dict[str, Any], needs: Needs | None = None) -> Path:
    """The engines below `root` that fit `circumstances` and `needs`. Raises DllmError, saying what is there
    instead.

    Of several, those with kernels come first, then those for more rows at a time, then the shorter canvas.
    """
    needs, fitting, others = needs or Needs(), [], []
    for file in sorted(root.glob(f"*/{FILE_NAME}")):
        built_for, _ = _read(file.parent)
        targets, gpu = built_for.get("targets"), wanted.get("gpu")
        asked = dict(wanted)
        if targets and gpu and f"sm{gpu['compute_capability']}" in targets:
            del asked["gpu"]  # built for a kind of GPU, and this is one
        differing = [name for name, value in asked.items() if built_for.get(name) != value]
        batch = max(
            (profile["batch"][2] for listed in built_for["profiles"].values() for profile in listed),
            default=0,
        )
        sizes = (("max_batch", batch, needs.batch), ("capacity", built_for["capacity"], needs.length))
        differing += [f"{name} ({held}, asked for is {least})" for name, held, least in sizes if held < least]
        differing += (
            ["plugins (it has none)"] if needs.commit and "commit" not in built_for["plugins"] else []
        )
        if differing:
            others.append(f"{file.parent.name} is of another {', '.join(differing)}")
        else:
            fitting.append((bool(built_for["plugins"]), batch, -built_for["capacity"], file.parent))
    if not fitting:
        said = "; ".join(others[:3]) or "there are none"
        raise DllmError(
            f"{root}: no engines of this artifact for this machine ({said}): build them with 'dllm-trt "
            f"build'."
        )
    return max(fitting)[-1]


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, FileFacts]]:
    path = directory / FILE_NAME
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return dict(held["built_for"]), {str(k): FileFacts(**v) for k, v in held["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DllmError(f"{path}: not readable ({error}): build the engines again.") from error


def _check_version(manifest: Manifest, config: BuildConfig, trt: Any) -> None:
    version, least = version_of(trt), _MODERN_FROM[config.backend]
    if version < _LEAST[config.backend]:
        oldest = ".".join(map(str, _LEAST[config.backend]))
        raise DllmError(
            f"{config.backend} {trt.__version__} is too old, {oldest} is the oldest that can be used: "
            f"update it."
        )
    for name, since in _SINCE.items():
        if getattr(config, name) and config.backend == "tensorrt" and version < since:
            raise DllmError(
                f"--{name} needs TensorRT {'.'.join(map(str, since))}, installed is {trt.__version__}: "
                f"leave it out, or update."
            )
    if manifest.lowering == MODERN and version < least:
        raise DllmError(
            f"the artifact is of the modern lowering, which {config.backend} reads from "
            f"{'.'.join(map(str, least))} on; installed is "
            f"{trt.__version__}: update it, or export with --lowering legacy."
        )


def _check_scheme(manifest: Manifest, capabilities: list[int]) -> None:
    scheme = manifest.quantization.scheme if manifest.quantization else ""
    least = SCHEME_FROM.get(scheme, 0)
    if older := [capability for capability in capabilities if capability < least]:
        raise DllmError(
            f"the artifact is quantised with {scheme}, which GPUs compute from SM{least} on; this one is "
            f"SM{older[0]}: export it with "
            "--quantize int8-sq or int4 --target tensorrt."
        )


def _gpu(config: BuildConfig) -> cuda.Facts:
    try:
        return cuda.CudaDevice().facts
    except DllmError as error:
        known = f", or give --target ({', '.join(SM_TARGETS)})" if config.backend == "tensorrt-rtx" else ""
        raise DllmError(
            f"engines are built on the GPU that runs them: {str(error).rstrip('.')}{known}."
        ) from error


def _plugins(
    manifest: Manifest, config: BuildConfig, gpu: cuda.Facts
) -> tuple[Callable[[Any, Any], None] | None, dict[str, Any], dict[str, str]]:
    """What puts kernels into a parsed network, facts of all kernels with their hashes, and the files of those
    the runtime launches.

    TensorRT-RTX takes no plugins: its engines come with the commit kernel alone.
    """
    mend = commands.install("kernels")
    mask, target = manifest.decoding.mask_token_id, gpu.compute_capability
    commit = import_optional("plugins.commit", "--plugins", mend).compiled(mask, config.block_length, target)
    facts = {
        "commit": {
            "file": "commit.ptx",
            "entry": commit.name,
            "threads": commit.threads,
            "shared": commit.shared,
            "columns": config.block_length,
            "sha256": _hash(commit.ptx),
        }
    }
    if config.backend != "tensorrt":
        return None, facts, {"commit.ptx": commit.ptx}
    tool = import_optional("plugins.tensorrt_plugins", "--plugins", mend)
    statistics = tool.compiled(manifest.model.vocab_size, mask, target)

    def edit(network: Any, trt: Any) -> None:
        tool.replace_statistics(network, trt, mask, tool.plugin_layer(network, trt, target))

    facts["row_statistics"] = {"entry": statistics.name, "sha256": _hash(statistics.ptx)}
    return edit, facts, {"commit.ptx": commit.ptx}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _inspected(file: Path, trt: Any) -> str:
    """What the builder made of each layer, as JSON."""
    runtime = trt.Runtime(builder.Logger(trt).made)
    engine = runtime.deserialize_cuda_engine(file.read_bytes())
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
