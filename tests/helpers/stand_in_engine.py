"""A stand-in for a TensorRT engine: ONNX Runtime's CPU runs it, over the stand-in for CUDA.

It enforces the rules of the real one: shapes within profiles, aligned addresses, caches updated in place, no
capture of a context whose shapes changed since its last run, no replay after the context was changed.
"""

from __future__ import annotations

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
            return False  # TensorRT requires a run between a change of shapes and a capture
        for name in engine.inputs:
            if name.startswith("cache_") and name.replace("cache_", "updated_") in engine.kinds:
                assert self.addresses[name.replace("cache_", "updated_")] == self.addresses[name], (
                    "not in place"
                )
        self.is_settled = True
        if self.cuda.captured is not None:
            captured = (dict(self.shapes), dict(self.addresses))

            def unchanged():
                assert (self.shapes, self.addresses) == captured, (
                    "a graph is replayed after its context was changed"
                )

            self.cuda._queued(unchanged)
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.cuda._queued(lambda: engine.run(shapes, addresses))
        return True


class Engine:
    """A deserialised engine: the graph's path and the shapes of each profile, as the stand-in builder wrote
    them."""

    def __init__(self, cuda: Cuda, graph: str, profiles: list[dict]) -> None:
        self.cuda, self.profiles, self.num_optimization_profiles = cuda, profiles, len(profiles)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = (
            1,
            4,
        )  # the CPU copies caches and warns about it
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

    def create_execution_context(self, options):
        """From an allocation strategy or, for TensorRT-RTX, a runtime configuration."""
        context = Context(self)
        if isinstance(options, RuntimeConfig):
            assert options.strategy.name == "USER_MANAGED" and options.cache is not None
            context.graphs = options.cuda_graph_strategy.name
        return context

    def create_runtime_config(self):
        return RuntimeConfig()

    def run(self, shapes, addresses):
        self.cuda.executions += 1
        feeds = {name: view(addresses[name], shapes[name], self.kinds[name]).copy() for name in self.inputs}
        for name, array in zip(self.outputs, self.session.run(self.outputs, feeds), strict=True):
            assert self.cuda.holds("device", addresses[name], array.nbytes), name
            view(addresses[name], array.shape, self.kinds[name])[...] = array


class RuntimeCache:
    """A cache of compiled kernels: one byte per context that ran with it."""

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
