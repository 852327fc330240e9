"""The house rules that ruff does not check.

    python tools/lint_house.py [FOLDER ...]

sizes    functions of at most 60 lines, files of at most 350
names    nothing in trt_runtime/ and export/ is called held, made or found: a name says what a thing is
classes  no two public classes of trt_runtime/, export/ and plugins/ share a name; protocols and the modules
         of families (those that set FAMILY) are exempt
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("trt_runtime", "export", "plugins", "benchmarks", "tools", "tests")
MOST_OF_FUNCTION, MOST_OF_FILE = 60, 350
FILLER, WITHOUT_FILLER = {"held", "made", "found"}, ("trt_runtime", "export")
ONE_CLASS_PER_NAME = ("trt_runtime", "export", "plugins")


class File(NamedTuple):
    """A Python file: its path from the root, its text, its syntax tree."""

    path: Path
    text: str
    tree: ast.Module


def main() -> int:
    """Print one line per violation; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", default=FOLDERS, help="default: every folder with Python files")
    violations = check(ROOT, parser.parse_args().folders)
    print("\n".join(violations) or "the house rules hold")
    return 1 if violations else 0


def check(root: Path, folders: Iterable[str]) -> list[str]:
    """Every violation in some folders below a root, one line each."""
    files = [file for folder in folders for file in _files(root, folder)]
    return [
        *(line for file in files for line in sizes(file)),
        *(line for file in files if file.path.parts[0] in WITHOUT_FILLER for line in names(file)),
        *classes(file for file in files if file.path.parts[0] in ONE_CLASS_PER_NAME),
    ]


def _files(root: Path, folder: str) -> Iterator[File]:
    for path in sorted((root / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield File(path.relative_to(root), text, ast.parse(text))


def sizes(file: File) -> Iterator[str]:
    """Functions and files that are too long."""
    count = len(file.text.splitlines())
    if count > MOST_OF_FILE:
        yield f"{file.path}: {count} lines, expected at most {MOST_OF_FILE}: split it by subject"
    for node in ast.walk(file.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MOST_OF_FUNCTION:
                yield (
                    f"{file.path}:{node.lineno}: {node.name} has {length} lines, expected at most "
                    f"{MOST_OF_FUNCTION}: give its steps names of their own"
                )


def names(file: File) -> Iterator[str]:
    """Variables, arguments and attributes with a filler name. Keywords passed to other libraries assign
    nothing and are not reported."""
    for node in ast.walk(file.tree):
        name = _assigned(node)
        if name in FILLER:
            yield f"{file.path}:{node.lineno}: the name '{name}' says nothing: name what it is"


def _assigned(node: ast.AST) -> str | None:
    """The name that a node assigns, if any."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.attr
    if isinstance(node, ast.arg):
        return node.arg
    if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
        return node.name
    return node.asname if isinstance(node, ast.alias) else None


def classes(files: Iterable[File]) -> Iterator[str]:
    """Public classes with the name of an earlier one."""
    first: dict[str, str] = {}
    for file in files:
        if any(
            isinstance(node, ast.Assign) and _assigned(node.targets[0]) == "FAMILY" for node in file.tree.body
        ):
            continue
        for node in file.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not _is_protocol(node):
                place = f"{file.path}:{node.lineno}"
                if node.name in first:
                    yield f"{place}: another class {node.name} is in {first[node.name]}: rename one of them"
                first.setdefault(node.name, place)


def _is_protocol(node: ast.ClassDef) -> bool:
    return any("Protocol" in (getattr(base, "id", None), getattr(base, "attr", None)) for base in node.bases)


if __name__ == "__main__":
    sys.exit(main())
