"""ONNX -> engine: TensorRT on the device that will run it, TensorRT-RTX also without a GPU, for named targets.

Engines are a cache beside the artifact, never part of it: `OUT/<key>/NAME.engine` with an engine.json that says in words what the
key stands for, so that a mismatch can be explained. An engine file can run code: check its hash before it is deserialised.

Layouts: `shared` is one engine of the refine graph with a profile for prefix passes and one for refine steps, so that the weights are
held once; `split` is an engine for each graph. The capacity of the cache is fixed in an engine (TensorRT's cache update wants it).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trt_runtime import contract
from trt_runtime import manifest as manifests
from trt_runtime.contract import TensorSpec
from trt_runtime.errors import DllmError, unknown
from trt_runtime.manifest import FileFacts, Manifest

FILE_NAME, SUFFIX = "engine.json", ".engine"
LAYOUTS = ("shared", "split")
TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")  # compute capabilities that TensorRT-RTX builds for
# the modules that a backend's package may be called, and what to install
_MODULES = {
    "tensorrt": (("tensorrt",), "pip install tensorrt (from NVIDIA's index)"),
    "tensorrt-rtx": (("tensorrt_rtx", "tensorrt_rtx_bindings"), "pip install tensorrt-rtx"),
}
# the first version of each that imports opset 24's Attention, RotaryEmbedding, RMSNormalization and TensorScatter
_MODERN_FROM = {"tensorrt": (10, 16), "tensorrt-rtx": (1, 7)}


@dataclass(frozen=True)
class BuildConfig:
    """What to build. Sizes: rows at a time, tokens of the longest canvas (the cache's capacity), tokens of a block.

    targets: for TensorRT-RTX alone. optimization_level: 0 to 5; None is the builder's own.
    """

    backend: str = "tensorrt"
    layout: str = "shared"
    targets: tuple[str, ...] = ()
    max_batch: int = 1
    max_length: int = 2048
    block_length: int = 32
    optimization_level: int | None = None

    def checked(self, manifest: Manifest) -> BuildConfig:
        """This configuration, with the canvas bounded by the model's. Raises DllmError."""
        for name, value, known in (("backend", self.backend, tuple(_MODULES)), ("layout", self.layout, LAYOUTS)):
            if value not in known:
                raise unknown(name, value, known)
        for target in self.targets:
            if target not in TARGETS:
                raise unknown("target", target, TARGETS)
        if self.targets and self.backend != "tensorrt-rtx":
            raise DllmError(
                f"--target {','.join(self.targets)} goes with --backend tensorrt-rtx: TensorRT builds for its own GPU."
            )
        for name in ("max_batch", "max_length", "block_length"):
            if getattr(self, name) < 1:
                raise DllmError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected a whole number from 1.")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise DllmError(f"--optimization-level is {self.optimization_level}, expected 0 to 5.")
        length = min(self.max_length, manifest.model.max_length)
        return replace(self, max_length=length, block_length=min(self.block_length, length))


@dataclass(frozen=True)
class Profile:
    """A range of shapes: (least, usual, most) of B, S and R."""

    name: str
    batch: tuple[int, int, int]
    rows: tuple[int, int, int]
    asked: tuple[int, int, int]

    def shapes(self, spec: TensorSpec, capacity: int) -> list[tuple[int, ...]]:
        """The least, usual and most of an input's axes."""
        made = []
        for i in range(3):
            sizes = {"B": self.batch[i], "S": self.rows[i], "R": self.asked[i], "C": capacity}
            made.append(tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes))
        return made


@dataclass(frozen=True)
class EnginePlan:
    """An engine to build: its name, the role whose graph it is, and its profiles in order."""

    name: str
    role: str
    profiles: tuple[Profile, ...]


def plans(config: BuildConfig) -> list[EnginePlan]:
    """The engines of a layout."""
    batch, block = (1, 1, config.max_batch), config.block_length
    whole = Profile("prefix", batch, (1, config.max_length, config.max_length), (1, block, block))
    window = Profile("refine", batch, (1, block, block), (1, block, block))
    if config.layout == "shared":
        return [EnginePlan("shared", "refine", (whole, window))]
    return [EnginePlan("prefix", "prefix", (whole,)), EnginePlan("refine", "refine", (window, replace(whole, name="suffix")))]


def load(backend: str) -> Any:
    """The package of a backend. Raises DllmError with what to install."""
    modules, advice = _MODULES[backend]
    for name in modules:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            missing = error
    raise DllmError(f"the backend '{backend}' needs a package that is missing ({missing}): {advice}.")


def describe(manifest: Manifest, config: BuildConfig, trt: Any) -> dict[str, Any]:
    """All that an engine depends on, in words: what its key is made of."""
    described = {name: facts.sha256 for name, facts in sorted(manifest.files.items()) if not name.startswith("tokenizer/")}
    return {
        "backend": config.backend, "version": trt.__version__, "layout": config.layout, "targets": sorted(config.targets),
        "files": described, "optimization_level": config.optimization_level, "capacity": config.max_length,
        "profiles": {plan.name: [asdict(profile) for profile in plan.profiles] for plan in plans(config)},
    }  # fmt: skip


def key_of(description: dict[str, Any]) -> str:
    """The directory's name: a hash of the description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def build(artifact: Path, out: Path, config: BuildConfig) -> Path:
    """The engines of an artifact, built, or found if they are there already. Returns their directory. Raises DllmError."""
    manifest = manifests.load(artifact, check_hashes=True)
    config, trt = config.checked(manifest), load(config.backend)
    _check_lowering(manifest, config, trt)
    description = describe(manifest, config, trt)
    directory = out / key_of(description)
    if (directory / FILE_NAME).is_file():
        check(directory, description)
        return directory
    with manifests.sealed(directory) as made:
        seconds = {}
        for plan in plans(config):
            begin = time.perf_counter()
            (made / (plan.name + SUFFIX)).write_bytes(_serialised(artifact, manifest, plan, config, trt))
            seconds[plan.name] = round(time.perf_counter() - begin, 2)
        files = {file.name: asdict(FileFacts(file.stat().st_size, manifests.sha256_of(file))) for file in sorted(made.iterdir())}
        facts = {"format": "dllm-trt engines", "format_version": 1, "built_for": description, "files": files, "seconds": seconds}
        (made / FILE_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return directory


def check(directory: Path, description: dict[str, Any]) -> None:
    """Raise DllmError, naming the field, if the engines were built for something else, or a file was changed."""
    path = directory / FILE_NAME
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        built_for, files = dict(held["built_for"]), {str(k): FileFacts(**v) for k, v in held["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DllmError(f"{path}: not readable ({error}): build the engines again.") from error
    for name, expected in description.items():
        if built_for.get(name) != json.loads(json.dumps(expected)):
            raise DllmError(
                f"{directory}: its engines were built for {name} {built_for.get(name)}, wanted is {expected}: build them again."
            )
    for name, facts in files.items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != facts.size or manifests.sha256_of(file) != facts.sha256:
            raise DllmError(f"{file}: is missing or was changed since it was built: build the engines again.")


def _check_lowering(manifest: Manifest, config: BuildConfig, trt: Any) -> None:
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    least = _MODERN_FROM[config.backend]
    if manifest.lowering == "modern" and version < least:
        raise DllmError(
            f"the artifact is of the modern lowering, which {config.backend} reads from {'.'.join(map(str, least))} on; installed is "
            f"{trt.__version__}: update it, or export with --lowering legacy."
        )


def _serialised(artifact: Path, manifest: Manifest, plan: EnginePlan, config: BuildConfig, trt: Any) -> Any:
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    graph = artifact / manifest.graphs[plan.role].file
    if not parser.parse(_with_capacity(graph, config.max_length), str(graph)):
        said = "; ".join(str(parser.get_error(i).desc()).splitlines()[0] for i in range(min(3, parser.num_errors)))
        raise DllmError(f"{graph}: {config.backend} {trt.__version__} does not read it ({said}): export with --lowering legacy.")
    specs = contract.inputs(plan.role, manifest.dims)
    check_inputs(network, [spec.name for spec in specs], graph)
    if manifest.model.dtype == "fp32":
        _decompose_attention(network, trt)
    settings = builder.create_builder_config()
    for index, target in enumerate(config.targets):
        settings.num_compute_capabilities = len(config.targets)
        settings.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    if config.optimization_level is not None:
        settings.builder_optimization_level = config.optimization_level
    for profile in plan.profiles:
        shapes = builder.create_optimization_profile()
        for spec in specs:
            shapes.set_shape(spec.name, *profile.shapes(spec, config.max_length))
        settings.add_optimization_profile(shapes)
    settings.progress_monitor = monitor = _monitor(trt, plan.name)
    engine = builder.build_serialized_network(network, settings)
    monitor.end()
    if engine is None:
        raise DllmError(f"{graph}: {config.backend} {trt.__version__} did not build it ({logger.last or 'no message'}).")
    return engine


def check_inputs(network: Any, expected: list[str], graph: Path) -> None:
    """Raise DllmError for an input on which no output depends: that is how a parser ignores what it does not understand."""
    held = [network.get_input(i).name for i in range(network.num_inputs)]
    if held != expected:
        raise DllmError(f"{graph}: has the inputs {held}, the contract says {expected}: export it again.")
    maker = {layer.get_output(k).name: layer for layer in _layers(network) for k in range(layer.num_outputs)}
    read, waiting = set[str](), [network.get_output(i).name for i in range(network.num_outputs)]
    while waiting:  # backwards from the outputs: layers that nothing needs do not count
        name = waiting.pop()
        if name in read:
            continue
        read.add(name)
        if name in maker:
            layer = maker[name]
            waiting += [tensor.name for k in range(layer.num_inputs) if (tensor := layer.get_input(k)) is not None]
    if ignored := [name for name in held if name not in read]:
        raise DllmError(f"{graph}: no output depends on the input {', '.join(ignored)}: the engine would compute something else.")


def _with_capacity(graph: Path, capacity: int) -> bytes:
    """The graph with the cache's capacity C written in: a cache update wants it static before it is parsed."""
    try:
        import onnx
    except ImportError as error:
        raise DllmError("building engines needs the onnx package: pip install onnx.") from error
    model = onnx.load(graph, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "C":
                dim.dim_value = capacity
    data: bytes = model.SerializeToString()
    return data


def _decompose_attention(network: Any, trt: Any) -> None:
    """fp32 attention has no fused kernel: allow the builder to take it apart."""
    for layer in _layers(network):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _layers(network: Any) -> Iterator[Any]:
    for i in range(network.num_layers):
        yield network.get_layer(i)


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the last error, and prints nothing: errors become a DllmError."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and "CUDA driver version" not in message:
                self.last = message

    return Logger()


def _monitor(trt: Any, name: str) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """The builder's outermost phase as a line on a terminal."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps and sys.stderr.isatty():
                print(f"\r{name}: {phase} {100 * step // max(1, self.steps[phase])} %\x1b[K", end="", file=sys.stderr)
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

        def end(self) -> None:
            if sys.stderr.isatty():
                print("\r\x1b[K", end="", file=sys.stderr)

    return Monitor()
