"""A stand-in for the package `tensorrt`: TensorRT-RTX parses its networks, and its engines are those of
stand_in_engine.py."""

from __future__ import annotations

import json
import types
from pathlib import Path

from stand_in_cuda import Cuda
from stand_in_engine import Engine

_SHARED = (
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


class Shapes:
    def __init__(self):
        self.by_name = {}

    def set_shape(self, name, *shapes):
        self.by_name[name] = shapes


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
        self.profiles.append(shapes.by_name)

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


def pieces(reader):
    """The content of a stream reader, read as TensorRT does: a header, then everything, in as many calls as
    it takes."""
    header = reader.read(16, 0)
    assert len(header) == 16 and reader.seek(0, reader.where.SET)
    while piece := reader.read(1 << 40, 0):
        yield piece


def _parser(rtx):
    class Parser:
        graph = ""

        def __init__(self, network, logger):
            self.real = rtx.OnnxParser(network, logger)

        def __getattr__(self, name):
            return getattr(self.real, name)

        def parse(self, data, path):
            Parser.graph = path
            return self.real.parse(data, path)

    return Parser


def _builder(rtx, parser):
    """Its engines are JSON: the path of the graph that `parser` read last, and the settings."""

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
                "graph": parser.graph,
                "profiles": settings.profiles,
                "flags": settings.flags,
                "verbosity": settings.verbosity,
            }
            settings.timing += b"+"
            return json.dumps(facts).encode()

    return Builder


def _runtime(cuda: Cuda):
    class Runtime:
        def __init__(self, logger):
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, source):
            assert not self.engine_host_code_allowed
            facts = json.loads(source if isinstance(source, bytes) else b"".join(pieces(source)))
            opened = Engine(cuda, facts["graph"], facts["profiles"])
            opened.stripped = "STRIP_PLAN" in facts["flags"]
            opened.create_engine_inspector = lambda: types.SimpleNamespace(
                get_engine_information=lambda kind: json.dumps(
                    {"Layers": [], "verbosity": facts["verbosity"]}
                )
            )
            return opened

    return Runtime


def tensorrt(cuda: Cuda, rtx):
    """A package `tensorrt` that parses as TensorRT-RTX does, and whose engines run on ONNX Runtime. `rtx`:
    tensorrt_rtx_bindings."""

    class StreamReader:  # the real one cannot be created without a driver
        where = rtx.SeekPosition

        def __init__(self):
            pass

    parser = _parser(rtx)
    return types.SimpleNamespace(
        **{name: getattr(rtx, name) for name in _SHARED},
        IStreamReaderV2=StreamReader,
        Builder=_builder(rtx, parser),
        OnnxParser=parser,
        Runtime=_runtime(cuda),
        Refitter=Refitter,
        OnnxParserRefitter=ParserRefitter,
        nptype=lambda kind: kind,
        __version__="11.4.0.106",
    )


def tensorrt_rtx(cuda: Cuda, rtx):
    """The same for TensorRT-RTX, which records CUDA graphs by itself."""
    package = tensorrt(cuda, rtx)
    package.CudaGraphStrategy, package.__version__ = rtx.CudaGraphStrategy, "1.7.1.116"
    return package


def install(monkeypatch, rtx) -> tuple[Cuda, types.SimpleNamespace]:
    """Replace CUDA and TensorRT by their stand-ins."""
    from trt_runtime.backends import cuda
    from trt_runtime.backends.tensorrt import store as engine

    device = Cuda()
    package = tensorrt(device, rtx)
    monkeypatch.setattr(cuda, "_bindings", lambda: (device, device))
    monkeypatch.setattr(engine, "load", lambda backend: package)
    return device, package
