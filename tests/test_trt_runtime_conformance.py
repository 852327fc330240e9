"""Every TensorRT name that our code uses exists in the real bindings of 10.16 and 11.4, and in TensorRT-RTX.

The bindings are real extension modules; the libraries behind them, which are not to be had here, are stubs compiled on the spot.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

VERSIONS = ["10.16.1.11", "11.4.0.106"]
_STUB = "\n".join(
    f"void* {name}(void) {{ return 0; }}"
    for name in ("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
                 "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
                 "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins")
)  # fmt: skip
# what our variables hold, where attributes of TensorRT's objects are used
_OBJECTS = {"builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "settings": "IBuilderConfig",
            "shapes": "IOptimizationProfile", "layer": "ILayer", "tensor": "ITensor"}  # fmt: skip
# of TensorRT-RTX alone: used only with targets, which TensorRT refuses (BuildConfig.checked)
_RTX_ONLY = {"ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability"}
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
    """`trt.X.Y` chains, and attributes of the variables above, in engine.py."""
    tree = ast.parse((ROOT / "trt_runtime" / "engine.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        parts: list[str] = []
        root: ast.AST = node
        while isinstance(root, ast.Attribute):
            parts.insert(0, root.attr)
            root = root.value
        if parts and isinstance(root, ast.Name) and root.id == "trt" and parts[0] != "__version__":
            names.add(".".join(parts))
        if parts and isinstance(root, ast.Name) and root.id in _OBJECTS and parts[0] not in ("__class__", "attention"):
            names.add(f"{_OBJECTS[root.id]}.{parts[0]}")
    return names | {"IAttentionInputLayer.attention", "IAttention.decomposable"}


def test_the_walk_finds_the_names():
    names = used_names()
    assert {"Builder.create_network", "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "LayerType.ATTENTION_INPUT",
            "IBuilderConfig.progress_monitor", "OnnxParser.parse", "ILayer.get_input"} <= names  # fmt: skip
    assert names >= _RTX_ONLY and len(names) > 20


def missing(module: str, names: set[str], **environment: str) -> tuple[str, list[str]]:
    done = subprocess.run([sys.executable, "-c", _LOOK, module, json.dumps(sorted(names))], capture_output=True, text=True,
                          check=True, env=os.environ | environment)  # fmt: skip
    version, gone = json.loads(done.stdout.splitlines()[-1])
    return version, gone


@pytest.mark.parametrize("version", VERSIONS)
def test_names_exist_in_the_bindings_of(version, tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the stub libraries")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(tmp_path),
               f"tensorrt-cu13-bindings=={version}"]  # fmt: skip
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"the bindings of {version} cannot be downloaded for this Python")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "wheel")
    (tmp_path / "stub.c").write_text(_STUB)
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        target = tmp_path / f"lib{library}.so.{version.split('.')[0]}"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(target), str(tmp_path / "stub.c")], check=True)
    paths = {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(tmp_path / "wheel")}
    assert missing("tensorrt_bindings", used_names() - _RTX_ONLY, **paths) == (version, [])
    assert missing("tensorrt_bindings", {"Builder.no_such_method", "ILayer.name"}, **paths) == (
        version,
        ["Builder.no_such_method"],
    )


def test_names_exist_in_tensorrt_rtx():
    pytest.importorskip("tensorrt_rtx_bindings")
    assert missing("tensorrt_rtx_bindings", used_names())[1] == []
