"""What all commands share: a parser whose errors are one line, the output options, and reports as text or
JSON."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from trt_runtime import __version__
from trt_runtime.errors import DllmError
from trt_runtime.system.progress import SILENT, Progress

# the largest value of each integer option: far above any real use, far below what would hang or exhaust
# memory
_TOKENS = 1 << 22
_MOST = {
    "count": 100_000,
    "repeats": 10_000,
    "prompt_length": _TOKENS,
    "gen_length": _TOKENS,
    "block_length": _TOKENS,
    "max_length": _TOKENS,
    "length": _TOKENS,
    "max_rows": _TOKENS,
    "tokens_per_step": _TOKENS,
    "suffix": _TOKENS,
    "refresh_every": _TOKENS,
    "refresh_window": _TOKENS,
    "batch": 65_536,
    "max_batch": 65_536,
    "slots": 65_536,
    "steps_per_sync": 65_536,
    "lanes": 1024,
    "ray": 1024,
    "queue": 1_000_000,
    "mc_samples": 1_000_000,
    "num_fewshot": 10_000,
    "max_body": 1 << 40,
    "seed": (1 << 63) - 1,
}
_MOST_OTHERS = (1 << 31) - 1
_LONGEST = 300  # characters of an error about what was typed


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and suggest the nearest name. Options cannot be abbreviated."""

    def __init__(self, *args: Any, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "allow_abbrev": False,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
        }
        super().__init__(*args, **defaults | options)

    def error(self, message: str) -> NoReturn:
        if len(message) > _LONGEST:
            message = message[:_LONGEST] + "..."
        print(
            f"error: {' '.join(message.split())} ('{self.prog} --help' lists what there is)", file=sys.stderr
        )
        sys.exit(2)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, strange = self.parse_known_args(args, namespace)
        if strange:
            getattr(parsed, "parser", self).refuse(strange)
        return parsed

    def refuse(self, strange: list[str]) -> NoReturn:
        """Exit with an error about arguments that no option takes."""
        known = [name for action in self._actions for name in action.option_strings]
        hints = [
            hint
            for word in strange
            if word.startswith("-") and (hint := did_you_mean(word.partition("=")[0], known))
        ]
        self.error(f"unrecognized arguments: {' '.join(strange)}" + (f":{hints[0]}" if hints else ""))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"unknown {str(value)!r}:{did_you_mean(str(value), known)} known: {', '.join(known)}"
            )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' did you mean X?' with the nearest known name, or ''."""
    names = list(known)
    near = [name for name in names if len(word) > 3 and name.startswith(word)] or difflib.get_close_matches(
        word, names, n=1
    )
    return f" did you mean {near[0]}?" if near else ""


class Version(argparse.Action):
    """--version: the versions of this package, ONNX Runtime and Python."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(
            option_strings,
            argparse.SUPPRESS,
            nargs=0,
            help="show the versions of dllm-trt, ONNX Runtime and Python",
        )

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(versions())
        parser.exit()


def versions() -> str:
    """The line of --version, without importing anything. ONNX Runtime's package has several names."""
    lines = {f"dllm-trt {__version__}": None}
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            lines[f"{package} {importlib.metadata.version(package)}"] = None
        except importlib.metadata.PackageNotFoundError:
            continue
    if len(lines) == 1:
        lines["no onnxruntime"] = None
    return ", ".join([*lines, f"Python {platform.python_version()}"])


def add_output(parser: argparse.ArgumentParser, as_json: str = "", output: str = "") -> None:
    """Add the options about output. as_json: what --json prints, if the command has it; output: what --output
    does, if the command has it."""
    group = parser.add_argument_group("output")
    if output:
        group.add_argument("--output", type=Path, metavar="OUT.json", help=output)
    if as_json:
        group.add_argument(
            "--json",
            action="store_true",
            help=f"print {as_json} as JSON on standard output, and nothing else",
        )
    group.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        help="print no notes, warnings, progress or summaries on standard error",
    )


def command(  # type: ignore[no-untyped-def]
    commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    takes: str = "",
    example: str = "",
) -> argparse.ArgumentParser:
    """Add a subcommand. takes: its positional argument, an artifact by default, '-' for none; example: the
    arguments of the example in its help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[:1].upper() + text[1:] + ".",
        epilog=f"example:\n  dllm-trt {name} {example}".rstrip(),
    )
    if takes and takes != "-":
        parser.add_argument(
            "model",
            metavar=takes,
            help="an artifact, a checkpoint's directory (config.json is enough), or a hub id",
        )
    elif not takes:
        parser.add_argument("artifact", type=Path, help="the directory that an export wrote")
    parser.set_defaults(run=run, parser=parser)
    return parser


def execute(args: argparse.Namespace) -> int:
    """Run the parsed command; with --json, everything but the report goes to standard error."""
    check(args)
    args.stdout, args.progress = sys.stdout, Progress(quiet=args.quiet)
    if not getattr(args, "json", False):
        return int(args.run(args))
    with redirect_stdout(sys.stderr):
        status = int(args.run(args))
    sys.stdout.flush()
    return status


def check(args: argparse.Namespace) -> None:
    """Raise DllmError for a number that is far too large, or a path that the libraries cannot open."""
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value > (most := _MOST.get(name, _MOST_OTHERS))
        ):
            shown = str(value) if value < 1 << 64 else "a number of more than 64 bits"
            raise DllmError(f"{option} is {shown}, expected at most {most}.")
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path) and not _is_text(os.path.abspath(path)):
                raise DllmError(
                    f"the path {os.path.abspath(path)!a} has bytes that are not UTF-8, which ONNX and its "
                    f"tools cannot open: rename that directory or file, or choose another path."
                )


def _is_text(path: str) -> bool:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def progress_of(args: argparse.Namespace) -> Progress:
    return getattr(args, "progress", SILENT)


def note(args: argparse.Namespace, line: str) -> None:
    """Print a line on standard error, unless --quiet."""
    if not args.quiet:
        progress_of(args).say(line, sys.stderr)


def hint(args: argparse.Namespace, command_of: Callable[[], str | None]) -> None:
    """Suggest the next command on standard error, unless --json or --quiet."""
    if not args.json and not args.quiet and (suggested := command_of()) is not None:
        note(args, f"next: {suggested}")


def say(args: argparse.Namespace, line: str) -> None:
    """Print a line ahead of the report: with --json on standard error, or nowhere if --quiet is given too."""
    if not (args.json and args.quiet):
        progress_of(args).say(line)


def report(args: argparse.Namespace, value: object, text: str) -> None:
    """Print a command's result as JSON or as text."""
    progress_of(args).clear()
    print(as_json(value) if args.json else text, file=args.stdout, flush=True)


def as_json(value: object, indent: int | None = 1) -> str:
    """Strict JSON: NaN and infinities become null, paths and other values strings."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):  # a NumPy number
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
