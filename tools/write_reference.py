"""Write the pages of docs/reference that follow from the code: the command line, and the policies with their
options.

    python tools/write_reference.py            # write docs/reference/command-line.md and policies.md
    python tools/write_reference.py --check    # write nothing; exit status 1 if a page is stale
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from anywhere

from export import options as exporter  # noqa: E402
from trt_runtime.cli.main import build_parser as parser_of_runtime  # noqa: E402
from trt_runtime.decoding.plans import PLANS  # noqa: E402
from trt_runtime.decoding.policies import registry  # noqa: E402
from trt_runtime.decoding.policies.base import Policy  # noqa: E402
from trt_runtime.decoding.policies.options import options_of  # noqa: E402
from trt_runtime.decoding.policies.registry import POLICIES  # noqa: E402

REFERENCE = ROOT / "docs" / "reference"
WIDTH = 110
SHARED = ("decoding", "caches", "schedules and sampling", "the end and gaps", "backend")
MODEL = "generate"  # the command whose groups of options the others share
VALUES: dict[Any, str] = {int: "N", float: "X", Path: "PATH", None: "TEXT"}
NOTE = "<!-- Written by tools/write_reference.py from the code: edit the code, then run it. -->"
_DEFAULT = re.compile(r"\s*\(default:? ([^()]*)\)$")
_PAPER = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def main() -> int:
    """Write or check the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description="write the reference pages that follow from the code")
    parser.add_argument("--check", action="store_true", help="write nothing, and say which page is stale")
    check, stale = parser.parse_args().check, []
    for path, text in pages().items():
        name = path.relative_to(ROOT).as_posix()
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(f"{name} is stale: run 'python tools/write_reference.py'")
        elif not check:
            path.write_text(text, encoding="utf-8")
            print(f"{name} written")
    print("\n".join(stale), file=sys.stderr, end="\n" if stale else "")
    return 1 if stale else 0


def pages() -> dict[Path, str]:
    """The text of every page that is written."""
    return {REFERENCE / "command-line.md": command_line(), REFERENCE / "policies.md": policies()}


# the command line


def command_line() -> str:
    """Every command with its options, and the options that several commands share."""
    root = parser_of_runtime()
    found = next(a for a in root._actions if isinstance(a, argparse._SubParsersAction))
    parsers = {name: parser for name, parser in found.choices.items() if name != "export"}
    shared = {group.title: _rows(group) for group in parsers[MODEL]._action_groups if group.title in SHARED}
    export = exporter.build_parser("dllm-trt export")
    overview = {"export": export.description or "", **{n: p.description or "" for n, p in parsers.items()}}
    parts = ["# Command line", NOTE, _INTRODUCTION]
    rows = [(f"[`dllm-trt {n}`](#dllm-trt-{n})", _cell(text.splitlines()[0])) for n, text in overview.items()]
    parts += [_table(("command", "what it does"), rows)]
    parts += ["## `dllm-trt export`", *_section(export, {}), _EXPORT]
    for name, parser in parsers.items():
        parts += [f"## `dllm-trt {name}`", *_section(parser, shared)]
    parts += ["## Shared options", "Commands that take a group of these options name it."]
    for title, rows in shared.items():
        parts += [f"### {title.capitalize()}", _options(rows)]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """\
Every command follows the same rules:

- Results go to standard output. Notes, warnings, progress and summaries go to standard error, and `--quiet`
  (`-q`) silences them. Errors are always printed.
- An error is one line on standard error. The exit status is 0 for success, 1 for an error or a mismatch, 2
  for wrong usage and 130 for an interrupt (Ctrl-C).
- `--json` prints the result as one JSON value and nothing else on standard output. Numbers that JSON cannot
  express (NaN) become null.
- A task that takes longer than two seconds reports its progress on standard error, if that is a terminal. No
  progress is written to a file or a pipe.
- Options must be spelled out (`--threshold`, not `--thresh`). A misspelt option, command or value is answered
  with the nearest one that exists.
- `--version` prints the versions of dllm-trt, ONNX Runtime and Python. `--help` shows the options in groups,
  with an example.
- `NO_COLOR` in the environment turns colours off."""

_EXPORT = """\
`python -m export` in a checkout is the same command, and `make export` calls it. How the options work
together: [export a checkpoint](../how-to/export.md) and [quantise](../how-to/quantise.md)."""


def _section(parser: argparse.ArgumentParser, shared: dict[str | None, Any]) -> Iterator[str]:
    """A command: what it does, how it is called, its own options, and the groups that it shares."""
    yield _wrap(_whole(parser.description or ""))
    yield f"    {_usage(parser)}"
    own: list[tuple[str, ...]] = []
    borrowed: list[str] = []
    for group in parser._action_groups:
        rows = _rows(group)
        if rows and shared.get(group.title) == rows and group.title is not None:
            anchor = group.title.replace(" ", "-")
            names = ", ".join(f"`{_first(action)}`" for action in group._group_actions)
            borrowed.append(f"[{group.title.capitalize()}](#{anchor}): {names}.")
        else:
            own += rows
    if own:
        yield _options(own)
    if borrowed:
        yield "Shared options:"
        yield "\n".join(_wrap(line, "- ") for line in borrowed)


def _usage(parser: argparse.ArgumentParser) -> str:
    words = [parser.prog]
    for action in parser._actions:
        if not action.option_strings:
            name = str(action.metavar or action.dest.upper())
            words.append({"?": f"[{name}]", "*": f"[{name} ...]"}.get(str(action.nargs), name))
    return " ".join([*words, "[options]"])


def _rows(group: argparse._ArgumentGroup) -> list[tuple[str, ...]]:
    """The options of a group: names, value, default, meaning."""
    shown = [action for action in group._group_actions if action.option_strings and action.dest != "help"]
    return [_row(action) for action in shown]


def _row(action: argparse.Action) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    said, default = _described(action)
    if action.choices is not None:
        value = ", ".join(f"`{choice}`" for choice in action.choices)
    elif action.nargs == 0:
        value = ""
    else:
        value = f"`{action.metavar or VALUES.get(action.type, 'TEXT')}`"
    if isinstance(action, argparse._AppendAction):
        value += ", repeatable"
        said = said.replace(" (may be repeated)", "")
    return names, value, default, said


def _described(action: argparse.Action) -> tuple[str, str]:
    """An option's meaning and its default, which the help text holds together."""
    said = _whole(action.help or "")
    if action.dest in (known := registry.options()) and (item := known[action.dest]) and "(default" in said:
        return f"{_DEFAULT.sub('', said)}; {item.range}", f"`{item.default}`"
    if match := _DEFAULT.search(said):
        default, _, rest = match[1].partition("; ")
        return said[: match.start()] + (f"; {rest}" if rest else ""), default
    is_plain = action.default not in (None, False, True, argparse.SUPPRESS, "", []) and action.nargs != 0
    return said, f"`{action.default}`" if is_plain else ""


def _first(action: argparse.Action) -> str:
    return action.option_strings[0]


def _options(rows: Iterable[tuple[str, ...]]) -> str:
    return _table(("option", "value", "default", "meaning"), [tuple(map(_cell, row)) for row in rows])


# the policies


def policies() -> str:
    """Every policy of this project with its options, and the cache plans."""
    own = [policy for policy in POLICIES.all() if _is_ours(policy)]
    papers = _papers(own)
    parts = ["# Policies and cache plans", NOTE, _OF_POLICIES, "## Policies"]
    rows = []
    for policy in own:
        taken = ", ".join(f"`{item.name}`" for item in options_of(policy))
        steps = "yes" if policy.takes_steps() else ""
        rows.append((f"`{policy.name}`", _linked(_summary(policy)), _paper(policy, papers), taken, steps))
    parts += [
        _table(("policy", "what it commits", "paper", "options", "`steps`"), rows),
        "## Options",
        _OF_OPTIONS,
    ]
    options = []
    for name, item in registry.options().items():
        takers = [policy.name for policy in own if name in {each.name for each in options_of(policy)}]
        if takers:
            flag = f"--{name.replace('_', '-')}"
            options.append(
                (
                    f"`{name}`",
                    f"`{flag}`",
                    f"`{item.default}`",
                    item.range,
                    _cell(item.help),
                    ", ".join(takers),
                )
            )
    parts += [
        _table(("option", "flag", "default", "range", "meaning", "policies"), options),
        "## Cache plans",
        _OF_PLANS,
    ]
    plans = [
        (f"`{plan.name}`", _linked(_summary(plan)), "yes" if plan.keeps_cache else "no")
        for plan in PLANS.all()
        if _is_ours(plan)
    ]
    return "\n\n".join([*parts, _table(("plan", "what a forward computes and keeps", "cache"), plans)]) + "\n"


_OF_POLICIES = """\
A policy chooses which masked positions a forward commits; it commits at least one. Choose it with `--policy`
on the command line, `policy` in a request or in `GenerationConfig`. How the policies work:
[decoding](../explanation/decoding.md). To write one: [add a policy](../how-to/add-a-policy.md). The `steps`
column marks the policies that take `steps`, the number of forwards for the whole generation."""

_OF_OPTIONS = """\
Each option is declared once, in the policy that takes it. The command line, the server's request schema and
the checks of `GenerationConfig` follow from that declaration. An option of another policy than the chosen one
is refused."""

_OF_PLANS = """\
A cache plan chooses which forward a row makes next. Choose it with `--cache`. `refresh_every` and
`refresh_window` need a plan that keeps a cache; `suffix` and `suffix_decay` work with all of them. To write
one: [add a cache plan](../how-to/add-a-cache-plan.md)."""


def _is_ours(item: type[Any]) -> bool:
    return item.__module__.startswith("trt_runtime.")


def _papers(own: list[type[Policy]]) -> dict[str, str]:
    """Papers by the word that a docstring has before them: 'Fast-dLLM' -> '2505.22618'."""
    texts = " ".join(_whole(policy.__doc__ or "") for policy in own)
    return dict(re.findall(r"\(([\w-]+), arXiv (\d{4}\.\d{4,5})", texts))


def _paper(policy: type[Policy], papers: dict[str, str]) -> str:
    """The paper that a policy's docstring names, or that of a class which it extends."""
    texts = [_whole(each.__doc__ or "") for each in policy.__mro__ if each.__module__ == policy.__module__]
    named = [match[1] for text in texts if (match := _PAPER.search(text))]
    named += [number for word, number in papers.items() if word in texts[0]]
    return f"[arXiv {named[0]}](https://arxiv.org/abs/{named[0]})" if named else ""


def _summary(item: type[Any]) -> str:
    """The first paragraph of a docstring, without its paper."""
    text = _whole((item.__doc__ or "").split("\n\n")[0])
    return (
        re.sub(r"\(arXiv [\d.]+\)( ?)|, arXiv [\d.]+", r"\1", text)
        .replace("  ", " ")
        .replace(" :", ":")
        .replace(" .", ".")
    )


def _linked(text: str) -> str:
    return _cell(_PAPER.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text))


# Markdown


def _whole(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" not in text else text.replace("|", "\\|")


def _wrap(text: str, bullet: str = "") -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_on_hyphens=False,
        break_long_words=False,
    )


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(
        f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
