"""The command line `dllm-trt`: reads the arguments and runs one command.

Each command's options are next to the function that runs it: generate.py (generate, chat), serve.py
(serve, triton-repo), artifact.py (info, verify, polygraphy), machine.py (plan, doctor, build), measure.py
(replay, bench), evaluate.py (eval, tune). Nothing heavy is imported before a command runs, so that an
interrupt during start-up is one line and not a traceback.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # the same in `typing`, whose import takes longer than all of this file
if TYPE_CHECKING:
    from trt_runtime.cli.parser import Parser


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 success, 1 an error or a mismatch, 2 wrong usage, 130
    interrupted."""
    try:
        from trt_runtime.system import program
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return program.run(_run, argv)


def _run(argv: list[str] | None) -> int:
    from trt_runtime.system import program

    words = sys.argv[1:] if argv is None else argv
    with program.importing(at_once=argv is None):
        from trt_runtime.cli import parser as cli_parser

        if words[:1] == ["export"]:
            return _export(words[1:])
        from trt_runtime.cli.options import load_modules

        load_modules(words)
        parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse does not take prompts that follow an option
    if any(item.startswith("-") and item != "-" for item in rest) or (rest and not hasattr(args, "prompt")):
        args.parser.refuse(rest)
    if rest:
        args.prompt += rest
    return cli_parser.execute(args)


def build_parser() -> Parser:
    """The parser of all commands; `export` has one of its own (`_export`)."""
    from trt_runtime.cli import artifact, evaluate, generate, machine, measure, serve
    from trt_runtime.cli import parser as cli_parser

    parser = cli_parser.Parser(
        prog="dllm-trt",
        description="Decode diffusion LLMs from an exported artifact.",
        epilog="'dllm-trt COMMAND --help' lists a command's options, with an example.",
    )
    parser.add_argument("--version", action=cli_parser.Version)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    commands.add_parser("export", help="make an artifact from a checkpoint (export extra)", add_help=False)
    for group in (generate, serve, artifact, machine, measure, evaluate):
        group.add(commands)
    return parser


def _export(words: list[str]) -> int:
    """Run the exporter, which has a parser of its own (`python -m export`)."""
    from trt_runtime.optional import import_optional
    from trt_runtime.system import commands

    exporter = import_optional("export.cli", "export", commands.install("export"))
    status: int = exporter.main(words, prog="dllm-trt export")
    return status
