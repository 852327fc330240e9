"""A stand-in for TensorRT 8.6, built on the one for newer versions: types by constraints, int32 for int64, no
progress monitor, contexts under their older names."""

from __future__ import annotations

import types

import numpy as np
from stand_in_cuda import Cuda, view
from stand_in_engine import Context, Engine
from stand_ins import tensorrt

SOURCES86 = {"CUBLAS": 0, "CUBLAS_LT": 1, "CUDNN": 2, "JIT_CONVOLUTIONS": 4}


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

    def __init__(self, real):
        self.real, self.cleared = real, []

    def __getattr__(self, name):
        return getattr(self.real, name)

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
        feeds = {name: view(addresses[name], shapes[name], self.kinds[name]).copy() for name in self.inputs}
        wide = {
            name: array.astype(np.int64) if array.dtype == np.int32 else array
            for name, array in feeds.items()
        }
        for name, array in zip(self.outputs, self.session.run(self.outputs, wide), strict=True):
            view(addresses[name], array.shape, self.kinds[name])[...] = array


class Context86(Context):
    def __getattribute__(self, name):
        if name == "set_device_memory":
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def __setattr__(self, name, value):
        object.__setattr__(self, "scratch" if name == "device_memory" else name, value)


def tensorrt86(cuda: Cuda, rtx):
    """A package `tensorrt` of version 8.6. `rtx`: tensorrt_rtx_bindings."""
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
