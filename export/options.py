"""The exporter's options: its parser, and what the options say about the export."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from trt_runtime.artifact import contract
from trt_runtime.artifact.manifest import ATTENTIONS, TARGETS, TENSORRT
from trt_runtime.cli import parser as cli_parser
from trt_runtime.cli.parser import say
from trt_runtime.errors import DllmError
from trt_runtime.measure.examples import MATCHES
from trt_runtime.system import commands

from . import families
from .graph.lowering import LOWERINGS
from .pipeline import ExportConfig
from .quantize.export import QuantizeConfig
from .schemes import NAMES
from .weights.plan import MODES

# what is exported without --checkpoint: its path in the checkout, and its title
DEMO_CHECKPOINTS = {
    "llada": ("checkpoints/llada-demo", "the demo checkpoint"),
    "sdar": ("checkpoints/sdar-demo", "the block-causal demo checkpoint"),
    "dream": ("tests/data/goldens/dream_tiny", "a tiny random checkpoint (its text means nothing)"),
}


def build_parser(prog: str = "python -m export") -> cli_parser.Parser:
    """The parser of the exporter. prog: the command as it was typed."""
    parser = cli_parser.Parser(
        prog=prog,
        description="Export a diffusion LLM's checkpoint to an artifact: two ONNX graphs over one weights "
        "file.",
        epilog=f"models: {', '.join(families.names())}. Without --checkpoint the demo checkpoint of the "
        f"model is exported.\n\n"
        f"example:\n  {prog} --model llada --checkpoint GSAI-ML/LLaDA-8B-Instruct --dtype bf16",
    )
    parser.add_argument("--version", action=cli_parser.Version)
    _add_model(parser)
    _add_quantization(parser)
    option = parser.add_argument
    option("--overwrite", action="store_true", help="replace an existing artifact")
    verify = "compare with PyTorch afterwards; 'auto' (default) does so if torch and transformers are "
    verify += "installed and the memory suffices"
    option("--verify", choices=("auto", "yes", "no"), default="auto", help=verify)
    cli_parser.add_output(parser, "what was exported, and the verification,")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--model", help="the model type; checked against the checkpoint's config.json")
    checkpoint = "a checkpoint directory (config.json, *.safetensors), or a hub id org/name[@revision]"
    option("--checkpoint", help=checkpoint)
    option("--out", type=Path, help="the artifact directory to write (default artifacts/NAME)")
    dtype = "dtype of weights and caches (default fp32)"
    option("--dtype", choices=list(contract.DTYPES), default="fp32", help=dtype)
    head = "'logits' adds the logits to the outputs; ONNX Runtime needs no such export (default statistics)"
    option("--head", choices=contract.HEADS, default="statistics", help=head)
    lowering = "'modern' is opset 24, 'legacy' opset 17; 'auto' is modern unless the installed ONNX Runtime "
    lowering += "is older than 1.24"
    option("--lowering", choices=("auto", *LOWERINGS), default="auto", help=lowering)
    ignore = "an unknown key of config.json that does not change the computation (may be repeated)"
    option("--ignore-key", action="append", default=[], metavar="KEY", help=ignore)
    mask = "the mask token, as text or id, if neither config.json nor the tokenizer names the right one"
    option("--mask-token", metavar="TOKEN", help=mask)
    attention = "the checkpoint's attention, for model types whose config.json does not say (a2d-qwen3, ...)"
    option("--attention", choices=ATTENTIONS, help=attention)
    length = (
        "the block length of block-causal attention that the checkpoint was trained with, if config.json "
    )
    length += "does not say it"
    option("--block-length", type=int, metavar="N", help=length)
    weights = (
        "'link' uses the checkpoint's own files in place (same dtype): seconds, and no copy (default copy)"
    )
    option("--weights", choices=MODES, default="copy", help=weights)


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    quantize = "linear layers in fewer bits: w8a8 or int4 on a CPU, fp8, int8-sq or int4 with TensorRT; "
    quantize += "needs --data"
    option("--quantize", choices=NAMES, help=quantize)
    target = "with --quantize int4, which both have (default ort-cpu); without --quantize, ort-cpu computes "
    target += "experts by ONNX Runtime's own operator, for a CPU"
    option("--target", choices=TARGETS, help=target)
    data = "with --quantize: one prompt per line, or JSON lines with prompts and answers, to calibrate with "
    data += "and to measure the quality on"
    option("--data", type=Path, help=data)
    match = "with --data: how answers are compared: exact (default), or json (the same values)"
    option("--match", choices=MATCHES, default="exact", help=match)
    gate = "with --quantize: 'no' skips the measurement of the quality (default yes)"
    option("--gate", choices=("yes", "no"), default="yes", help=gate)


def config_of(args: argparse.Namespace) -> ExportConfig:
    """The export that the options describe. Raises DllmError."""
    checkpoint = args.checkpoint if args.checkpoint is not None else _demo_checkpoint(args)
    suffix = f"-{args.quantize}" if args.quantize else ""
    return ExportConfig(
        checkpoint,
        args.out or Path("artifacts") / (_name_of(checkpoint) + suffix),
        args.dtype,
        args.head,
        lowering_of(args.lowering, lambda line: say(args, line)),
        args.model,
        tuple(args.ignore_key),
        args.overwrite,
        args.weights,
        args.mask_token,
        args.attention,
        args.block_length,
        None if args.quantize else args.target,
    )


def quantization_of(args: argparse.Namespace) -> QuantizeConfig | None:
    """The quantisation that the options describe; None without --quantize. Raises DllmError."""
    if args.quantize is not None:
        return QuantizeConfig(args.quantize, args.target, args.data, args.match, args.gate == "yes")
    if args.target == TENSORRT:
        raise DllmError(f"--target {TENSORRT} needs --quantize int4: remove it: every artifact runs there.")
    for name, default in (("data", None), ("match", "exact"), ("gate", "yes")):
        if getattr(args, name) != default:
            raise DllmError(f"--{name} needs --quantize: remove it, or add --quantize SCHEME.")
    return None


def lowering_of(asked: str, say: Callable[[str], object] = print) -> str:
    """The lowering for 'auto': modern, unless the installed ONNX Runtime is too old for it."""
    if asked != "auto":
        return asked
    try:
        major, minor = importlib.metadata.version("onnxruntime").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return "modern"
    if (int(major), int(minor)) >= (1, 24):
        return "modern"
    say(f"onnxruntime {major}.{minor} has no opset 24: exporting with --lowering legacy (opset 17)")
    return "legacy"


def _name_of(checkpoint: str) -> str:
    """A directory's own name, or the model's part of a hub id."""
    path = Path(checkpoint)
    return path.resolve().name if path.is_dir() else checkpoint.rpartition("/")[2].split("@")[0]


def _demo_checkpoint(args: argparse.Namespace) -> str:
    name = (args.model or "llada").lower()
    if name not in DEMO_CHECKPOINTS:
        families.find(name)  # names what exists if the model is unknown
        raise DllmError(f"no demo checkpoint for '{name}': give one with CHECKPOINT=dir (--checkpoint).")
    path, title = DEMO_CHECKPOINTS[name]
    root = commands.checkout()
    if root is None and not Path(path).exists():
        raise DllmError(
            f"no checkpoint: give one with --checkpoint ({title} is in the repository, {path}, not in the "
            f"wheel)."
        )
    shown = path if root is None or Path(path).exists() else str(root / path)
    say(args, f"no checkpoint given: exporting {title} {shown}")
    return shown
