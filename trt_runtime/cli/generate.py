"""The commands that decode: generate (prompts) and chat (a conversation)."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trt_runtime.cli import parser as cli_parser
from trt_runtime.cli import render
from trt_runtime.cli.options import add_decoding, config_of, open_model
from trt_runtime.cli.parser import note, progress_of, report
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError, unknown
from trt_runtime.measure import examples
from trt_runtime.model import Model, Prompt, Result
from trt_runtime.system import screen

_HISTORY_LINES = 1000
_MOST_WORDS, _LONGEST_WORD = 20, 40  # of a warning: words, columns of each
_COMMANDS = {
    "/help": "this list",
    "/reset": "start a new conversation (also /new)",
    "/exit": "end (also /quit, Ctrl-D)",
}
_ALIASES = {"/new": "/reset", "/quit": "/exit"}


def add(commands) -> None:  # type: ignore[no-untyped-def]
    """Add the commands to the parser's subcommands."""
    example = 'artifacts/llada-demo "clean hall with mop" --stream'
    generate = cli_parser.command(
        commands, "generate", _generate, "complete one or several prompts", example=example
    )
    generate.add_argument(
        "prompt",
        nargs="*",
        help="prompts, decoded as one batch; '-' reads standard input, one prompt per line",
    )
    generate.add_argument(
        "--ids", action="append", default=[], metavar="1,2,3", help="a prompt as token ids (may be repeated)"
    )
    generate.add_argument(
        "--raw", action="store_true", help="use the prompt as it is, without the chat template"
    )
    generate.add_argument(
        "--stream", action="store_true", help="show the block in place while it is unmasked"
    )
    add_decoding(generate)
    cli_parser.add_output(generate, "the results")

    chat = cli_parser.command(commands, "chat", _chat, "talk to the model", example="artifacts/llada-demo")
    chat.add_argument("--single-turn", action="store_true", help="each line is a conversation of its own")
    add_decoding(chat)
    cli_parser.add_output(chat)


def _generate(args: argparse.Namespace) -> int:
    prompts: list[Prompt] = []
    for text in args.prompt:
        prompts += _lines() if text == "-" else [text]
    prompts += [_ids(text) for text in args.ids]
    if not prompts:
        raise DllmError("no prompt: give at least one, or '-' to read standard input.")
    if args.stream and (args.json or len(prompts) > 1):
        raise DllmError("--stream supports one prompt and no --json: remove --json, or give one prompt.")
    model = open_model(args)
    config = config_of(args, model.manifest)
    _warn_of_unknown_words(args, model, prompts)
    if args.stream:
        render.show_stream(model, prompts[0], config, raw=args.raw, quiet=args.quiet)
        return 0
    with progress_of(args).task("decoding" if len(prompts) == 1 else f"decoding {len(prompts)} prompts"):
        results = model.generate(prompts, config, raw=args.raw)
    if args.json:
        report(args, [_as_json(result) for result in results], "")
        return 0
    for prompt, result in zip(prompts, results, strict=True):
        if len(results) > 1:
            print(f"> {prompt}")
        print(render.answer(model, result, whole=args.infill))
        note(args, render.summary(result))
    return 0


def _lines() -> list[Prompt]:
    """Prompts from standard input, one per line."""
    return [line for _, line in examples.split_lines(sys.stdin.read())]


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        shown = text if len(text) <= 80 else text[:80] + "..."
        raise DllmError(
            f"--ids is {shown!r}, expected token ids separated by commas, like 12,7,300."
        ) from error


def _as_json(result: Result) -> dict[str, object]:
    return {
        **asdict(replace(result, trace=[])),
        "tokens_per_forward": result.tokens_per_forward,
        "trace": [step.with_confidence() for step in result.trace],
    }


def _warn_of_unknown_words(args: argparse.Namespace, model: Model, prompts: list[Prompt]) -> None:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if model.tokenizer and (
        words := list(dict.fromkeys(w for text in texts for w in model.tokenizer.unknown_words(text)))
    ):
        named = ", ".join(screen.fitted(word, _LONGEST_WORD) for word in words[:_MOST_WORDS])
        more = f" and {len(words) - _MOST_WORDS} more" if len(words) > _MOST_WORDS else ""
        note(args, f"warning: not in the model's vocabulary: {named}{more}")


def _chat(args: argparse.Namespace) -> int:
    model = open_model(args)
    if model.tokenizer is None or not model.tokenizer.has_chat_template:
        raise DllmError(f"{args.artifact}: has no chat template: use 'dllm-trt generate'.")
    config = config_of(args, model.manifest)
    config.resolved(model.manifest)
    return _Chat(args, model, config).run()


class _Chat:
    """A conversation. At a terminal, lines can be edited and are kept in a history, and Ctrl-C stops an
    answer but not the conversation."""

    def __init__(self, args: argparse.Namespace, model: Model, config: GenerationConfig) -> None:
        self.args, self.model, self.config = args, model, config
        self.is_typed = sys.stdin.isatty() and sys.stdout.isatty()
        self.history = _History() if self.is_typed else None
        self.messages: list[dict[str, str]] = []

    def run(self) -> int:
        """Answer lines until the input ends; returns the exit status."""
        note(self.args, "Ctrl-D or /exit ends, Ctrl-C stops an answer, /help lists the commands")
        was_stopped = False
        while True:
            try:
                line = input("> " if self.is_typed else "").strip()
                was_stopped = False
                if self.history is not None:
                    self.history.add(line)
                if line and not self._take(line):
                    return 0
            except EOFError:
                if self.is_typed:
                    print()
                return 0
            except KeyboardInterrupt:
                if not self.is_typed:
                    raise
                print()
                if was_stopped:
                    return 0
                note(self.args, "(Ctrl-C again, Ctrl-D or /exit ends)")
                was_stopped = True

    def _take(self, line: str) -> bool:
        """Answer a line or run its command; returns whether the conversation goes on."""
        if not line.startswith("/"):
            self._answer(line)
            return True
        name = _ALIASES.get(line, line)
        if name == "/exit":
            return False
        if name == "/reset":
            self.messages = []
            note(self.args, "new conversation")
        elif name == "/help":
            print("\n".join(f"{name:8} {text}" for name, text in _COMMANDS.items()))
        else:
            print(
                f"error: {unknown('command', line.split(maxsplit=1)[0], [*_COMMANDS, *_ALIASES])}",
                file=sys.stderr,
            )
        return True

    def _answer(self, line: str) -> None:
        kept = [] if self.args.single_turn else self.messages
        asked = [*kept, {"role": "user", "content": line}]
        try:
            _warn_of_unknown_words(self.args, self.model, [line])
            text = render.show_stream(self.model, asked, self.config, quiet=self.args.quiet)
        except DllmError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return
        except render.Stopped as stopped:
            if not self.is_typed:
                raise
            text = stopped.text
        except KeyboardInterrupt:  # before the first forward, or twice during one: there is no answer to keep
            if not self.is_typed:
                raise
            print("[stopped]")
            return
        self.messages = [*asked, {"role": "assistant", "content": text or ""}]


class _History:
    """The lines typed so far, kept in a file of the user's for later conversations. Empty if the file cannot
    be written or Python has no readline."""

    def __init__(self) -> None:
        self.readline: Any = None
        with suppress(ImportError):
            import readline

            self.readline = readline
        self.path = _state_home() / "dllm-trt" / "chat_history"
        if self.readline is None:
            return
        self.readline.set_auto_history(False)
        self.readline.set_history_length(_HISTORY_LINES)
        with suppress(OSError):
            self.readline.read_history_file(str(self.path))

    def add(self, line: str) -> None:
        """Append a line, unless it is empty or repeats the last one."""
        if self.readline is None or not line:
            return
        number = self.readline.get_current_history_length()
        if number and self.readline.get_history_item(number) == line:
            return
        self.readline.add_history(line)
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
            if hasattr(
                self.readline, "append_history_file"
            ):  # two open conversations keep each other's lines
                self.readline.append_history_file(1, str(self.path))
            else:
                self.readline.write_history_file(str(self.path))


def _state_home() -> Path:
    """XDG_STATE_HOME if it is an absolute path, else ~/.local/state."""
    named = os.environ.get("XDG_STATE_HOME", "")
    return Path(named) if os.path.isabs(named) else Path(os.path.expanduser("~")) / ".local" / "state"
