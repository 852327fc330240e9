"""The command line of the exporter: options -> ExportConfig -> pipeline, with a progress bar and the verification after it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from export import families, quantize, uptodate
from export.lowering import LOWERINGS
from export.pipeline import ExportConfig, export, read
from export.quantization import NAMES
from export.weights import MODES
from trt_runtime import advice, atomic, contract, next_steps
from trt_runtime import manifest as manifests
from trt_runtime.devices import GIB, meminfo
from trt_runtime.errors import DllmError
from trt_runtime.examples import MATCHES
from trt_runtime.manifest import TARGETS, Manifest, ModelFacts
from trt_runtime.plan import LAYOUTS, Work, memory

_FOR_CPU = "DTYPE=fp32 (--dtype fp32), or QUANTIZE=w8a8 (--quantize w8a8)"
# what is exported without --checkpoint, and what it is
DEMO_CHECKPOINTS = {
    "llada": ("checkpoints/llada-demo", "the demo checkpoint"),
    "dream": ("tests/data/goldens/dream_tiny", "a tiny random checkpoint (no text to expect of it)"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the exporter; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    atomic.end_on_signals()  # so that the temporary directory is removed
    try:
        return _run(args)
    except DllmError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: {error.filename or args.out}: {error.strerror}: nothing was written; check the disk and the rights.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Export a diffusion LLM's checkpoint to an artifact: two ONNX graphs over one weights file.",
        epilog=f"models: {', '.join(families.names())}. Without --checkpoint the demo checkpoint of the model is exported.",
    )
    parser.add_argument("--model", help="the model type; checked against the checkpoint's config.json")
    parser.add_argument(
        "--checkpoint", help="a checkpoint directory (config.json, *.safetensors), or a hub id org/name[@revision]"
    )
    parser.add_argument("--out", type=Path, help="the artifact directory to write (default artifacts/NAME)")
    parser.add_argument("--dtype", choices=list(contract.DTYPES), default="fp32", help="of weights and caches (default fp32)")
    parser.add_argument(
        "--head", choices=contract.HEADS, default="statistics",
        help="'logits' adds the logits to the outputs; ONNX Runtime has them anyway (default statistics)",
    )  # fmt: skip
    parser.add_argument(
        "--lowering", choices=("auto", *LOWERINGS), default="auto",
        help="'modern' is opset 24, 'legacy' opset 17; 'auto' is modern unless the ONNX Runtime here is older than 1.24",
    )  # fmt: skip
    parser.add_argument(
        "--ignore-key", action="append", default=[], metavar="KEY",
        help="a key of config.json that is not known and does not change the computation (may be repeated)",
    )  # fmt: skip
    parser.add_argument(
        "--mask-token", metavar="TOKEN",
        help="the mask token, as its text or its id, where neither config.json nor the tokenizer names it, or names another",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=MODES, default="copy",
        help="'link' uses the checkpoint's own files where they lie (same dtype), in seconds and without a copy (default copy)",
    )  # fmt: skip
    parser.add_argument(
        "--quantize", choices=NAMES,
        help="linear layers in fewer bits: w8a8 or int4 on a CPU, fp8, int8-sq or int4 with TensorRT; judged with --data",
    )  # fmt: skip
    parser.add_argument("--target", choices=TARGETS, help="of --quantize int4, which both have (default ort-cpu)")
    parser.add_argument(
        "--data",
        type=Path,
        help="of --quantize: a prompt a line, or lines of JSON with prompt and answers, to calibrate and judge it on",
    )
    parser.add_argument(
        "--match", choices=MATCHES, default="exact", help="of --data: how answers are compared: exact (default), or json: values"
    )
    parser.add_argument(
        "--gate",
        choices=("yes", "no"),
        default="yes",
        help="of --quantize: 'no' leaves out the measurement of its quality (default yes)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an artifact that is there already")
    parser.add_argument(
        "--verify", choices=("auto", "yes", "no"), default="auto",
        help="compare with PyTorch afterwards; 'auto' (default) does so if torch and transformers are there and the memory suffices",
    )  # fmt: skip
    return parser


def _run(args: argparse.Namespace) -> int:
    checkpoint = args.checkpoint if args.checkpoint is not None else _demo_checkpoint(args.model)
    suffix = f"-{args.quantize}" if args.quantize else ""
    out = args.out or Path("artifacts") / (_name_of(checkpoint) + suffix)
    config = ExportConfig(
        checkpoint,
        out,
        args.dtype,
        args.head,
        _lowering(args.lowering),
        args.model,
        tuple(args.ignore_key),
        args.overwrite,
        args.weights,
        args.mask_token,
    )
    can_verify = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    if args.verify == "yes" and not can_verify:
        raise DllmError(f"--verify yes needs torch and transformers: {advice.install('reference')}, or leave it out.")
    how = _quantize_config(args)
    inputs = uptodate.inputs_of(config, how)
    manifest = None if args.overwrite else uptodate.current(out, inputs)
    if manifest is not None:
        read(config.checkpoint, config.family, config.ignored_keys)  # --model must still be the checkpoint's
        print(
            f"{out}: up to date: made by this version from the same files and options; OVERWRITE=1 (--overwrite) makes it again"
        )
    else:
        if args.dtype == "bf16" and how is None:
            _note(f"ONNX Runtime computes no bf16 on a CPU: this artifact is for TensorRT; for a CPU export {_FOR_CPU}")
        begin = time.perf_counter()
        manifest = uptodate.noted(_export(config, how), inputs, out)
        size = sum(facts.size for facts in manifest.files.values())
        print(f"{out}: {manifest.model.parameters / 1e6:,.1f} M parameters, {args.dtype}, {size / 1e6:,.1f} MB, "
              f"{time.perf_counter() - begin:.1f} s")  # fmt: skip
    passed = _verified(out, manifest, args.verify, can_verify)
    if passed and not (vars(args).get("quiet") or vars(args).get("json")):
        next_steps.hint(next_steps.of_artifact(out, manifest))
    return 0 if passed else 1


def _verified(out: Path, manifest: Manifest, asked: str, can_verify: bool) -> bool:
    """Compare with PyTorch, if that was asked for or can be done; False where the artifact is known to decode otherwise."""
    if manifest.verified is not None:
        passed = bool(manifest.verified.get("passed"))
        print("verified before: the result is in the manifest" if passed else "NOT VERIFIED before: do not deploy this artifact")
        return passed
    if asked == "no":
        return True
    if not can_verify:
        print(f"not verified: torch and transformers are not installed ({advice.install('reference')})")
        return True
    needed, free = _verification_bytes(manifest.model), meminfo("MemAvailable")
    if asked == "auto" and free and needed > free and manifest.quantization is None:
        print(f"not verified: it would take about {needed / GIB:.0f} GiB of memory, {free / GIB:.0f} GiB are available: run "
              f"'{advice.command('verify', out)}' on a larger machine, or add --verify yes")  # fmt: skip
        return True
    return verify(out, None)


def _quantize_config(args: argparse.Namespace) -> quantize.QuantizeConfig | None:
    if args.quantize is not None:
        return quantize.QuantizeConfig(args.quantize, args.target, args.data, args.match, args.gate == "yes")
    for name, default in (("target", None), ("data", None), ("match", "exact"), ("gate", "yes")):
        if getattr(args, name) != default:
            raise DllmError(f"--{name} goes with --quantize: leave it out, or say how to quantise.")
    return None


def _export(config: ExportConfig, how: quantize.QuantizeConfig | None) -> Manifest:
    return export(config, _progress, _note) if how is None else quantize.export(config, how, _progress, _note)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _verification_bytes(facts: ModelFacts) -> int:
    """Memory of a verification: the reference in fp32, and ONNX Runtime beside it."""
    dtype = "fp32" if facts.dtype == "bf16" else facts.dtype  # by a twin
    work = Work(batch=2, length=64, block_length=32)
    return sum(memory(replace(facts, dtype=kind), work, layout, on_cpu=True).total
               for kind, layout in ((dtype, LAYOUTS[0]), ("fp32", LAYOUTS[-1])))  # fmt: skip


def _name_of(checkpoint: str) -> str:
    """A directory's own name, or the model's part of a hub id."""
    return Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint.rpartition("/")[2].split("@")[0]


def verify_layers(artifact: Path, checkpoint: str | None) -> bool:
    """Print the residual stream beside the reference's, layer by layer; whether all agree."""
    from export.layers import table
    from export.verify import bisect

    tables = bisect(artifact, checkpoint)
    for kind, rows in tables.items():
        print(f"{kind}: residual stream after each layer, beside PyTorch's")
        for line in table(rows):
            print(f"  {line}")
    bad = [f"{kind}: {row.name}" for kind, rows in tables.items() for row in rows if not row.passed]
    print(f"it begins at {bad[0]}" if bad else "all layers agree")
    return not bad


def verify(artifact: Path, checkpoint: str | None) -> bool:
    """Run the verification and print its stages; whether all passed."""
    from export.verify import verify as run_verification

    passed, is_quantised = True, manifests.load(artifact).quantization is not None
    print(f"verifying {artifact} against {'its checkpoint' if is_quantised else 'the PyTorch reference'}")
    for stage in run_verification(artifact, checkpoint):
        print(f"  {stage}", flush=True)
        passed = passed and stage.passed
    where = "" if is_quantised else f"; 'dllm-trt verify {artifact} --layers' shows where it begins"
    print("verified: the result is in the manifest" if passed else f"NOT VERIFIED: do not deploy this artifact{where}")
    return passed


def _lowering(asked: str) -> str:
    if asked != "auto":
        return asked
    try:
        major, minor = importlib.metadata.version("onnxruntime").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return "modern"
    if (int(major), int(minor)) >= (1, 24):
        return "modern"
    print(f"onnxruntime {major}.{minor} has no opset 24: exporting with --lowering legacy (opset 17)")
    return "legacy"


def _demo_checkpoint(model: str | None) -> str:
    name = (model or "llada").lower()
    if name not in DEMO_CHECKPOINTS:
        families.find(name)  # names what exists if the model is unknown
        raise DllmError(f"no demo checkpoint for '{name}': give one with CHECKPOINT=dir (--checkpoint).")
    path, title = DEMO_CHECKPOINTS[name]
    shown = path if Path(path).exists() else str(Path(__file__).resolve().parents[1] / path)
    print(f"no checkpoint given: exporting {title} {shown}")
    return shown


def _progress(total: int) -> Callable[[int], object]:
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None)

    def advance(done: int) -> None:
        bar.update(done)
        if bar.n >= total:
            bar.close()

    return advance
