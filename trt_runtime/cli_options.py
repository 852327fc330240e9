"""Options that several commands share: the backend's and those of decoding, checked."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from trt_runtime import backends
from trt_runtime.cli_parser import as_json, progress_of
from trt_runtime.config import CACHES, POLICIES, GenerationConfig, configured
from trt_runtime.errors import DllmError, check_counts
from trt_runtime.manifest import Manifest
from trt_runtime.model import Model, load

MAX_THREADS = 1024


def add_backend(command: argparse.ArgumentParser) -> None:
    parser = command.add_argument_group("backend")
    parser.add_argument("--backend", default="ort", help=f"what runs the model: {', '.join(backends.names())} (default ort)")
    parser.add_argument("--threads", type=int, help="threads of a matrix product (default: physical cores)")
    parser.add_argument("--device", help="of ort: cpu (default) or cuda; of tensorrt: the GPU's number (default 0)")
    parser.add_argument("--steps-per-look", type=int, help="refine steps that the device makes before the host looks (default 1)")
    parser.add_argument("--engines", type=Path, help="of tensorrt: where 'dllm-trt build' put the engines (default engines)")
    parser.add_argument("--checkpoint", help="for the torch backend: the checkpoint (default: the one in the manifest)")


def add_decoding(command: argparse.ArgumentParser) -> None:
    default = GenerationConfig()
    parser = command.add_argument_group("decoding")
    parser.add_argument("--gen-length", type=int, help="tokens to generate (default: the model's)")
    parser.add_argument("--block-length", type=int, help="tokens of a block (default: the model's)")
    parser.add_argument("--cache", help=f"{', '.join(CACHES)} (default {default.cache})")
    parser.add_argument("--policy", help=f"{', '.join(POLICIES)} (default {default.policy})")
    parser.add_argument(
        "--threshold", type=float, help="of 'threshold' and most adaptive policies: above 0, at most 1 (default 0.9)"
    )
    parser.add_argument("--factor", type=float, help="of the policy 'factor' (default 1.0)")
    parser.add_argument("--gamma", type=float, help="of the policy 'eb': sum of entropies in nats (default 0.1)")
    parser.add_argument("--alpha", type=float, help="of the policy 'dynamic': how far the threshold falls (default 0.3)")
    parser.add_argument("--low-threshold", type=float, help="of 'localleap', 'hierarchy', 'slowfast' (default 0.6)")
    parser.add_argument("--speculate", type=int, help="steps that one call may verify, without changing the answer (default 1)")
    parser = command.add_argument_group("caches")
    parser.add_argument(
        "--refresh-every", type=int, help="blocks from one rebuilt cache to the next; 0: the first alone (default 1)"
    )
    parser.add_argument(
        "--refresh-window", type=int, help="positions around a block that begins without a rebuilt cache (default 0)"
    )
    parser.add_argument("--suffix", type=int, help="masks behind the block that a forward sees (default all)")
    parser.add_argument("--suffix-decay", action="store_true", default=None, help="take those of --suffix at growing distances")
    parser = command.add_argument_group("schedules and sampling")
    parser.add_argument(
        "--steps", type=int, help="of a schedule: forwards in all (default one token a forward); bounds 'threshold'"
    )
    parser.add_argument("--alg-temp", type=float, help="of entropy, maskgit_plus, topk_margin: above 0, positions are drawn")
    parser.add_argument("--temperature", type=float, default=default.temperature, help="0 takes the best token (default 0)")
    parser.add_argument("--top-p", type=float, help="keep the most probable tokens up to this sum")
    parser.add_argument("--top-k", type=int, help="keep this many tokens")
    parser.add_argument("--seed", type=int, help="of what is drawn (default 0)")
    parser = command.add_argument_group("the end and gaps")
    parser.add_argument("--no-stop-at-eos", dest="stop_at_eos", action="store_false", help="decode all gen_length tokens")
    parser.add_argument(
        "--hold-back-eos",
        action="store_true",
        default=None,
        help="commit an end token only when nothing else is left in the block",
    )
    parser.add_argument("--infill", action="store_true", help="fill the mask tokens of the prompt")
    add_backend(command)


# options that only some backends take
_BACKEND_OPTIONS = {"threads": ("ort", "torch"), "device": ("ort", "tensorrt", "tensorrt-rtx"), "steps_per_look": ("ort", "tensorrt", "tensorrt-rtx"), "engines": ("tensorrt", "tensorrt-rtx"),
                    "checkpoint": ("torch",)}  # fmt: skip


def open_model(args: argparse.Namespace) -> Model:
    options = backend_options(args)
    with progress_of(args).task(f"opening {args.artifact}"):
        return load(args.artifact, args.backend, **options)


def backend_options(args: argparse.Namespace) -> dict[str, Any]:
    """The backend's options, checked."""
    options: dict[str, Any] = {}
    if args.threads is not None and not 1 <= args.threads <= MAX_THREADS:
        raise DllmError(f"--threads is {args.threads}, expected 1 to {MAX_THREADS}.")
    check_counts(args, "steps_per_look")
    for name, takers in _BACKEND_OPTIONS.items():
        value = getattr(args, name)
        is_of_bench = name == "checkpoint" and args.backend not in takers and getattr(args, "reference", False)
        if value is None or is_of_bench:  # bench hands the checkpoint to its variants on PyTorch
            continue
        if args.backend not in takers and args.backend in backends.names():
            raise DllmError(
                f"--{name.replace('_', '-')} goes with --backend {' or '.join(takers)}, got --backend {args.backend}."
            )
        options[name] = value
    if "device" in options and args.backend != "ort":
        if not args.device.isdecimal():
            raise DllmError(f"--device is {args.device}, expected the number of a GPU with --backend {args.backend}.")
        options["device"] = int(args.device)
    return options


def config_of(args: argparse.Namespace, manifest: Manifest, *, may_draw: bool = False) -> GenerationConfig:
    """The options that were given, over those that were tuned for the artifact. may_draw: whether something else than they may ask for draws."""
    if not may_draw and args.seed is not None and not args.temperature and not args.alg_temp and args.policy != "origin":
        raise DllmError("--seed goes with a --temperature or --alg-temp above 0, or --policy origin: else nothing is drawn.")
    values = {item.name: getattr(args, item.name) for item in fields(GenerationConfig)}
    return configured({name: value for name, value in values.items() if value is not None}, manifest)


def write_json(path: Path, value: object) -> None:
    try:
        path.write_text(as_json(value, indent=None) + "\n", encoding="utf-8")
    except OSError as error:
        raise DllmError(f"{path}: cannot be written ({error.strerror}): give another path.") from error
