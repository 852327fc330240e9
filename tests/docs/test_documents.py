"""The commands of the documents, run as they stand there, from a folder that looks like a checkout after
`make demo`.

What takes long is asked for less of the same (an option given again counts). What names a model that is not
here (`artifacts/LLaDA-8B-Instruct`, `/path/to/checkpoint`) must say so in one line. `make` and the long
benchmarks have tests of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
from documents import DOCUMENTS, commands
from places import DEMO, ROOT
from serving import process_of

from export import cli as exporter
from trt_runtime.cli import main as cli

LESS = {
    "tune": ["--count", "2"],
    "eval": ["--limit", "1", "--mc-samples", "1"],
    "bench": ["--count", "1", "--repeats", "1"],
    "demo_prompts.py": ["--count", "3"],
    "host_loop.py": ["--rounds", "1"],
    "operators.py": ["--artifact", "artifacts/llada-demo"],
    "replay": [],
}
ELSEWHERE = {
    "full_size.py",
    "load.py",
    "gpu.py",
    "int8.py",
    "cpu_without.py",
    "system.py",
    "record_decoding.py",
    "frontier.py",
    "train_demo.py",
}  # tested on their own, or only their options
# documents whose commands all take long, or serve
ONLY_LONG = {"docs/benchmarks.md", "docs/how-to/serve.md", "docs/explanation/demo-model.md"}
COMMANDS = [(name, words) for name, words in commands() if words[0] != "make" and words[1] != "-m"]


@pytest.fixture(scope="module")
def place(demo_artifact, tmp_path_factory):
    """A folder with the demo artifact, a quantised one, and what documents name of the checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(demo_artifact, folder / "artifacts" / "llada-demo")
    for name in ("checkpoints", "benchmarks", "tools"):
        (folder / name).symlink_to(ROOT / name)
    command = [
        "--checkpoint",
        str(DEMO),
        "--out",
        str(folder / "artifacts" / "llada-demo-w8a8"),
        "--quantize",
        "w8a8",
        "--gate",
        "no",
        "--verify",
        "no",
    ]
    assert exporter.main(command) == 0
    return folder


def _is_here(words: list[str], place) -> bool:
    """Whether what a command is to work on exists."""
    named = [word for word in words if word.startswith(("artifacts/", "/path/")) or word == "ARTIFACT"]
    named += [after for word, after in pairwise(words) if word == "--checkpoint"]
    return all((place / word).exists() for word in named)


@pytest.mark.parametrize("document", sorted({name for name, _ in COMMANDS}))
def test_the_commands_run(document, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    ran = 0
    for _, (program, *given) in (item for item in COMMANDS if item[0] == document):
        words = [word.replace("/tmp/", f"{place}/") for word in given]
        short = words[0].rsplit("/", 1)[-1]
        if short in ELSEWHERE or words[0] == "serve":
            continue
        words += LESS.get(short, [])
        if words[0] == "plan" and not _is_here(words, place):  # it would look for a hub id of that name
            continue
        if program.endswith("python"):
            done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
            assert done.returncode == 0, (words, done.stderr)
            ran += 1
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO("clean hall with mop\n"))
        status = cli.main(words)
        out, error = capsys.readouterr()
        if _is_here(words, place):
            assert out and (status == 0 or words[0] == "doctor"), (words, error)
        else:
            assert status == 1 and error.startswith("error: ") and error.count("\n") == 1, (words, out, error)
        ran += 1
    assert ran or document in ONLY_LONG


def test_the_servers_of_the_documents_start_and_stop(place, monkeypatch):
    monkeypatch.chdir(place)
    served = [words[1:] for _, words in COMMANDS if words[1] == "serve" and "--ray" not in words]
    assert len(served) >= 2
    for words in served:
        running, url = process_of(place / words[1], *words[2:])
        try:
            assert url.startswith("http://127.0.0.1:")
        finally:
            running.terminate()
        assert running.wait(20) == 0
        running.stderr.close()


@pytest.mark.parametrize(
    "script",
    sorted(
        path.relative_to(ROOT).as_posix()
        for folder in ("tools", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if "ArgumentParser" in path.read_text(encoding="utf-8")
    ),
)
def test_every_script_explains_itself(script):
    """--help names every option that documents give it."""
    done = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for _, words in COMMANDS:
        if words[1] == script:
            assert all(word in done.stdout for word in words if word.startswith("--")), words


def test_links_to_the_world_are_well_formed():
    """No network here: an address must be https and of a kind that is known to stay."""
    found = [
        (path.name, url)
        for path in DOCUMENTS
        for url in re.findall(r"https?://[^\s)>`\"']+", path.read_text(encoding="utf-8"))
    ]
    assert len(found) > 3
    for name, url in found:
        if re.match(r"http://(127\.0\.0\.1|localhost)[:/]", url):
            continue
        assert re.fullmatch(
            r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|github\.com/[\w.-]+/[\w.-]+(/[\w./-]+)?|pypi\.org/project/[\w-]+/?)",
            url,
        ), (name, url)


_IMPORT = re.compile(
    r"^\s*(?:from ((?:export|trt_runtime|plugins)[\w.]*) import ([\w, ]+)|import (trt_runtime[\w.]*))", re.M
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_python_examples_import_exists(document):
    for module, names, whole in _IMPORT.findall((ROOT / document).read_text(encoding="utf-8")):
        found = importlib.import_module(module or whole)
        for name in filter(None, (item.split(" as ")[0].strip() for item in names.split(","))):
            assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module}.{name}"
