"""Options that several commands share: the backend's and those of decoding, checked."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from trt_runtime import backends
from trt_runtime.artifact.manifest import Manifest
from trt_runtime.cli.parser import as_json, progress_of
from trt_runtime.decoding.config import GenerationConfig, configured, option_names
from trt_runtime.decoding.plans import PLANS
from trt_runtime.decoding.policies import registry
from trt_runtime.decoding.policies.registry import POLICIES
from trt_runtime.errors import DllmError, check_counts
from trt_runtime.model import Model, load
from trt_runtime.registry import Registry

MAX_THREADS = 1024


def add_backend(command: argparse.ArgumentParser) -> None:
    """Add the options that choose and configure a backend."""
    parser = command.add_argument_group("backend")
    names = ", ".join(backends.names())
    parser.add_argument(
        "--backend",
        default=backends.DEFAULT,
        help=f"what runs the model: {names} (default {backends.DEFAULT})",
    )
    parser.add_argument("--threads", type=int, help="threads per forward (default: physical cores)")
    spin = "with ort: idle threads wait busily; faster with several threads on a machine of your own"
    parser.add_argument("--spin", action="store_true", default=None, help=spin)
    parser.add_argument(
        "--device", help="with ort: cpu (default) or cuda; with tensorrt: the GPU's number (default 0)"
    )
    parser.add_argument(
        "--steps-per-sync",
        "--steps-per-look",
        type=int,
        dest="steps_per_sync",
        metavar="N",
        help="refine steps that the device runs before the host synchronises with it (default 1; "
        "former name: --steps-per-look)",
    )
    parser.add_argument(
        "--engines", type=Path, help="with tensorrt: the engine cache of 'dllm-trt build' (default engines)"
    )
    parser.add_argument("--checkpoint", help="with torch: the checkpoint (default: the one in the manifest)")


def add_decoding(command: argparse.ArgumentParser) -> None:
    """Add the options that say how to decode; policies declare their own (`policies/options.py`)."""
    default = GenerationConfig()
    _add_policies(command.add_argument_group("decoding"), default)
    _add_caches(command.add_argument_group("caches"))
    parser = command.add_argument_group("schedules and sampling")
    takers = ", ".join(policy.name for policy in POLICIES.all() if policy.takes_steps())
    parser.add_argument("--steps", type=int, help=f"forwards in total (default: one per token); for {takers}")
    parser.add_argument(
        "--temperature",
        type=float,
        default=default.temperature,
        help="0 takes the most probable token (default 0)",
    )
    parser.add_argument(
        "--top-p", type=float, help="sample from the most probable tokens up to this total probability"
    )
    parser.add_argument("--top-k", type=int, help="sample from this many most probable tokens")
    parser.add_argument("--seed", type=int, help="seed of the random draws (default 0)")
    parser = command.add_argument_group("the end and gaps")
    parser.add_argument(
        "--no-stop-at-eos",
        dest="stop_at_eos",
        action="store_false",
        help="decode all of --gen-length instead of stopping at an end token",
    )
    parser.add_argument(
        "--hold-back-eos",
        action="store_true",
        default=None,
        help="commit an end token only when the block has no other token left to commit",
    )
    parser.add_argument("--infill", action="store_true", help="also fill the mask tokens in the prompt")
    add_backend(command)


def _add_policies(parser: argparse._ArgumentGroup, default: GenerationConfig) -> None:
    parser.add_argument("--gen-length", type=int, help="tokens to generate (default: the model's)")
    parser.add_argument("--block-length", type=int, help="tokens per block (default: the model's)")
    parser.add_argument(
        "--policy", help=f"{', '.join(POLICIES.names())}, or module:Class (default {default.policy})"
    )
    for name, item in registry.options().items():
        flag = f"--{name.replace('_', '-')}"
        help_text = (
            f"{item.help}; for {', '.join(registry.takers(name))} (default {item.default}, {item.range})"
        )
        if item.kind is bool:
            parser.add_argument(flag, action="store_true", default=None, help=help_text)
        else:
            parser.add_argument(flag, type=item.kind, help=help_text)
    parser.add_argument(
        "--speculate",
        type=int,
        help="refine steps that one batched call may verify; the answer stays the same (default 1)",
    )


def _add_caches(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--cache",
        help=f"{', '.join(PLANS.names())}, or module:Class (default dual; with block-causal attention block)",
    )
    parser.add_argument(
        "--refresh-every",
        type=int,
        help="rebuild the cache every N blocks; 0: only for the first (default 1)",
    )
    parser.add_argument(
        "--refresh-window",
        type=int,
        help="positions around a block to recompute when it begins without a rebuilt cache (default 0)",
    )
    parser.add_argument(
        "--suffix", type=int, help="mask tokens after the block that a forward sees (default: all)"
    )
    parser.add_argument(
        "--suffix-decay",
        action="store_true",
        default=None,
        help="space the mask tokens of --suffix at growing distances",
    )
    parser.add_argument(
        "--small-block",
        type=int,
        help="block-causal attention: positions of a block that are decoded before the next ones (default: "
        "the model's)",
    )
    parser.add_argument(
        "--fuse-stores",
        action=argparse.BooleanOptionalAction,
        help="block-causal attention: store a finished block by the first step of the next; same tokens, one "
        "forward fewer per block (default: where the model allows it)",
    )
    parser.add_argument(
        "--edit-threshold",
        type=float,
        help="block-causal attention: replace committed tokens of the running block where another token's "
        "confidence exceeds this (LLaDA2.1: 0.9; default: never)",
    )
    parser.add_argument(
        "--edit-steps",
        type=int,
        help="forwards that only look for edits, at most, once a block has no mask (default 16)",
    )


def load_modules(words: list[str]) -> None:
    """Import what --policy, --cache and --backend name as module:Name, so that the parser has their options.
    Raises DllmError."""
    registries: dict[str, Registry[Any]] = {
        "--policy": POLICIES,
        "--cache": PLANS,
        "--backend": backends.BACKENDS,
    }
    pairs = zip(words, [*words[1:], ""], strict=True)
    for flag, value in [(word.partition("=")[0], word.partition("=")[2] or after) for word, after in pairs]:
        if flag in registries and ":" in value:
            if "" not in sys.path:
                sys.path.insert(0, "")  # a module in the current directory, as for 'python -m'
            registries[flag].find(value)


def open_model(args: argparse.Namespace) -> Model:
    options = backend_options(args)
    with progress_of(args).task(f"opening {args.artifact}"):
        return load(args.artifact, args.backend, **options)


def backend_options(args: argparse.Namespace) -> dict[str, Any]:
    """The backend's options, checked."""
    options: dict[str, Any] = {}
    if args.threads is not None and not 1 <= args.threads <= MAX_THREADS:
        raise DllmError(f"--threads is {args.threads}, expected 1 to {MAX_THREADS}.")
    check_counts(args, "steps_per_sync")
    spec = backends.BACKENDS.find(args.backend)
    every = [backends.BACKENDS.find(name) for name in backends.names()]
    for name in dict.fromkeys(option for each in (*every, spec) for option in each.options):
        value = getattr(args, name, None)
        is_of_bench = name == "checkpoint" and name not in spec.options and getattr(args, "reference", False)
        if value is None or is_of_bench:  # bench hands the checkpoint to its variants on PyTorch
            continue
        if name not in spec.options:
            takers = [each.name for each in every if name in each.options]
            raise DllmError(
                f"--{name.replace('_', '-')} needs --backend {' or '.join(takers)}, got --backend "
                f"{args.backend}."
            )
        options[name] = value
    if "device" in options and not spec.devices:
        if not args.device.isdecimal():
            raise DllmError(
                f"--device is {args.device}, expected the number of a GPU with --backend {args.backend}."
            )
        options["device"] = int(args.device)
    return options


def config_of(args: argparse.Namespace, manifest: Manifest, *, may_draw: bool = False) -> GenerationConfig:
    """The given options, over those that were tuned for the artifact. may_draw: whether something other than
    these options may ask for random draws."""
    values = {name: value for name in option_names() if (value := getattr(args, name, None)) is not None}
    config = configured(values, manifest)
    if not may_draw and args.seed is not None and not config.draws:
        raise DllmError(
            "--seed has no effect without random draws: set --temperature or --alg-temp above 0, or use "
            "--policy origin."
        )
    return config


def write_json(path: Path, value: object) -> None:
    try:
        path.write_text(as_json(value, indent=None) + "\n", encoding="utf-8")
    except OSError as error:
        raise DllmError(f"{path}: cannot be written ({error.strerror}): choose another path.") from error
