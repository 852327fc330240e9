"""Stand-ins for TensorRT: packages whose networks TensorRT-RTX parses and whose engines ONNX Runtime's CPU
runs, over the stand-in for CUDA.

They hold the code to the rules of the real ones: shapes within profiles, aligned addresses, caches in place,
no capture of a context whose shapes changed since its last run, no replay after the context was changed.
"""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from stand_in_cuda import ALIGNMENT, Cuda, view

_KINDS = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


class Context:
    """An execution context over one ONNX Runtime session."""

    def __init__(self, engine) -> None:
        self.engine, self.cuda = engine, engine.cuda
        self.profile: int | None = None
        self.shapes: dict = {}
        self.addresses: dict = {}
        self.scratch = 0
        self.is_settled = False

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return 0 <= index < self.engine.num_optimization_profiles

    def set_device_memory(self, address, size):
        assert self.cuda.holds("device", address, size) and size >= 1000
        self.scratch = size

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(least) or not all(
            low <= n <= high for low, n, high in zip(least, shape, most, strict=True)
        ):
            return False
        self.is_settled &= self.shapes.get(name) == shape
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return name in self.engine.kinds and address % ALIGNMENT == 0

    def execute_async_v3(self, stream):
        engine = self.engine
        if (
            set(self.addresses) != set(engine.kinds)
            or set(self.shapes) != set(engine.inputs)
            or not self.scratch
        ):
            return False
        if self.cuda.captured is not None and not self.is_settled:
            return False  # TensorRT asks for a run after a change of shapes before a capture
        for name in engine.inputs:
            if name.startswith("cache_") and name.replace("cache_", "updated_") in engine.kinds:
                assert self.addresses[name.replace("cache_", "updated_")] == self.addresses[name], (
                    "not in place"
                )
        self.is_settled = True
        if self.cuda.captured is not None:
            held = (dict(self.shapes), dict(self.addresses))

            def unchanged():
                assert (self.shapes, self.addresses) == held, (
                    "a graph is replayed after its context was changed"
                )

            self.cuda._queued(unchanged)
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.cuda._queued(lambda: engine.run(shapes, addresses))
        return True


class Engine:
    """A deserialised engine: `text` is what the stand-in builder wrote, the graph's path and the shapes of
    each profile."""

    def __init__(self, cuda: Cuda, graph: str, profiles: list[dict]) -> None:
        self.cuda, self.profiles, self.num_optimization_profiles = cuda, profiles, len(profiles)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4  # the CPU copies caches, and says so
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(Path(graph).parent)
        )
        model = onnx.load(graph, load_external_data=False)
        self.session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        both = (*self.session.get_inputs(), *self.session.get_outputs())
        self.kinds = {value.name: np.dtype(_KINDS[value.type]) for value in both}
        self.num_io_tensors = len(self.kinds)

    def get_tensor_name(self, index):
        return list(self.kinds)[index]

    def get_tensor_dtype(self, name):
        return self.kinds[name]

    def get_tensor_profile_shape(self, name, index):
        return self.profiles[index][name]

    def get_device_memory_size_for_profile_v2(self, index):
        return 1000 * (index + 1)

    def create_execution_context(self, given):
        """By an allocation strategy, or, as TensorRT-RTX has it, by a runtime configuration."""
        made = Context(self)
        if isinstance(given, RuntimeConfig):
            assert given.strategy.name == "USER_MANAGED" and given.cache is not None
            made.graphs = given.cuda_graph_strategy.name
        return made

    def create_runtime_config(self):
        return RuntimeConfig()

    def run(self, shapes, addresses):
        self.cuda.executions += 1
        given = {name: view(addresses[name], shapes[name], self.kinds[name]).copy() for name in self.inputs}
        for name, made in zip(self.outputs, self.session.run(self.outputs, given), strict=True):
            assert self.cuda.holds("device", addresses[name], made.nbytes), name
            view(addresses[name], made.shape, self.kinds[name])[...] = made


class RuntimeCache:
    """What TensorRT-RTX compiled: a byte for every context that ran with it."""

    def __init__(self):
        self.data = b""

    def deserialize(self, data):
        if data.strip(b"k"):
            return False
        self.data = data
        return True

    def serialize(self):
        return self.data + b"k"

    def reset(self):
        self.data = b""


class RuntimeConfig:
    strategy = cache = cuda_graph_strategy = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return RuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


SOURCES86 = {"CUBLAS": 0, "CUBLAS_LT": 1, "CUDNN": 2, "JIT_CONVOLUTIONS": 4}


class Shapes:
    def __init__(self):
        self.held = {}

    def set_shape(self, name, *shapes):
        self.held[name] = shapes


class Settings:
    def __init__(self):
        self.profiles, self.flags, self.timing, self.verbosity = [], [], b"", None

    def __setattr__(self, name, value):
        object.__setattr__(
            self,
            "verbosity" if name == "profiling_verbosity" else name,
            str(value) if name == "profiling_verbosity" else value,
        )

    def add_optimization_profile(self, shapes):
        self.profiles.append(shapes.held)

    def set_flag(self, flag):
        self.flags.append(flag.name)

    def clear_flag(self, flag):
        self.flags = [name for name in self.flags if name != flag.name] + [f"no {flag.name}"]

    def create_timing_cache(self, data):
        return types.SimpleNamespace(data=data)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        if cache.data.strip(b"+"):
            return False
        self.timing = cache.data
        return True

    def get_timing_cache(self):
        return types.SimpleNamespace(serialize=lambda: self.timing)


class Refitter:
    def __init__(self, engine, logger):
        self.engine = engine

    def refit_cuda_engine(self):
        return not self.engine.stripped


class ParserRefitter:
    def __init__(self, refitter, logger):
        self.refitter = refitter

    def refit_from_bytes(self, data, path):
        assert data and Path(path).is_file()
        self.refitter.engine.stripped = False
        return True


class Layer86:
    def __init__(self, real):
        self.real, self.precision, self.types = real, None, {}

    def __getattr__(self, name):
        return getattr(self.real, name)

    def set_output_type(self, index, kind):
        self.types[index] = kind


class Network86:
    def __init__(self, real):
        self.real, self.layers = real, {}

    def __getattr__(self, name):
        return getattr(self.real, name)

    def get_layer(self, index):
        return self.layers.setdefault(index, Layer86(self.real.get_layer(index)))


class Settings86:
    sources_set = None

    def __init__(self, held):
        self.held, self.cleared = held, []

    def __getattr__(self, name):
        return getattr(self.held, name)

    def clear_flag(self, flag):
        self.cleared.append(flag)

    def get_tactic_sources(self):
        return sum(1 << bit for bit in SOURCES86.values())

    def set_tactic_sources(self, kept):
        Settings86.sources_set = kept


class Engine86(Engine):
    def __init__(self, newer):
        self.__dict__.update(newer.__dict__)
        self.kinds = {
            name: np.dtype(np.int32) if kind == np.int64 else kind for name, kind in newer.kinds.items()
        }
        self.device_memory_size = 1000

    def __getattribute__(self, name):
        if name in ("create_execution_context", "get_device_memory_size_for_profile_v2"):
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def create_execution_context_without_device_memory(self):
        return Context86(self)

    def run(self, shapes, addresses):
        given = {name: view(addresses[name], shapes[name], self.kinds[name]).copy() for name in self.inputs}
        wide = {
            name: array.astype(np.int64) if array.dtype == np.int32 else array
            for name, array in given.items()
        }
        for name, made in zip(self.outputs, self.session.run(self.outputs, wide), strict=True):
            view(addresses[name], made.shape, self.kinds[name])[...] = made


class Context86(Context):
    def __getattribute__(self, name):
        if name == "set_device_memory":
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def __setattr__(self, name, value):
        object.__setattr__(self, "scratch" if name == "device_memory" else name, value)


def pieces(reader):
    """What a stream reader gives: as TensorRT reads, a header, then the whole, in as many calls as the reader
    needs."""
    header = reader.read(16, 0)
    assert len(header) == 16 and reader.seek(0, reader.where.SET)
    while piece := reader.read(1 << 40, 0):
        yield piece


def tensorrt(cuda: Cuda, rtx):
    """A package `tensorrt` that parses as TensorRT-RTX does, and whose engines are those above. `rtx`:
    tensorrt_rtx_bindings."""

    class Builder:
        def __init__(self, logger):
            self.real, self.profiles = rtx.Builder(logger), []

        def create_network(self, flags):
            return self.real.create_network(flags)

        def create_optimization_profile(self):
            return Shapes()

        def create_builder_config(self):
            return Settings()

        def build_serialized_network(self, network, settings):
            facts = {
                "graph": Parser.graph,
                "profiles": settings.profiles,
                "flags": settings.flags,
                "verbosity": settings.verbosity,
            }
            settings.timing += b"+"
            return json.dumps(facts).encode()

    class Parser:
        graph = ""

        def __init__(self, network, logger):
            self.real = rtx.OnnxParser(network, logger)

        def __getattr__(self, name):
            return getattr(self.real, name)

        def parse(self, data, path):
            Parser.graph = path
            return self.real.parse(data, path)

    class Runtime:
        def __init__(self, logger):
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, given):
            assert not self.engine_host_code_allowed
            facts = json.loads(given if isinstance(given, bytes) else b"".join(pieces(given)))
            opened = Engine(cuda, facts["graph"], facts["profiles"])
            opened.stripped = "STRIP_PLAN" in facts["flags"]
            opened.create_engine_inspector = lambda: types.SimpleNamespace(
                get_engine_information=lambda kind: json.dumps(
                    {"Layers": [], "verbosity": facts["verbosity"]}
                )
            )
            return opened

    held = {
        name: getattr(rtx, name)
        for name in (
            "ILogger",
            "IProgressMonitor",
            "NetworkDefinitionCreationFlag",
            "BuilderFlag",
            "ProfilingVerbosity",
            "LayerType",
            "ExecutionContextAllocationStrategy",
            "LayerInformationFormat",
            "IAttentionInputLayer",
            "SeekPosition",
        )
    }

    class StreamReader:  # the real one is not made without a driver
        where = rtx.SeekPosition

        def __init__(self):
            pass

    held |= {"IStreamReaderV2": StreamReader}
    return types.SimpleNamespace(
        **held,
        Builder=Builder,
        OnnxParser=Parser,
        Runtime=Runtime,
        Refitter=Refitter,
        OnnxParserRefitter=ParserRefitter,
        nptype=lambda kind: kind,
        __version__="11.4.0.106",
    )


def tensorrt86(cuda: Cuda, rtx):
    """The same as TensorRT 8.6 has it: types by constraints, int32 for int64, no progress, contexts by their
    older names."""
    package = tensorrt(cuda, rtx)
    newer_runtime, newer_builder, newer_parser = package.Runtime, package.Builder, package.OnnxParser

    class Builder:
        def __init__(self, logger):
            self.newer = newer_builder(logger)

        def __getattr__(self, name):
            return getattr(self.newer, name)

        def create_network(self, flags):
            assert flags == 1
            package.last_network = Network86(
                self.newer.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            )
            return package.last_network

        def create_builder_config(self):
            return Settings86(self.newer.create_builder_config())

    def parser(network, logger):
        return newer_parser(network.real, logger)

    class Runtime(newer_runtime):
        def deserialize_cuda_engine(self, data):
            return Engine86(super().deserialize_cuda_engine(data))

    flags = ("FP16", "OBEY_PRECISION_CONSTRAINTS", "TF32")
    for name in (
        "IProgressMonitor",
        "ExecutionContextAllocationStrategy",
        "OnnxParserRefitter",
        "IStreamReaderV2",
    ):
        delattr(package, name)
    vars(package).update(
        Builder=Builder,
        OnnxParser=parser,
        Runtime=Runtime,
        Settings=Settings86,
        __version__="8.6.1",
        float32=rtx.float32,
        float16=rtx.float16,
        NetworkDefinitionCreationFlag=types.SimpleNamespace(EXPLICIT_BATCH=0),
        BuilderFlag=types.SimpleNamespace(**{name: types.SimpleNamespace(name=name) for name in flags}),
        TacticSource=types.SimpleNamespace(**SOURCES86),
    )
    return package


def tensorrt_rtx(cuda: Cuda, rtx):
    """The same as TensorRT-RTX: it records CUDA graphs by itself."""
    package = tensorrt(cuda, rtx)
    package.CudaGraphStrategy, package.__version__ = rtx.CudaGraphStrategy, "1.7.1.116"
    return package


def install(monkeypatch, rtx) -> tuple[Cuda, types.SimpleNamespace]:
    """Both stand-ins in the place of the real packages."""
    from trt_runtime.backends import cuda
    from trt_runtime.backends.tensorrt import store as engine

    made = Cuda()
    package = tensorrt(made, rtx)
    monkeypatch.setattr(cuda, "_bindings", lambda: (made, made))
    monkeypatch.setattr(engine, "load", lambda backend: package)
    return made, package
