"""Every TensorRT name that our code uses exists in the real bindings of 10.16 and 11.4, and in TensorRT-RTX.

The bindings are real extension modules; the libraries behind them, which are not to be had here, are stubs
compiled on the spot.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from bindings import VERSIONS, bindings_of
from places import ROOT

FILES = [
    "builder.py",
    "build_config.py",
    "store.py",
    "backend.py",
    "engines.py",
    "caches.py",
    "calls.py",
    "recorded.py",
]
# what our variables hold, where attributes of TensorRT's objects are used
_OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "settings": "IBuilderConfig",
    "shapes": "IOptimizationProfile",
    "layer": "ILayer",
    "tensor": "ITensor",
    "context": "IExecutionContext",
    "opened": "ICudaEngine",
    "inspector": "EngineInspector",
    "refitter": "Refitter",
    "filler": "OnnxParserRefitter",
    "known": "NetworkDefinitionCreationFlag",
    "runtime_config": "IRuntimeConfig",
    "runtime_cache": "IRuntimeCache",
    "strategies": "CudaGraphStrategy",
}
_ATTRIBUTES = {
    "_trt": "",
    "trt": "",
    "_runtime": "Runtime",
    "engine": "ICudaEngine",
}  # the same for attributes of ours: entry.engine.num_io_tensors
# of TensorRT-RTX alone: used only with targets, which TensorRT refuses (BuildConfig.checked)
# or by its own class and workarounds
_RTX_ONLY = {
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "CudaGraphStrategy",
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
    "CudaGraphStrategy.DISABLED",
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.set_runtime_cache",
    "IRuntimeCache.serialize",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.reset",
}
# of TensorRT 8 alone: used only where the newer name is missing, or by a workaround for versions before 10
_OLD_ONLY = {
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
    "BuilderFlag.FP16",
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS",
    "TacticSource.CUBLAS",
    "TacticSource.CUBLAS_LT",
    "TacticSource.CUDNN",
    "ILayer.precision",
    "ILayer.set_output_type",
    "ICudaEngine.device_memory_size",
    "ICudaEngine.create_execution_context_without_device_memory",
    "IExecutionContext.device_memory",
}
_LOOK = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
def there(name):
    held = module
    for part in name.split("."):
        if not hasattr(held, part):
            return False
        held = getattr(held, part)
    return True
print(json.dumps([module.__version__, [name for name in json.loads(sys.argv[2]) if not there(name)]]))
"""


def used_names() -> set[str]:
    """`trt.X.Y` chains, and attributes of what our variables and attributes hold, in FILES."""
    names = {"IAttentionInputLayer.attention", "IAttention.decomposable"}
    for file in FILES:
        for node in ast.walk(
            ast.parse((ROOT / "trt_runtime" / "backends" / "tensorrt" / file).read_text(encoding="utf-8"))
        ):
            parts: list[str] = []
            root: ast.AST = node
            while isinstance(root, ast.Attribute):
                parts.insert(0, root.attr)
                root = root.value
            if not parts or not isinstance(root, ast.Name):
                continue
            held = next(
                (
                    i
                    for i, part in enumerate(parts[:-1])
                    if part in _ATTRIBUTES and root.id in ("self", "entry", "engine")
                ),
                None,
            )
            if root.id == "trt":
                names.add(".".join(parts))
            elif held is not None:
                names.add(f"{_ATTRIBUTES[parts[held]]}.{parts[held + 1]}".lstrip("."))
            elif root.id in _OBJECTS and (root.id != "builder" or file == "builder.py"):
                names.add(f"{_OBJECTS[root.id]}.{parts[0]}")
    return {
        name
        for name in names
        if name.split(".")[-1] not in ("__version__", "__class__", "attention") or name[0] == "I"
    } - {"ILayer.__class__", "ILayer.attention"}


def test_the_walk_finds_the_names():
    names = used_names()
    assert {
        "Builder.create_network",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "LayerType.ATTENTION_INPUT",
        "IBuilderConfig.progress_monitor",
        "OnnxParser.parse",
        "ILayer.get_input",
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.get_tensor_dtype",
        "Runtime.deserialize_cuda_engine",
        "nptype",
        "OnnxParserRefitter",
        "IBuilderConfig.create_timing_cache",
        "EngineInspector.get_engine_information",
    } <= names
    assert names >= _RTX_ONLY | _OLD_ONLY and len(names) > 50


def missing(module: str, names: set[str], **environment: str) -> tuple[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", _LOOK, module, json.dumps(sorted(names))],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    version, gone = json.loads(done.stdout.splitlines()[-1])
    return version, gone


@pytest.mark.parametrize("version", VERSIONS)
def test_names_exist_in_the_bindings_of(version, tmp_path):
    paths = bindings_of(version, tmp_path)
    assert missing("tensorrt_bindings", used_names() - _RTX_ONLY - _OLD_ONLY, **paths) == (version, [])
    assert missing("tensorrt_bindings", {"Builder.no_such_method", "ILayer.name"}, **paths) == (
        version,
        ["Builder.no_such_method"],
    )


def test_names_exist_in_tensorrt_rtx():
    pytest.importorskip("tensorrt_rtx_bindings")
    assert missing("tensorrt_rtx_bindings", used_names() - _OLD_ONLY)[1] == []


def test_functions_of_cuda_python_exist_with_our_numbers_of_arguments():
    """Every `_do("name", ...)` of cuda.py, and its calls of the driver, against the real package's
    signatures."""
    runtime, driver = (pytest.importorskip(f"cuda.bindings.{name}") for name in ("runtime", "driver"))
    found = {}
    for node in ast.walk(
        ast.parse((ROOT / "trt_runtime" / "backends" / "cuda.py").read_text(encoding="utf-8"))
    ):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr == "_do" and isinstance(node.args[0], ast.Constant):
            found[node.args[0].value] = (runtime, len(node.args) - 1)
        elif node.func.attr.startswith("cu") and node.func.attr[2].isupper():
            found[node.func.attr] = (driver, len(node.args))
    assert {"cudaMalloc", "cudaMemcpy2DAsync", "cudaGraphInstantiate", "cuLaunchKernel"} <= set(found)
    for name, (module, number) in found.items():
        shown = re.match(r"\w+\((.*?)\)", getattr(module, name).__doc__.strip(), re.S)
        assert shown and len([part for part in shown[1].split(",") if part.strip()]) == number, name
    for name in (
        "cudaFree",
        "cudaFreeHost",
        "cudaGraphExecDestroy",
        "cudaStreamNonBlocking",
        "cudaMemcpyKind",
        "cudaStreamCaptureMode",
    ):
        assert hasattr(runtime, name)
    answer = runtime.cudaGetDeviceCount()
    assert int(answer[0]) >= 0 and len(answer) == 2
