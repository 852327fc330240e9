"""Whether an artifact is what an export would make: its inputs stand in the manifest, by their content.

Files of the checkpoint beyond 64 MiB count by size and time of change, as hashing them would take as long as
an export.
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
_NOT_INPUTS = ("checkpoint", "out", "family", "overwrite")  # where things lie, and what is only checked
_WORDS = {"code": "the exporter", "checkpoint": "the checkpoint's files", "data": "the prompts of --data"}

Inputs = dict[str, Any]


def inputs_of(config: ExportConfig, how: QuantizeConfig | None) -> Inputs:
    """All that an artifact depends on, as JSON. Raises DllmError for a checkpoint that is not there."""
    path, _ = checkpoints.locate(config.checkpoint)
    options = {name: value for name, value in asdict(config).items() if name not in _NOT_INPUTS}
    made: Inputs = {
        **options,
        "ignored_keys": list(config.ignored_keys),
        "code": _code(),
        "checkpoint": _digest(path),
    }
    if how is not None:
        target = schemes.find(how.scheme, how.target).target
        made |= {"quantize": how.scheme, "target": target, "match": how.match, "gate": how.gate}
        made["data"] = None if how.data is None or not how.data.is_file() else manifests.sha256_of(how.data)
    return made


def noted(manifest: Manifest, inputs: Inputs, artifact: Path) -> Manifest:
    """Put the inputs into the manifest of an artifact that was made from them."""
    completed = replace(manifest, source={**manifest.source, KEY: inputs})
    manifests.write(completed, artifact)
    return completed


def current(artifact: Path, inputs: Inputs) -> Manifest | None:
    """The manifest of the artifact that is there, if it is whole and was made from these inputs; None where
    there is none. Raises DllmError that names what is different."""
    if not (artifact / manifests.FILE_NAME).is_file():
        return None
    how = "OVERWRITE=1 (--overwrite) replaces it, another OUT (--out) keeps both"
    try:
        manifest = manifests.load(artifact, check_hashes=True)
    except DllmError as error:
        raise DllmError(
            f"{artifact}: an artifact is there already, and it is damaged ({str(error).rstrip('.')}): {how}."
        ) from error
    held = manifest.source.get(KEY)
    if not isinstance(held, dict):
        raise DllmError(
            f"{artifact}: an artifact is there already that does not say what it was made from: {how}."
        )
    if different := [key for key in sorted(held.keys() | inputs.keys()) if held.get(key) != inputs.get(key)]:
        said = ", ".join(
            _WORDS.get(key, f"{key} {held.get(key)}, now {inputs.get(key)}") for key in different
        )
        raise DllmError(f"{artifact}: an artifact is there already that was made otherwise ({said}): {how}.")
    return manifest


def _code() -> str:
    """The exporter itself, and the packages that build graphs."""
    root, digest = Path(__file__).resolve().parent, hashlib.sha256(__version__.encode())
    for path in [*sorted(root.rglob("*.py")), Path(contract.__file__)]:
        digest.update(path.read_bytes())
    for name in ("onnx", "onnx-ir", "onnxscript", "numpy"):
        digest.update(f"{name} {importlib.metadata.version(name)}".encode())
    return digest.hexdigest()


def _digest(checkpoint: Path) -> str:
    """The files of a checkpoint's directory that an export may read."""
    held = {}
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and path.suffix in _READ:
            facts = path.stat()
            held[path.name] = (
                manifests.sha256_of(path) if facts.st_size <= _HASHED else [facts.st_size, facts.st_mtime_ns]
            )
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()
