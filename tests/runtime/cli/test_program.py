"""How every command begins and ends: closed streams, interrupts, errors of libraries, options that are
misspelt or out of all range, JSON."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from demo import PROMPT
from messages import is_one_line
from places import DEMO, ROOT

from export import cli as exporter
from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError
from trt_runtime.system import program

COMMAND = f"{sys.executable} -m trt_runtime.cli"


def _shell(words):
    return subprocess.run(
        ["sh", "-c", words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("info ARTIFACT <&-", 0, ""),
        ("info ARTIFACT >&-", 1, "standard output is closed"),
        ("info ARTIFACT --json >&-", 1, "standard output is closed"),
        ("info ARTIFACT 2>&-", 0, ""),
        ("info ARTIFACT/none 2>&-", 1, ""),
        ("info ARTIFACT/none <&- >&- 2>&-", 1, ""),
        ("generate ARTIFACT - <&-", 1, "standard input is closed"),
        ("chat ARTIFACT -q <&-", 1, "standard input is closed"),
        ("info ARTIFACT > /dev/full", 1, "No space left on device"),
        ("info ARTIFACT/none 2> /dev/full", 1, ""),
    ],
)
def test_standard_streams_that_are_closed_or_full(demo_artifact, words, status, said):
    done = _shell(f"{COMMAND} {words.replace('ARTIFACT', str(demo_artifact))}")
    assert done.returncode == status, done.stderr
    assert (is_one_line(done.stderr) and said in done.stderr) if said else not done.stderr
    assert done.stdout == "" or "2>&-" in words or "<&-" in words


def test_files_do_not_get_the_numbers_of_closed_streams(demo_artifact):
    script = (
        "import os\nfrom trt_runtime.system import program\nprogram.run(lambda argv: "
        "print(os.open('/dev/null', 0)) or 0, [])"
    )
    done = _shell(f'{sys.executable} -c "{script}" <&- 2>&-')
    assert int(done.stdout) > 2


def test_a_reader_that_has_gone_is_no_traceback(demo_artifact):
    done = _shell(f"{COMMAND} info {demo_artifact} --json | true")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "command", [("trt_runtime.cli", "doctor"), ("export", "--model", "dreem", "--verify", "no")]
)
def test_an_interrupt_is_one_line_from_the_first_moment_on(command):
    """A signal at each step of the program's life: while it imports, works, and ends."""
    seen = set()
    for module in (
        "trt_runtime.system.program",
        "trt_runtime.cli.parser",
        "numpy",
        "trt_runtime.system.progress",
        "export.families",
        "onnxruntime",
    ):
        hook = (
            "import sys, os, signal, runpy\n"
            "class Hook:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name == {module!r} and self in sys.meta_path:\n"
            "            sys.meta_path.remove(self)\n"
            "            os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.meta_path.insert(0, Hook())\n"
            f"sys.argv = {['x', *command[1:]]!r}\n"
            f"runpy.run_module({command[0]!r}, run_name='__main__')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", hook], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
        )
        if done.returncode == 130:
            assert (
                done.stderr.splitlines()[-1].startswith("interrupted") and "Traceback" not in done.stderr
            ), done.stderr
            assert done.stderr.count("\n") == 1
            seen.add(module)
    assert {"trt_runtime.system.program", "trt_runtime.system.progress"} <= seen and len(seen) >= 4, seen


def test_an_interrupt_of_a_running_command_is_one_line(demo_artifact):
    script = (
        "import sys\nfrom trt_runtime.cli import main as cli\nfrom trt_runtime import model\ndef slow(*_, "
        "**__):\n    print('running', flush=True)\n    import time\n"
        "    time.sleep(60)\nmodel.Model.generate = slow\nsys.exit(cli.main())\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", script, "generate", str(demo_artifact), PROMPT],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout.readline() == "running\n"
    running.send_signal(signal.SIGINT)
    out, error = running.communicate(timeout=60)
    assert (running.returncode, out, error) == (130, "", "interrupted\n")


def test_imports_end_before_an_interrupt_of_them(monkeypatch):
    done = []
    with pytest.raises(KeyboardInterrupt), program.importing():
        signal.raise_signal(signal.SIGINT)
        done.append("the import")
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


class PanicException(BaseException):
    """What PyO3 makes of a panic in Rust."""


def _raising(error):
    def work(argv):
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 153. TiB"), "out of memory (Unable to allocate 153. TiB)"),
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (PanicException("called `Result::unwrap()` on an `Err` value:\nRegex"), "a Rust library failed"),
        (RuntimeError("Symlink loop from '/a/b'"), "/a/b: a circular symbolic link"),
        (OSError(40, "Too many levels of symbolic links", "/a/b"), "/a/b: Too many levels"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "use UTF-8"),
        (DllmError("one\ntwo"), "one two"),
    ],
)
def test_errors_of_libraries_areis_one_line(capsys, error, said):
    assert program.run(_raising(error), []) == 1
    printed = capsys.readouterr().err
    assert is_one_line(printed) and said in printed


def test_a_fault_of_this_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        program.run(_raising(ZeroDivisionError()), [])


def test_an_interrupt_behind_another_error_is_an_interrupt(capsys):
    error = ImportError("initialisation failed")
    error.__cause__ = KeyboardInterrupt()
    assert program.run(_raising(error), []) == 130 and capsys.readouterr().err == "interrupted\n"


def test_memory_that_is_not_there_is_one_line(demo_artifact, capsys, monkeypatch):
    from trt_runtime.model import Model

    monkeypatch.setattr(Model, "generate", lambda *_, **__: np.empty((1 << 46,), np.float64))
    assert cli.main(["generate", str(demo_artifact), PROMPT]) == 1
    assert "out of memory" in capsys.readouterr().err


def test_paths_that_no_library_takes_are_said(tmp_path, demo_artifact, capsys):
    loop, strange = tmp_path / "loop", tmp_path / "o\udcff"
    loop.symlink_to(loop)
    for out, said in (
        (loop, "a circular symbolic link"),
        (loop / "x", "a circular symbolic link"),
        (strange, "not UTF-8"),
        (strange / "x", "not UTF-8"),
    ):
        assert exporter.main(["--model", "llada", "--out", str(out), "--verify", "no", "-q"]) == 1
        error = capsys.readouterr().err
        assert (
            error.count("\n") == 1
            and (said in error or "Too many levels" in error)
            and "tokenizer" not in error
        )
    assert cli.main(["info", str(strange)]) == 1
    assert "not UTF-8" in capsys.readouterr().err


def test_a_relative_path_in_a_directory_that_is_no_text(tmp_path, capsys, monkeypatch):
    (tmp_path / "o\udcff").mkdir()
    monkeypatch.chdir(tmp_path / "o\udcff")
    assert exporter.main(["--checkpoint", str(DEMO), "--out", "x", "--verify", "no"]) == 1
    assert "not UTF-8" in capsys.readouterr().err


def test_quiet_leaves_the_answer_alone(demo_artifact, capsys):
    for words in (
        ["generate", str(demo_artifact), "take zeppelins from kitchen to garage", "-q"],
        ["generate", str(demo_artifact), "take zeppelins from kitchen to garage", "--stream", "--quiet"],
    ):
        assert cli.main(words) == 0
        printed = capsys.readouterr()
        assert printed.out.startswith("[{") and printed.err == ""
    assert cli.main(["generate", str(demo_artifact / "none"), "x", "-q"]) == 1
    assert is_one_line(capsys.readouterr().err)


def test_quiet_silences_the_notes_of_an_export(tmp_path, capsys):
    bare = shutil.copytree(
        DEMO,
        tmp_path / "checkpoint",
        ignore=shutil.ignore_patterns("tokenizer*", "chat_template*", "special*"),
    )
    for more in ([], ["--quiet"]):
        assert (
            exporter.main(
                [
                    "--checkpoint",
                    str(bare),
                    "--out",
                    str(tmp_path / "a"),
                    "--verify",
                    "no",
                    "--overwrite",
                    *more,
                ]
            )
            == 0
        )
        assert bool(capsys.readouterr().err) is not bool(more)


def test_an_interrupted_verification_says_what_was_written(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "verify", interrupted)
    assert exporter.main(["--model", "llada", "--out", str(tmp_path / "a"), "--verify", "yes"]) == 130
    assert (
        "was written but not verified" in capsys.readouterr().err
        and (tmp_path / "a" / "manifest.json").is_file()
    )


def test_the_import_of_the_command_line_is_light():
    script = (
        "import sys; from trt_runtime.cli import main as cli; print(sorted({'numpy', 'typing', "
        "'argparse', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_stdin_is_read_line_by_line(demo_artifact, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n\nclean hall with mop"))
    assert cli.main(["generate", str(demo_artifact), "-", "-q"]) == 0
    assert capsys.readouterr().out.count("[{") == 2
