"""A model repository for Triton Inference Server: config.pbtxt, model.py and the artifact."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends import BACKENDS
from trt_runtime.errors import DllmError
from trt_runtime.system import atomic

_CONFIG = """name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
  {{ name: "PROMPT" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "OPTIONS" data_type: TYPE_STRING dims: [ 1 ] optional: true }}
]
output [
  {{ name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "FINISHED" data_type: TYPE_BOOL dims: [ 1 ] }},
  {{ name: "NFE" data_type: TYPE_INT32 dims: [ 1 ] }}
]
instance_group [ {{ count: 1 kind: {kind} }} ]
parameters {{ key: "dllm" value: {{ string_value: {settings} }} }}
"""


def write(
    artifact: Path,
    out: Path,
    *,
    name: str | None,
    backend: str,
    options: dict[str, Any],
    slots: int,
    max_length: int | None,
) -> Path:
    """OUT/NAME with version 1 of the model. Every file of the artifact is checked by its hash first. Raises
    DllmError."""
    manifest = manifests.load(artifact, check_hashes=True)
    if manifest.tokenizer is None:
        raise DllmError(
            f"{artifact}: has no tokenizer, which text prompts need: export it with its tokenizer."
        )
    name = re.sub(r"[^A-Za-z0-9_-]", "-", artifact.resolve().name) if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise DllmError(f"--name is {name!r}, expected letters, digits, '_', '-' and '.'.")
    if (out / name).exists():
        raise DllmError(f"{out / name}: already exists: remove it, or give another --name.")
    settings = json.dumps({"backend": backend, "options": options, "slots": slots, "max_length": max_length})
    kind = "KIND_CPU" if BACKENDS.find(backend).is_on_cpu(options) else "KIND_GPU"
    with atomic.sealed(out / name, overwrite=False) as directory:
        (directory / "config.pbtxt").write_text(
            _CONFIG.format(name=name, kind=kind, settings=json.dumps(settings)), encoding="utf-8"
        )
        shutil.copytree(artifact, directory / "1" / "artifact")
        shutil.copyfile(Path(__file__).with_name("model.py"), directory / "1" / "model.py")
    return out / name
