"""The project itself: what the wheel holds, how fast and how lean the import is, and that the documents tell
the truth."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import zipfile

import pytest
from documents import DOCUMENTS, commands
from places import ROOT

from export import options as exporter
from trt_runtime.cli import main as cli

# folder of the checkout -> package of the wheel
PACKAGES = {"trt_runtime": "trt_runtime", "export": "dllm_trt_export", "plugins": "dllm_trt_plugins"}
HELD = [
    f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
    for folder, package in PACKAGES.items()
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".html", ".typed")
]


def test_the_wheel_holds_the_runtime_the_exporter_and_the_kernels(tmp_path):
    """Under names of their own: site-packages has no `export` and no `plugins`."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(archive.read(n).decode() for n in names if n.endswith("METADATA"))
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(HELD)
    required = re.findall(r"Requires-Dist: ([\w-]+)(?![^\n]*extra ==)", metadata)
    assert sorted(required) == ["jinja2", "numpy", "tokenizers", "wcwidth"]


def test_the_import_is_lean():
    """What takes long to import, or may not be installed, is imported by its users alone."""
    heavy = (
        "onnxruntime",
        "onnx",
        "torch",
        "transformers",
        "tokenizers",
        "jinja2",
        "fastapi",
        "uvicorn",
        "ray",
        "lm_eval",
        "cuda",
        "tensorrt",
        "asyncio",
        "multiprocessing",
        "importlib.metadata",
    )
    script = f"import sys, trt_runtime; trt_runtime.load; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_exporting_needs_no_torch(tmp_path):
    """Graph building and weight streaming never import torch or transformers."""
    script = (
        "import sys\nfrom export import cli\n"
        f"assert cli.main(['--model', 'llada', '--out', {str(tmp_path / 'a')!r}, '--verify', 'no']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_exist(document):
    text = document.read_text(encoding="utf-8")
    for name in re.findall(
        r"`((?:trt_runtime|export|tools|tests|benchmarks|docs|checkpoints)/[\w./-]+)`", text
    ):
        assert (ROOT / name).exists() or "/<" in name, f"{document.name} names {name}"


def test_the_reference_pages_follow_from_the_code():
    """Every command, option and policy is on its page, with the help and default of the code."""
    script = ROOT / "tools" / "write_reference.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    top = cli.build_parser()
    (commands,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    assert re.findall(r"^## `dllm-trt ([\w-]+)`", page, re.M) == list(commands.choices)
    for name, command in commands.choices.items():
        parser = exporter.build_parser() if name == "export" else command
        options = {option for action in parser._actions for option in action.option_strings}
        for option in options - {"-h", "--help", "--version"}:
            assert f"`{option}`" in page, (name, option)


def test_every_command_of_the_documents_is_one():
    """dllm-trt: its own parser takes it. python: the script is there and knows the options. make: the target
    is there."""
    parser, seen = cli.build_parser(), {"dllm-trt": 0, "python": 0, "make": 0}
    for where, (program, *words) in commands():
        kind = program.rsplit("/", 1)[-1]
        seen[kind] += 1
        if kind == "dllm-trt" and words[0] == "export":
            exporter.build_parser().parse_args(words[1:])
        elif kind == "dllm-trt":
            parser.parse_args(words)  # exits where it does not fit
        elif kind == "make":
            done = subprocess.run(
                ["make", "--no-print-directory", "-n", *words],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (where, words, done.stderr)
        elif words[0] != "-m":
            text = (ROOT / words[0]).read_text(encoding="utf-8")
            assert all(f'"{word}"' in text for word in words if word.startswith("--")), (where, words)
    assert seen["dllm-trt"] > 15 and seen["python"] > 3 and seen["make"] > 5, seen


def test_what_the_readme_uses_is_installed_first():
    """The first line of a section installs the extras that its commands name, but for the reference, which
    their comments name."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Use it\n\n```\n")[1].split("```")[0]
    first, *rest = section.splitlines()
    installed = set(
        re.fullmatch(r"\.venv/bin/pip install -c constraints\.txt -e '\.\[([\w,]+)\]' *(#.*)?", first)[
            1
        ].split(",")
    )
    commands = {words[1] for line in rest if len(words := shlex.split(line, comments=True)) > 1}
    assert {"serve", "eval"} & commands <= installed
    named = set(re.findall(r"(\w+) extra", section))
    assert named - {"reference"} <= installed and {"serve", "eval"} <= named


def test_make_help_lists_the_targets():
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "help",
        "demo",
        "export",
        "engines",
        "test-fast",
        "test",
        "lint",
        "docs",
        "bench",
        "frontier",
        "gpu-report",
        "clean",
        "distclean",
    ]


def test_nothing_refers_to_this_machine():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in tracked:
        data = (ROOT / name).read_bytes()
        assert b"../shar" + b"ed" not in data and b"/wo" + b"rk/" not in data, name


def test_the_python_example_of_the_documents_runs(demo_artifact, tmp_path, capsys, monkeypatch):
    (example,) = re.findall(
        r"```python\n(.*?)```",
        (ROOT / "docs" / "reference" / "python-api.md").read_text(encoding="utf-8"),
        re.S,
    )
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "llada-demo").symlink_to(demo_artifact)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/reference/python-api.md", "exec"), {})
    printed = capsys.readouterr().out
    assert '"kitchen"' in printed and '"in": "hall", "with": "mop"' in printed and "forwards:" in printed
