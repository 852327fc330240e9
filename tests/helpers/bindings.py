"""The Python bindings of TensorRT's versions, downloaded, over stub libraries, and what TensorRT is told
through them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from places import ROOT

VERSIONS = ["10.16.1.11", "11.4.0.106"]


_STUB = "\n".join(
    f"void* {name}(void) {{ return 0; }}"
    for name in (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getBuilderPluginRegistry",
        "getNvOnnxParserVersion",
        "getPluginRegistry",
        "initLibNvInferPlugins",
    )
)


def bindings_of(version, folder) -> dict[str, str]:
    """The environment in which the bindings of a version import as `tensorrt_bindings`. Skips the test if
    they cannot be downloaded or compiled."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the stub libraries")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        str(folder),
        f"tensorrt-cu13-bindings=={version}",
    ]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"the bindings of {version} cannot be downloaded for this Python")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    (folder / "stub.c").write_text(_STUB)
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        target = folder / f"lib{library}.so.{version.split('.')[0]}"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(target), str(folder / "stub.c")], check=True)
    return {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder / "wheel")}


def told(version, folder, name, facts, shapes, types):
    """What TensorRT is told of a plugin, through the real tensorrt.plugin of the version."""
    environment = {
        key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"
    } | bindings_of(version, folder)
    environment["PYTHONPATH"] += f":{ROOT}"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "helpers" / "plugin_harness.py"),
            json.dumps([name, facts, 90, shapes, types]),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["version"], answer["aot"]) == (version, True)
    assert f"rejected the plugin dllm::{name}" in answer["refused"]
    assert f".entry {answer['name']}(" in answer["ptx"] and str(ROOT) not in answer["ptx"]
    return answer


def agrees(seen, outputs, kinds, grid, rows, num_inputs) -> None:
    """What TensorRT was told of a kernel with one extra argument: `outputs` of these types, the grid, and the
    kernel's arguments in TensorRT's order."""
    assert seen["shapes"] == outputs and seen["kinds"] == [f"DataType.{kind}" for kind in kinds]
    assert (seen["launch"]["grid_x"], seen["launch"].get("grid_y")) == grid
    assert seen["extra"] == [rows]
    (declared,) = re.findall(rf"\.entry {seen['name']}\((.*?)\)", seen["ptx"], re.S)
    arguments = [line.split()[1] for line in declared.strip().splitlines()]
    assert arguments == [".u64"] * num_inputs + [".u32"] + [".u64"] * len(outputs)
