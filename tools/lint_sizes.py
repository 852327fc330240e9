"""What ruff does not check: functions of at most 60 lines, files of at most 350, and words of the glossary.

python tools/lint_sizes.py [FOLDER ...]
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("trt_runtime", "export", "plugins", "benchmarks", "tools", "tests")
MOST_OF_FUNCTION, MOST_OF_FILE = 60, 350


def main() -> int:
    """Print what is too long; returns the exit status."""
    parser = argparse.ArgumentParser(description="functions of at most 60 lines, files of at most 350")
    parser.add_argument("folders", nargs="*", default=FOLDERS, help="default: every folder with Python files")
    found = [line for folder in parser.parse_args().folders for line in check(ROOT / folder)]
    print(
        "\n".join(found) or f"functions have at most {MOST_OF_FUNCTION} lines, files at most {MOST_OF_FILE}"
    )
    return 1 if found else 0


def check(folder: Path) -> Iterator[str]:
    """What is too long below a folder, a line each."""
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        where, count = path.relative_to(ROOT), len(text.splitlines())
        if count > MOST_OF_FILE:
            yield f"{where}: {count} lines, expected at most {MOST_OF_FILE}: take it apart"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MOST_OF_FUNCTION:
                    yield (
                        f"{where}:{node.lineno}: {node.name} has {length} lines, expected at most "
                        f"{MOST_OF_FUNCTION}"
                    )


if __name__ == "__main__":
    sys.exit(main())
