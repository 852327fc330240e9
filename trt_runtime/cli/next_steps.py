"""The command to run next, with the real paths and quoted for a shell: a hint, printed on standard error."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import TENSORRT, Manifest
from trt_runtime.errors import DllmError
from trt_runtime.system import commands

_DEMO = (
    "take red cups from kitchen to garage, then hand blue pens to Mia, and clean hall with mop",
    ("llada-demo", "sdar-demo"),
)
_PROMPT = "Why is the sky blue?"


def generate(artifact: Path, manifest: Manifest, *options: str | Path) -> str:
    """The command that generates with an artifact, or the only one that it can run."""
    if not manifest.decoding.is_mask_known:
        return commands.command("replay", artifact, "CASES.json", *options)
    if manifest.tokenizer is None:
        special, vocabulary = manifest.decoding.special_token_ids, range(manifest.model.vocab_size)
        ids = list(itertools.islice((token for token in vocabulary if token not in special), 3))
        return commands.command("generate", artifact, "--ids", ",".join(map(str, ids)), *options)
    # the demo model has 190 words
    is_demo = Path(str(manifest.source.get("checkpoint", ""))).name in _DEMO[1]
    return commands.command("generate", artifact, _DEMO[0] if is_demo else _PROMPT, *options)


def of_artifact(artifact: Path, manifest: Manifest) -> str:
    """After an export: generate with an artifact that a CPU runs, build engines of one that needs a GPU."""
    for_gpu = manifest.model.dtype == "bf16" or (
        manifest.quantization is not None and manifest.quantization.target == TENSORRT
    )
    return commands.command("build", artifact) if for_gpu else generate(artifact, manifest)


def after_build(artifact: Path, backend: str, engines: Path) -> str:
    """After a build: generate with the engines."""
    where = [] if engines == Path("engines") else ["--engines", str(engines)]
    return generate(artifact, manifests.load(artifact), "--backend", backend, *where)


def after_plan(path: str, forecast: dict[str, Any], device: str | None) -> str | None:
    """After a forecast: use the artifact; or export the checkpoint as forecast, if it fits; or forecast fewer
    bits, on a CPU."""
    fits = [label for row in forecast["devices"].values() for label, is_so in row["fits"].items() if is_so]
    if (Path(path) / manifests.FILE_NAME).is_file():
        if not fits:
            return None
        manifest = manifests.load(Path(path))
        on_gpu = device not in (None, "cpu") and not manifest.is_for_cpu
        return commands.command("build", path) if on_gpu else of_artifact(Path(path), manifest)
    how = forecast["quantised"]
    if not fits:
        smaller = {None: "w8a8", "w8a8": "int4"}.get(how and how["scheme"]) if device == "cpu" else None
        return smaller and commands.command("plan", path, "--device", "cpu", "--quantize", smaller)
    words = ["--checkpoint", path, "--dtype", forecast["model"]["dtype"]]
    if how is None:
        return commands.export(*words)
    target = ["--target", how["target"]] if how["scheme"] == "int4" else []
    return (
        commands.export(*words, "--quantize", how["scheme"], *target, "--data", "prompts.txt")
        + "  # prompts.txt: your prompts, one per line"
    )


def after_doctor(healthy: bool, fixes: list[str]) -> str | None:
    """The first fix if the runtime cannot run; else generate with an artifact that is here, or export one."""
    if not healthy:
        return fixes[0] if fixes else None
    for path in sorted(Path("artifacts").glob(f"*/{manifests.FILE_NAME}")):
        try:
            return of_artifact(path.parent, manifests.load(path.parent))
        except DllmError:
            continue
    return commands.export("--model", "llada") if commands.checkout() is not None else None
