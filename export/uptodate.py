"""Whether an existing artifact is what an export would write: the manifest records the inputs by content.

Checkpoint files larger than 64 MiB are compared by size and modification time, because hashing them would
take as long as an export.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trt_runtime import __version__
from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import Manifest
from trt_runtime.errors import DllmError

from . import schemes
from .checkpoint import huggingface as checkpoints
from .pipeline import ExportConfig
from .quantize.export import QuantizeConfig

KEY = "inputs"  # of the manifest's source
_HASHED = 64 << 20
_READ = (".json", ".safetensors", ".jinja", ".txt", ".model")
_NOT_INPUTS = ("checkpoint", "out", "family", "overwrite")  # paths, and what is only checked
_WORDS = {"code": "the exporter", "checkpoint": "the checkpoint's files", "data": "the prompts of --data"}

Inputs = dict[str, Any]


def inputs_of(config: ExportConfig, how: QuantizeConfig | None) -> Inputs:
    """Everything an artifact depends on, as JSON. Raises DllmError for a missing checkpoint."""
    path, _ = checkpoints.locate(config.checkpoint)
    options = {name: value for name, value in asdict(config).items() if name not in _NOT_INPUTS}
    inputs: Inputs = {
        **options,
        "ignored_keys": list(config.ignored_keys),
        "code": _code(),
        "checkpoint": _digest(path),
    }
    if how is not None:
        target = schemes.find(how.scheme, how.target).target
        inputs |= {"quantize": how.scheme, "target": target, "match": how.match, "gate": how.gate}
        has_data = how.data is not None and how.data.is_file()
        inputs["data"] = manifests.sha256_of(how.data) if how.data is not None and has_data else None
    return inputs


def recorded(manifest: Manifest, inputs: Inputs, artifact: Path) -> Manifest:
    """Record the inputs in the manifest of the artifact that was made from them."""
    completed = replace(manifest, source={**manifest.source, KEY: inputs})
    manifests.write(completed, artifact)
    return completed


def current(artifact: Path, inputs: Inputs) -> Manifest | None:
    """The manifest of the existing artifact, if it is complete and was made from these inputs; None if there
    is no artifact. Raises DllmError that names the differences."""
    if not (artifact / manifests.FILE_NAME).is_file():
        return None
    how = "OVERWRITE=1 (--overwrite) replaces it, another OUT (--out) keeps both"
    try:
        manifest = manifests.load(artifact, check_hashes=True)
    except DllmError as error:
        raise DllmError(
            f"{artifact}: an artifact already exists and is damaged ({str(error).rstrip('.')}): {how}."
        ) from error
    before = manifest.source.get(KEY)
    if not isinstance(before, dict):
        raise DllmError(
            f"{artifact}: an artifact already exists and does not record what it was exported from: {how}."
        )
    keys = sorted(before.keys() | inputs.keys())
    if different := [key for key in keys if before.get(key) != inputs.get(key)]:
        names = [_WORDS.get(key, f"{key} {before.get(key)}, now {inputs.get(key)}") for key in different]
        raise DllmError(
            f"{artifact}: an artifact already exists, exported from other inputs ({', '.join(names)}): {how}."
        )
    return manifest


def _code() -> str:
    """A digest of the exporter itself and of the versions of the packages that build graphs."""
    root, digest = Path(__file__).resolve().parent, hashlib.sha256(__version__.encode())
    for path in [*sorted(root.rglob("*.py")), Path(contract.__file__)]:
        digest.update(path.read_bytes())
    for name in ("onnx", "onnx-ir", "onnxscript", "numpy"):
        digest.update(f"{name} {importlib.metadata.version(name)}".encode())
    return digest.hexdigest()


def _digest(checkpoint: Path) -> str:
    """A digest of the files of a checkpoint's directory that an export may read."""
    files = {}
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and path.suffix in _READ:
            facts = path.stat()
            files[path.name] = (
                manifests.sha256_of(path) if facts.st_size <= _HASHED else [facts.st_size, facts.st_mtime_ns]
            )
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
