"""Advice fits the installation: a checkout or a wheel, and a pip that is there; no message has a command of
its own."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from trt_runtime import backends, optional
from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError
from trt_runtime.machine import doctor
from trt_runtime.optional import import_optional
from trt_runtime.system import commands


@pytest.fixture
def python(tmp_path, monkeypatch):
    """A virtual environment below the current directory, without pip, that is not on the PATH."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    return folder


def _script(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)
    return path


def test_a_checkout_is_installed_in_place_and_a_wheel_by_its_name(python, monkeypatch, tmp_path):
    _script(python / "pip")
    assert commands.install("serve") == f".venv/bin/pip install -e {shlex.quote(f'{ROOT}[serve]')}"
    monkeypatch.setattr(commands, "checkout", lambda: tmp_path)
    assert commands.install("serve", "ray") == ".venv/bin/pip install -e '.[serve,ray]'"
    monkeypatch.setattr(commands, "checkout", lambda: None)
    assert commands.install("serve") == ".venv/bin/pip install 'dllm-trt[serve]'"
    assert commands.install("export") == ".venv/bin/pip install 'dllm-trt[export]'"
    assert commands.package("jinja2>=3.1.6", "x") == ".venv/bin/pip install 'jinja2>=3.1.6' x"


def test_the_pip_that_is_named_exists(python, monkeypatch):
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: None)
    assert commands.pip() == ".venv/bin/python -m ensurepip && .venv/bin/python -m pip"
    _script(python.parent.parent / "uv")
    monkeypatch.setenv("PATH", str(python.parent.parent))
    assert commands.pip() == "VIRTUAL_ENV=.venv uv pip"
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: object())
    assert commands.pip() == ".venv/bin/python -m pip"
    _script(python / "pip")
    assert commands.pip() == ".venv/bin/pip"
    monkeypatch.setenv("PATH", str(python))  # as in an environment that was activated
    assert commands.pip() == "pip"
    other = _script(python.parent.parent / "other" / "pip")
    monkeypatch.setenv("PATH", str(other.parent))  # another environment's
    assert commands.pip() == ".venv/bin/pip"


def test_the_program_that_is_named_exists(python, monkeypatch):
    assert commands.command("info", "a b") == ".venv/bin/python -m trt_runtime.cli info 'a b'"
    _script(python / "dllm-trt")
    assert commands.command("info", Path("it's")) == """.venv/bin/dllm-trt info 'it'"'"'s'"""
    monkeypatch.chdir("/")
    assert commands.command("doctor") == f"{python / 'dllm-trt'} doctor"
    monkeypatch.chdir(python)
    assert commands.command("doctor") == "./dllm-trt doctor"


def test_a_checkout_is_known_by_its_files(tmp_path, monkeypatch):
    assert commands.checkout() == ROOT
    shutil.copytree(ROOT / "trt_runtime", tmp_path / "site-packages" / "trt_runtime")
    script = (
        "from trt_runtime.system import commands as advice; from trt_runtime import backends; "
        "print(advice.checkout(), advice.install('serve'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "site-packages",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("None ") and done.stdout.rstrip().endswith("install 'dllm-trt[serve]'")


@pytest.mark.parametrize("in_checkout", [True, False])
def test_messages_of_missing_packages_carry_it(monkeypatch, demo_artifact, capsys, in_checkout):
    if not in_checkout:
        monkeypatch.setattr(commands, "checkout", lambda: None)

    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(optional.importlib, "import_module", absent)
    for command, expected in (
        (["serve"], commands.install("serve")),
        (["eval", "--tasks", "x"], commands.install("eval")),
        (["verify"], commands.install("export", "ort", "reference")),
        (["generate", "x"], commands.install("ort")),
        (["generate", "x", "--backend", "tensorrt-rtx"], commands.by_driver("rtx")),
        (["generate", "x", "--backend", "torch"], commands.install("export", "reference")),
        (["plan"], commands.install("export")),
    ):
        where = demo_artifact.parent if command[0] == "plan" else demo_artifact
        assert cli.main([command[0], str(where), *command[1:]]) == 1
        assert capsys.readouterr().err.endswith(f"{expected}.\n"), command
    with pytest.raises(DllmError, match=re.escape(commands.by_driver("trt"))):
        backends.open_backend("tensorrt", demo_artifact)


def test_the_doctors_table_carries_it(monkeypatch):
    monkeypatch.setattr(commands, "checkout", lambda: None)
    mends = {package.name: package.mend for package in doctor.packages()}
    assert mends["onnxruntime"] == commands.install("ort") and "'dllm-trt[ort]'" in mends["onnxruntime"]
    assert mends["torch"] == commands.install("reference") and mends["numpy"] == commands.package("numpy")
    monkeypatch.setattr(commands, "checkout", lambda: ROOT)
    mends = {package.name: package.mend for package in doctor.packages()}
    assert all(" -e " in mends[name] for name in ("onnxruntime", "torch", "onnx", "tensorrt"))


def test_no_message_has_an_installation_of_its_own():
    for folder in ("trt_runtime", "export"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name == "commands.py":
                continue
            texts = [
                node.value
                for node in ast.walk(ast.parse(path.read_text("utf-8")))
                if isinstance(node, ast.Constant)
            ]
            assert not [
                text for text in texts if isinstance(text, str) and re.search(r"\bpip (un)?install\b", text)
            ], path


def test_a_package_that_does_not_load_is_named(monkeypatch, demo_artifact, capsys, tmp_path):
    """Halves of a package of different versions raise other errors than ImportError; an error of this
    project's own modules keeps its traceback."""
    folder = tmp_path / "site-packages" / "halves"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemError('the other half is of another version')")
    (tmp_path / "user.py").write_text("import halves")
    (tmp_path / "faulty.py").write_text("raise SystemError('a fault')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(folder.parent)
    with pytest.raises(
        DllmError,
        match=r"^serve needs the package halves, but importing it failed \(SystemError: the other half "
        r".*--force-reinstall halves\.$",
    ):
        import_optional("user", "serve", "install it")
    with pytest.raises(SystemError, match="a fault"):
        import_optional("faulty", "serve", "install it")
