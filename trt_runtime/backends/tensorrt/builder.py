"""One ONNX graph -> the bytes of one TensorRT engine: parse, check that nothing was ignored, apply what a
version needs, build.

What versions need is a table (WORKAROUNDS), not branches: each entry says where it applies and why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_runtime.artifact import contract
from trt_runtime.artifact.contract import TensorSpec
from trt_runtime.artifact.manifest import Manifest
from trt_runtime.errors import DllmError
from trt_runtime.system import commands

Version = tuple[int, int]
Edit = Callable[[Any, Any], None]  # of a parsed network, and the package
_LATEST: Version = (999, 0)


@dataclass(frozen=True)
class Profile:
    """A range of shapes: (smallest, usual, largest) of B, S and R."""

    name: str
    batch: tuple[int, int, int]
    rows: tuple[int, int, int]
    asked: tuple[int, int, int]

    @property
    def largest(self) -> tuple[int, int, int]:
        """The largest B, S and R."""
        return self.batch[2], self.rows[2], self.asked[2]

    def shapes(self, spec: TensorSpec, capacity: int) -> list[tuple[int, ...]]:
        """The smallest, usual and largest sizes of an input's axes."""
        bounds = []
        for i in range(3):
            sizes = {"B": self.batch[i], "S": self.rows[i], "R": self.asked[i], "C": capacity}
            bounds.append(tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes))
        return bounds


@dataclass(frozen=True)
class BuildJob:
    """What to build from a graph. edit: may change the parsed network (kernels that replace layers)."""

    name: str
    graph: Path
    role: str
    profiles: tuple[Profile, ...]
    capacity: int
    targets: tuple[str, ...] = ()
    optimization_level: int | None = None
    strip: bool = False
    inspect: bool = False
    edit: Edit | None = None


@dataclass(frozen=True)
class Workaround:
    """What some versions of a package need: `apply(trt, network, settings, dtype)`, if since <= version <
    before."""

    why: str
    apply: Callable[[Any, Any, Any, str], None]
    package: str = "tensorrt"
    since: Version = (0, 0)
    before: Version = _LATEST

    def covers(self, package: str, version: Version) -> bool:
        return package == self.package and self.since <= version < self.before


def version_of(trt: Any) -> Version:
    """Major and minor."""
    major, minor = trt.__version__.split(".")[:2]
    return int(major), int(minor)


def workarounds(package: str, trt: Any) -> list[Workaround]:
    """The entries of the table that apply to the installed package."""
    return [item for item in WORKAROUNDS if item.covers(package, version_of(trt))]


def serialised(
    job: BuildJob, manifest: Manifest, package: str, trt: Any, timing: bytes | None = None
) -> tuple[Any, bytes | None]:
    """The bytes of the engine and of the timing cache (timing: that of an earlier build, b"" for none).
    Raises DllmError."""
    logger = Logger(trt)
    builder = trt.Builder(logger.native)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger.native)
    if not parser.parse(with_capacity(job.graph, job.capacity), str(job.graph)):
        said = "; ".join(
            str(parser.get_error(i).desc()).splitlines()[0] for i in range(min(3, parser.num_errors))
        )
        raise DllmError(
            f"{job.graph}: {package} {trt.__version__} cannot parse it ({said}): export with --lowering "
            f"legacy."
        )
    specs = contract.inputs(job.role, manifest.dims)
    check_inputs(network, [spec.name for spec in specs], job.graph)
    if job.edit is not None:
        job.edit(network, trt)
    settings = builder.create_builder_config()
    for item in workarounds(package, trt):
        item.apply(trt, network, settings, manifest.model.dtype)
    _configure(job, specs, builder, settings, trt)
    if timing is not None and not settings.set_timing_cache(settings.create_timing_cache(timing), False):
        settings.set_timing_cache(
            settings.create_timing_cache(b""), False
        )  # that one came from another GPU or version
    monitor = _monitor(trt, job.name)
    if monitor is not None:
        settings.progress_monitor = monitor
    engine = builder.build_serialized_network(network, settings)
    if monitor is not None:
        monitor.end()
    if engine is None:
        raise DllmError(
            f"{job.graph}: {package} {trt.__version__} could not build it ({logger.last or 'no message'})."
        )
    learnt = settings.get_timing_cache() if timing is not None else None
    return engine, None if learnt is None else bytes(learnt.serialize())


def network_flags(trt: Any) -> int:
    """Strongly typed from TensorRT 10; before, explicit batch, with types set by the workarounds."""
    known = trt.NetworkDefinitionCreationFlag
    flag = known.STRONGLY_TYPED if hasattr(known, "STRONGLY_TYPED") else known.EXPLICIT_BATCH
    return 1 << int(flag)


def _configure(job: BuildJob, specs: Sequence[TensorSpec], builder: Any, settings: Any, trt: Any) -> None:
    for index, target in enumerate(job.targets):
        settings.num_compute_capabilities = len(job.targets)
        settings.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    if job.optimization_level is not None:
        settings.builder_optimization_level = job.optimization_level
    if job.strip:
        settings.set_flag(trt.BuilderFlag.STRIP_PLAN)
        settings.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if job.inspect:
        settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in job.profiles:
        shapes = builder.create_optimization_profile()
        for spec in specs:
            shapes.set_shape(spec.name, *profile.shapes(spec, job.capacity))
        settings.add_optimization_profile(shapes)


def check_inputs(network: Any, expected: list[str], graph: Path) -> None:
    """Raise DllmError for an input that no output depends on: a sign that the parser ignored something."""
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    if inputs != expected:
        raise DllmError(f"{graph}: the inputs are {inputs}, expected {expected}: export it again.")
    maker = {layer.get_output(k).name: layer for layer in _layers(network) for k in range(layer.num_outputs)}
    read, waiting = set[str](), [network.get_output(i).name for i in range(network.num_outputs)]
    while waiting:  # backwards from the outputs, because unused layers do not count
        name = waiting.pop()
        if name in read:
            continue
        read.add(name)
        if name in maker:
            layer = maker[name]
            waiting += [
                tensor.name for k in range(layer.num_inputs) if (tensor := layer.get_input(k)) is not None
            ]
    if ignored := [name for name in inputs if name not in read]:
        raise DllmError(
            f"{graph}: no output depends on the input {', '.join(ignored)}: the engine would compute "
            f"something else."
        )


def with_capacity(graph: Path, capacity: int) -> bytes:
    """The graph with a fixed capacity C of the cache, because a cache update needs it to be static when it is
    parsed."""
    try:
        import onnx
    except ImportError as error:
        raise DllmError(f"building engines needs the onnx package: {commands.package('onnx')}.") from error
    model = onnx.load(graph, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "C":
                dim.dim_value = capacity
    data: bytes = model.SerializeToString()
    return data


def _decompose_attention(trt: Any, network: Any, settings: Any, dtype: str) -> None:
    for layer in _layers(network):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _user_allocation(trt: Any, network: Any, settings: Any, dtype: str) -> None:
    settings.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def _no_tf32(trt: Any, network: Any, settings: Any, dtype: str) -> None:
    if dtype == "fp32":
        settings.clear_flag(trt.BuilderFlag.TF32)


def _types_by_flags(trt: Any, network: Any, settings: Any, dtype: str) -> None:
    if dtype == "bf16":
        raise DllmError(
            f"TensorRT {trt.__version__} has no bf16 networks: export with DTYPE=fp16, or use TensorRT 10."
        )
    if dtype == "fp16":
        settings.set_flag(trt.BuilderFlag.FP16)
    settings.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    settings.clear_flag(trt.BuilderFlag.TF32)
    kinds = (trt.float32, trt.float16)
    for layer in _layers(
        network
    ):  # what the graph computes in float32 stays in float32: norms, the head, the statistics
        types = [layer.get_output(k).dtype for k in range(layer.num_outputs)]
        if types and types[0] in kinds and layer.type not in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE):
            layer.precision = types[0]
            for k, kind in enumerate(types):
                layer.set_output_type(k, kind)


def _no_cublas(trt: Any, network: Any, settings: Any, dtype: str) -> None:
    without = (trt.TacticSource.CUBLAS, trt.TacticSource.CUBLAS_LT, trt.TacticSource.CUDNN)
    settings.set_tactic_sources(settings.get_tactic_sources() & ~sum(1 << int(source) for source in without))


_FUSED = "attention without a fused kernel may be decomposed; otherwise the build fails"
_EXACT = (
    "by default fp32 products are rounded to TF32, which is too coarse for an fp32 model (16-bit numbers fit "
    "TF32 exactly)"
)
WORKAROUNDS = (
    Workaround(_FUSED, _decompose_attention, since=(10, 16)),
    Workaround(_FUSED, _decompose_attention, package="tensorrt-rtx", since=(1, 7)),
    Workaround(_EXACT, _no_tf32, since=(10, 0)),
    Workaround(_EXACT, _no_tf32, package="tensorrt-rtx", since=(1, 7)),
    Workaround(
        "CUDA graphs need working memory that the caller allocates",
        _user_allocation,
        package="tensorrt-rtx",
        since=(1, 7),
    ),
    Workaround("networks are not strongly typed: types are constraints", _types_by_flags, before=(10, 0)),
    Workaround("cuBLAS and cuDNN are not needed, and may be missing", _no_cublas, before=(10, 0)),
)


def _layers(network: Any) -> Iterator[Any]:
    for i in range(network.num_layers):
        yield network.get_layer(i)


class Logger:
    """TensorRT's logger (`native`): keeps the last error and prints nothing, because errors become a
    DllmError."""

    def __init__(self, trt: Any) -> None:
        outer = self
        self.last = ""

        class NativeLogger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if (
                    severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
                    and "CUDA driver version" not in message
                ):
                    outer.last = message

        self.native = NativeLogger()


def _monitor(trt: Any, name: str) -> Any:
    """The builder's outermost phase as a line on a terminal; None before TensorRT 10, which does not report
    progress."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps and sys.stderr.isatty():
                print(
                    f"\r{name}: {phase} {100 * step // max(1, self.steps[phase])} %\x1b[K",
                    end="",
                    file=sys.stderr,
                )
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

        def end(self) -> None:
            if sys.stderr.isatty():
                print("\r\x1b[K", end="", file=sys.stderr)

    return Monitor()
