"""The project's documents, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from places import ROOT

DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(
        part.startswith(".") or part in ("artifacts", "build") for part in path.relative_to(ROOT).parts
    )
)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command in a code block of the documents, and the scripts that their text names, without
    comments: the document's path in the checkout, and the words."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        scripts = [f"{found}\n" for found in re.findall(r"`(python \w+/[^`]+)`", text)]
        for block in [*re.findall(r"^```\n(.*?)^```", text, re.M | re.S), *scripts]:
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                words = (
                    shlex.split(line, comments=True)
                    if re.match(r"(\S*/)?(dllm-trt|python|make) ", line)
                    else []
                )
                if words:
                    yield document.relative_to(ROOT).as_posix(), words
