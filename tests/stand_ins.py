"""Stand-ins for what needs a GPU: CUDA's functions over host memory, and TensorRT engines that ONNX Runtime's CPU runs.

They hold the code to the rules of the real ones. Work that was queued runs only at a synchronisation, so that a result which is read
too early is wrong. Fresh memory is full of NaN. Addresses are checked against what was allocated. A capture refuses to wait, to allocate,
and to run a context whose shapes changed since its last run. Engines check shapes against profiles and addresses for alignment.
"""

from __future__ import annotations

import ctypes
import enum
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

ALIGNMENT = 256


class Cuda:
    """The functions of cuda.bindings.runtime and .driver that trt_runtime.cuda uses. `kernels`: entry name -> function of arguments."""

    class cudaMemcpyKind(enum.IntEnum):
        cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice = 1, 2, 3

    class cudaStreamCaptureMode(enum.IntEnum):
        cudaStreamCaptureModeRelaxed = 2

    class Code(enum.IntEnum):
        cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation, cudaErrorStreamCaptureUnsupported = 0, 1, 2, 900

    cudaStreamNonBlocking = 1

    def __init__(self, devices: int = 1, memory: int = 1 << 33) -> None:
        self.devices, self.left = devices, memory
        self.queue: list = []
        self.captured: list | None = None
        self.spaces: dict[str, dict[int, np.ndarray]] = {"device": {}, "host": {}}
        self.kernels: dict = {}
        self.launches = self.executions = 0

    # memory
    def _new(self, space, size):
        if self.captured is not None:
            return self.Code.cudaErrorStreamCaptureUnsupported, None
        if size > self.left:
            return self.Code.cudaErrorMemoryAllocation, None
        raw = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        address = -(-raw.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.spaces[space][address] = raw
        self.left -= size
        return self.Code.cudaSuccess, address

    def _freed(self, space, address):
        self.left += len(self.spaces[space].pop(address)) - ALIGNMENT
        return (self.Code.cudaSuccess,)

    def cudaMalloc(self, size):
        return self._new("device", size)

    def cudaFree(self, address):
        return self._freed("device", address)

    def cudaHostAlloc(self, size, flags):
        return self._new("host", size)

    def cudaFreeHost(self, address):
        return self._freed("host", address)

    def holds(self, space, address, size) -> bool:
        """Whether memory of a space covers these bytes."""
        return any(
            start <= address and address + size <= start + len(raw) - ALIGNMENT for start, raw in self.spaces[space].items()
        )

    # work
    def _queued(self, work):
        (self.queue if self.captured is None else self.captured).append(work)
        return (self.Code.cudaSuccess,)

    def cudaMemsetAsync(self, address, value, size, stream):
        if not self.holds("device", address, size):
            return (self.Code.cudaErrorInvalidValue,)
        return self._queued(lambda: ctypes.memset(address, value, size))

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        spaces = {1: ("device", "host"), 2: ("host", "device"), 3: ("device", "device")}[int(kind)]
        if not (self.holds(spaces[0], target, size) and self.holds(spaces[1], source, size)):
            return (self.Code.cudaErrorInvalidValue,)
        return self._queued(lambda: ctypes.memmove(target, source, size))

    def cudaMemcpy2DAsync(self, target, target_pitch, source, source_pitch, width, height, kind, stream):
        ends = ((target, target_pitch), (source, source_pitch))
        if any(pitch < width or not self.holds("device", at, pitch * (height - 1) + width) for at, pitch in ends):
            return (self.Code.cudaErrorInvalidValue,)

        def work():
            for i in range(height):
                ctypes.memmove(target + i * target_pitch, source + i * source_pitch, width)

        return self._queued(work)

    def cudaStreamCreateWithFlags(self, flags):
        return self.Code.cudaSuccess, 7

    def cudaStreamSynchronize(self, stream):
        if self.captured is not None:
            return (self.Code.cudaErrorStreamCaptureUnsupported,)
        waiting, self.queue = self.queue, []
        for work in waiting:
            work()
        return (self.Code.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.captured = []
        return (self.Code.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        held, self.captured = self.captured, None
        return self.Code.cudaSuccess, held

    def cudaGraphInstantiate(self, graph, flags):
        return self.Code.cudaSuccess, list(graph)

    def cudaGraphDestroy(self, graph):
        return (self.Code.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        for work in graph:
            self._queued(work)
        return (self.Code.cudaSuccess,)

    # what the machine is
    def cudaGetDeviceCount(self):
        return self.Code.cudaSuccess, self.devices

    def cudaSetDevice(self, index):
        return (self.Code.cudaSuccess,)

    def cudaGetDeviceProperties(self, index):
        return self.Code.cudaSuccess, types.SimpleNamespace(name=b"Stand-in GPU\0\0", major=9, minor=0)

    def cudaDriverGetVersion(self):
        return self.Code.cudaSuccess, 13000

    # kernels: an entry's name stands for a Python function of addresses
    def cuModuleLoadData(self, image):
        assert image.endswith(b"\0")
        return self.Code.cudaSuccess, image

    def cuModuleGetFunction(self, module, name):
        known = name.decode() in self.kernels and name in module
        return (self.Code.cudaSuccess if known else self.Code.cudaErrorInvalidValue), name.decode()

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra):
        values, kinds = arguments
        pointers = [value for value, kind in zip(values, kinds, strict=True) if kind is ctypes.c_void_p]
        if not all(self.holds("device", address, 1) for address in pointers):
            return (self.Code.cudaErrorInvalidValue,)
        return self._queued(lambda: self.kernels[function](gx, *values))


_KINDS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(float16)": np.float16}


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
        if len(shape) != len(least) or not all(low <= n <= high for low, n, high in zip(least, shape, most, strict=True)):
            return False
        self.is_settled &= self.shapes.get(name) == shape
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return name in self.engine.kinds and address % ALIGNMENT == 0

    def execute_async_v3(self, stream):
        engine = self.engine
        if set(self.addresses) != set(engine.kinds) or set(self.shapes) != set(engine.inputs) or not self.scratch:
            return False
        if self.cuda.captured is not None and not self.is_settled:
            return False  # TensorRT asks for a run after a change of shapes before a capture
        for name in engine.inputs:
            if name.startswith("cache_") and name.replace("cache_", "updated_") in engine.kinds:
                assert self.addresses[name.replace("cache_", "updated_")] == self.addresses[name], "not in place"
        self.is_settled = True
        if self.cuda.captured is not None:
            held = (dict(self.shapes), dict(self.addresses))

            def unchanged():
                assert (self.shapes, self.addresses) == held, "a graph is replayed after its context was changed"

            self.cuda._queued(unchanged)
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.cuda._queued(lambda: engine.run(shapes, addresses))
        return True


class Engine:
    """A deserialised engine: `text` is what the stand-in builder wrote, the graph's path and the shapes of each profile."""

    def __init__(self, cuda: Cuda, graph: str, capacity: int, profiles: list[dict]) -> None:
        self.cuda, self.profiles, self.num_optimization_profiles = cuda, profiles, len(profiles)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4  # the CPU copies caches, and says so
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(Path(graph).parent))
        model = onnx.load(graph, load_external_data=False)
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
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

    def create_execution_context(self, strategy):
        return Context(self)

    def run(self, shapes, addresses):
        self.cuda.executions += 1
        given = {name: _view(addresses[name], shapes[name], self.kinds[name]).copy() for name in self.inputs}
        for name, made in zip(self.outputs, self.session.run(self.outputs, given), strict=True):
            assert self.cuda.holds("device", addresses[name], made.nbytes), name
            _view(addresses[name], made.shape, self.kinds[name])[...] = made


def commit_kernel(mask_token_id):
    """What plugins/commit.py computes, over addresses: its reference."""
    from trt_runtime import steps

    def run(batch, ids, token, confidence, plan, value, state, committed, rows, columns):
        at = [_view(address, shape, np.dtype(kind)) for address, shape, kind in (
            (ids, (batch, rows), np.int64), (token, (batch, columns), np.int64), (confidence, (batch, columns), np.float32),
            (plan, (batch, 4), np.int32), (value, (batch,), np.float64), (state, (batch, 2), np.int32),
            (committed, (batch, columns), np.int32))]  # fmt: skip
        steps.commit(at[0], at[1], at[2], steps.Plan(*at[3:]), mask_token_id)

    return run


def _view(address, shape, kind):
    size = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), kind).reshape(shape)


def tensorrt(cuda: Cuda, rtx):
    """A package `tensorrt` that parses as TensorRT-RTX does, and whose engines are those above. `rtx`: tensorrt_rtx_bindings."""

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
            import json

            facts = {
                "graph": Parser.graph,
                "profiles": settings.profiles,
                "flags": settings.flags,
                "verbosity": settings.verbosity,
            }
            settings.timing += b"+"
            return json.dumps(facts).encode()

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

        def deserialize_cuda_engine(self, data):
            import json

            assert not self.engine_host_code_allowed
            facts = json.loads(data)
            opened = Engine(cuda, facts["graph"], 0, facts["profiles"])
            opened.stripped = "STRIP_PLAN" in facts["flags"]
            opened.create_engine_inspector = lambda: types.SimpleNamespace(
                get_engine_information=lambda kind: json.dumps({"Layers": [], "verbosity": facts["verbosity"]})
            )
            return opened

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

    held = {name: getattr(rtx, name) for name in ("ILogger", "IProgressMonitor", "NetworkDefinitionCreationFlag", "BuilderFlag",
            "ProfilingVerbosity", "LayerType", "ExecutionContextAllocationStrategy", "LayerInformationFormat", "IAttentionInputLayer")}  # fmt: skip
    return types.SimpleNamespace(**held, Builder=Builder, OnnxParser=Parser, Runtime=Runtime, Refitter=Refitter,
                                 OnnxParserRefitter=ParserRefitter, nptype=lambda kind: kind, __version__="11.4.0.106")  # fmt: skip


def tensorrt86(cuda: Cuda, rtx):
    """The same as TensorRT 8.6 has it: types by constraints, int32 for int64, no progress, contexts by their older names."""
    package = tensorrt(cuda, rtx)
    newer_runtime, newer_builder, newer_parser = package.Runtime, package.Builder, package.OnnxParser
    sources = {"CUBLAS": 0, "CUBLAS_LT": 1, "CUDNN": 2, "JIT_CONVOLUTIONS": 4}

    class Layer:
        def __init__(self, real):
            self.real, self.precision, self.types = real, None, {}

        def __getattr__(self, name):
            return getattr(self.real, name)

        def set_output_type(self, index, kind):
            self.types[index] = kind

    class Network:
        def __init__(self, real):
            self.real, self.layers = real, {}

        def __getattr__(self, name):
            return getattr(self.real, name)

        def get_layer(self, index):
            return self.layers.setdefault(index, Layer(self.real.get_layer(index)))

    class Settings:
        sources_set = None

        def __init__(self, held):
            self.held, self.cleared = held, []

        def __getattr__(self, name):
            return getattr(self.held, name)

        def clear_flag(self, flag):
            self.cleared.append(flag)

        def get_tactic_sources(self):
            return sum(1 << bit for bit in sources.values())

        def set_tactic_sources(self, kept):
            Settings.sources_set = kept

    class Builder:
        def __init__(self, logger):
            self.newer = newer_builder(logger)

        def __getattr__(self, name):
            return getattr(self.newer, name)

        def create_network(self, flags):
            assert flags == 1
            package.last_network = Network(self.newer.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)))
            return package.last_network

        def create_builder_config(self):
            return Settings(self.newer.create_builder_config())

    def parser(network, logger):
        return newer_parser(network.real, logger)

    class Old(Engine):
        def __init__(self, newer):
            self.__dict__.update(newer.__dict__)
            self.kinds = {name: np.dtype(np.int32) if kind == np.int64 else kind for name, kind in newer.kinds.items()}
            self.device_memory_size = 1000

        def __getattribute__(self, name):
            if name in ("create_execution_context", "get_device_memory_size_for_profile_v2"):
                raise AttributeError(name)
            return object.__getattribute__(self, name)

        def create_execution_context_without_device_memory(self):
            return OldContext(self)

        def run(self, shapes, addresses):
            given = {name: _view(addresses[name], shapes[name], self.kinds[name]).copy() for name in self.inputs}
            wide = {name: array.astype(np.int64) if array.dtype == np.int32 else array for name, array in given.items()}
            for name, made in zip(self.outputs, self.session.run(self.outputs, wide), strict=True):
                _view(addresses[name], made.shape, self.kinds[name])[...] = made

    class OldContext(Context):
        def __getattribute__(self, name):
            if name == "set_device_memory":
                raise AttributeError(name)
            return object.__getattribute__(self, name)

        def __setattr__(self, name, value):
            object.__setattr__(self, "scratch" if name == "device_memory" else name, value)

    class Runtime(newer_runtime):
        def deserialize_cuda_engine(self, data):
            return Old(super().deserialize_cuda_engine(data))

    flags = ("FP16", "OBEY_PRECISION_CONSTRAINTS", "TF32")
    for name in ("IProgressMonitor", "ExecutionContextAllocationStrategy", "OnnxParserRefitter"):
        delattr(package, name)
    vars(package).update(Builder=Builder, OnnxParser=parser, Runtime=Runtime, Settings=Settings, __version__="8.6.1", float32=rtx.float32,
                         float16=rtx.float16, NetworkDefinitionCreationFlag=types.SimpleNamespace(EXPLICIT_BATCH=0),
                         BuilderFlag=types.SimpleNamespace(**{name: types.SimpleNamespace(name=name) for name in flags}),
                         TacticSource=types.SimpleNamespace(**sources))  # fmt: skip
    return package


def install(monkeypatch, rtx) -> tuple[Cuda, types.SimpleNamespace]:
    """Both stand-ins in the place of the real packages."""
    from trt_runtime import cuda, engine

    made = Cuda()
    package = tensorrt(made, rtx)
    monkeypatch.setattr(cuda, "_bindings", lambda: (made, made))
    monkeypatch.setattr(engine, "load", lambda backend: package)
    return made, package
