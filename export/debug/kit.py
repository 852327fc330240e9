"""A directory in which Polygraphy's command line works on an artifact at once: graphs, recorded calls with
their outputs, shapes, tolerances, commands.

Polygraphy is not imported here. The files under files/ are copied unchanged; settings.sh and facts.json are
generated.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trt_runtime import __version__
from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import Manifest
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.backends.tensorrt import builder
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError
from trt_runtime.optional import import_optional
from trt_runtime.system import atomic, commands

from . import record
from .record import RecordedCall

_FILES = Path(__file__).with_name("files")
_PROMPTS = (7, 12, 9)  # lengths of the random prompts: ragged rows
_GENERATED, _BLOCK = 24, 8


@dataclass(frozen=True)
class KitConfig:
    """prompts: token ids; None draws some. count: recorded calls per role. link: hard-link the weights.
    reference: also record PyTorch's outputs (None: if it is installed). checkpoint: for the reference and for
    a bf16 artifact's twin; None takes the manifest's."""

    prompts: list[list[int]] | None = None
    count: int = 3
    link: bool = False
    reference: bool | None = None
    checkpoint: str | None = None


def write(
    artifact: Path, out: Path, config: KitConfig, note: Callable[[str], object] = lambda text: None
) -> list[RecordedCall]:
    """Write the kit to a new directory. Returns the recorded calls. Raises DllmError."""
    manifest = manifests.load(artifact)
    if not manifest.dims.writes_caches:
        raise DllmError(
            f"{artifact}: uses the legacy lowering, but Polygraphy's kit supports only the modern one: "
            f"export it with --lowering modern."
        )
    manifests.check_runs_on_gpu(manifest, str(artifact))
    if out.exists() and any(out.iterdir()):
        raise DllmError(f"{out}: already exists: remove it, or choose another directory.")
    with runnable(artifact, manifest, config.checkpoint) as twin:
        backend = OrtBackend(twin, threads=1)
        calls = record.decode(backend, config.prompts or prompts(manifest), decoding(manifest), config.count)
        backend.close()
        theirs = _reference(twin, calls, config, note)
    with atomic.sealed(out, overwrite=False) as directory:
        write_graphs(artifact, manifest, calls[0].capacity, directory, link=config.link)
        _save(directory, calls, "windows", "expected")
        if theirs is not None:
            _save(directory, theirs, None, "expected-pytorch")
        dtype = manifest.model.dtype
        facts = {
            "artifact": artifact.resolve().name,
            "dtype": dtype,
            "capacity": calls[0].capacity,
            "calls": len(calls),
            "dllm-trt": __version__,
        }
        (directory / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (directory / "settings.sh").write_text(settings(calls, dtype), encoding="utf-8")
        for file in sorted(_FILES.iterdir()):
            if file.is_file():
                shutil.copy(file, directory / file.name)
    return calls


@contextmanager
def runnable(artifact: Path, manifest: Manifest, checkpoint: str | None) -> Iterator[Path]:
    """The artifact in a form that ONNX Runtime computes here: a bf16 one as its fp32 twin."""
    if manifest.model.dtype != "bf16":
        yield artifact
        return
    fp32_twin = import_optional(
        "export.parity.verify",
        "polygraphy of a bf16 artifact",
        commands.install("export", "ort", "reference"),
    ).fp32_twin
    with tempfile.TemporaryDirectory() as temporary:
        yield fp32_twin(manifest, checkpoint, Path(temporary))


def prompts(manifest: Manifest) -> list[list[int]]:
    """Random prompts of unequal lengths, from ordinary tokens."""
    special, rng = manifest.decoding.special_token_ids, np.random.default_rng(0)
    ordinary = np.array(
        [token for token in range(min(manifest.model.vocab_size, 4096)) if token not in special]
    )
    room = max(1, manifest.model.max_length - _GENERATED)
    return [rng.choice(ordinary, min(length, room)).tolist() for length in _PROMPTS]


def decoding(manifest: Manifest) -> GenerationConfig:
    """A short decoding with the model's own cache, so that there are prefix passes and refine steps."""
    length = min(_GENERATED, manifest.model.max_length - 1)
    return GenerationConfig(gen_length=length, block_length=min(_BLOCK, length), stop_at_eos=False)


def write_graphs(artifact: Path, manifest: Manifest, capacity: int, out: Path, *, link: bool) -> None:
    """Both graphs with a fixed capacity, next to their weights."""
    for role in contract.ROLES:
        (out / f"{role}.onnx").write_bytes(
            builder.with_capacity(artifact / manifest.graphs[role].file, capacity)
        )
    for name in manifest.files:
        if name.endswith((".data", ".safetensors")):
            (os.link if link else shutil.copyfile)((artifact / name).resolve(), out / name)


def settings(calls: list[RecordedCall], dtype: str) -> str:
    """settings.sh: for each role the smallest, usual and largest shapes, those of the first call, and the
    tolerance of each output."""
    lines = [
        "# Shapes of the recorded calls and tolerances (trt_runtime/measure/tolerances.py), for run.sh. "
        "Made by dllm-trt polygraphy."
    ]
    for role in contract.ROLES:
        ours = [call for call in calls if call.role == role]
        seen = {name: np.array([call.inputs[name].shape for call in ours]) for name in ours[0].inputs}
        for kind, shapes in (
            ("MIN", {name: values.min(0) for name, values in seen.items()}),
            ("OPT", {name: values.max(0) for name, values in seen.items()}),
            ("MAX", {name: values.max(0) for name, values in seen.items()}),
            ("FIRST", {name: values[0] for name, values in seen.items()}),
        ):
            lines.append(
                _array(
                    f"{role.upper()}_{kind}",
                    (f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items()),
                )
            )
        limits = record.allowed(ours, dtype)
        lines.append(
            _array(f"{role.upper()}_ATOL", (f"{name}:{value:.6g}" for name, value in limits.items()))
        )
    return "\n".join(lines) + "\n"


def _array(name: str, values: Iterator[str]) -> str:
    """A shell array."""
    return f"{name}=({' '.join(map(shlex.quote, values))})"


def _save(out: Path, calls: list[RecordedCall], inputs: str | None, outputs: str) -> None:
    numbers = dict.fromkeys(contract.ROLES, 0)
    for call in calls:
        name = f"{call.role}-{numbers[call.role]:04}.npz"
        numbers[call.role] += 1
        for folder, arrays in ((inputs, call.inputs), (outputs, call.outputs)):
            if folder is not None:
                (out / folder).mkdir(exist_ok=True)
                np.savez(out / folder / name, allow_pickle=False, **arrays)


def _reference(
    artifact: Path, calls: list[RecordedCall], config: KitConfig, note: Callable[[str], object]
) -> list[RecordedCall] | None:
    """The same calls on PyTorch; None if it is not asked for or not installed."""
    if config.reference is False:
        return None
    try:
        from ..parity.reference import TorchBackend

        backend = TorchBackend(artifact, checkpoint=config.checkpoint, dtype="fp32", threads=1)
    except (ImportError, DllmError) as error:
        if config.reference:
            raise DllmError(
                f"PyTorch's outputs cannot be recorded ({error}): leave --reference out."
            ) from error
        note(f"PyTorch's outputs are not recorded: {error}")
        return None
    recorded = [
        RecordedCall(
            call.role,
            call.inputs,
            record.replayed(backend, call.role, call.inputs, want_logits=contract.LOGITS in call.outputs),
        )
        for call in calls
    ]
    backend.close()
    return recorded
