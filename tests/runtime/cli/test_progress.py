"""Progress of long tasks on a terminal, and silence everywhere else."""

from __future__ import annotations

import io
import shutil
import sys

import pytest
from demo import PROMPT
from places import ROOT
from pseudo_terminal import Session
from screens import _Screen

from trt_runtime.system import screen
from trt_runtime.system.progress import Progress


class _Line(_Screen):
    pass


def test_progress_shows_what_runs_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr(screen, "size_of", lambda out: out.size)
    out = _Line(40, 5)
    progress = Progress(out, delay=0)
    with progress.task("measuring 日本", 4) as task:
        task.advance(2)
        progress.draw(now=True)
        assert out.terminal.text().startswith("measuring 日本: 2 of 4 (50 %)")
        with progress.task("a step whose name is much longer than the line of the terminal"):
            progress.draw(now=True)
            assert len(out.terminal.text().splitlines()) == 1 and out.terminal.text().startswith(
                "a step whose name"
            )
        task.doing("measuring more")
        progress.draw(now=True)
        assert out.terminal.text().startswith("measuring more")
    assert out.terminal.text() == ""
    assert list(progress.each([1, 2], "counting")) == [1, 2]
    weights = progress.begin("weights", 4_000_000, unit="B")
    weights.advance(1_000_000)
    progress.draw(now=True)
    assert "1 of 4 MB" in out.terminal.text()
    weights.end()
    assert out.terminal.text() == ""


def test_progress_is_silent_before_its_time_without_a_terminal_and_when_asked():
    out = _Screen(40, 5)
    for progress in (
        Progress(out, delay=1000),
        Progress(out, quiet=True, delay=0),
        Progress(io.StringIO(), delay=0),
    ):
        with progress.task("working"):
            progress.draw(now=True)
    assert out.terminal.received == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            [
                "bench",
                "ARTIFACT",
                "--count",
                "1",
                "--repeats",
                "1",
                "--variants",
                "dual",
                "--gen-length",
                "16",
            ],
            "measuring ort dual, round 1 of 1: ",
        ),
        (["replay", "ARTIFACT", "--record", "NEW", "--count", "3"], "recording cases on ort: "),
        (["generate", "ARTIFACT", PROMPT], "opening "),
        (["verify", "ARTIFACT"], "range, logits and cache: running both graphs"),
    ],
)
def test_what_takes_long_says_so_on_a_terminal(demo_artifact, tmp_path, words, said):
    copied = shutil.copytree(demo_artifact, tmp_path / "artifact")
    script = tmp_path / "at_once.py"
    script.write_text(
        "import sys\nfrom trt_runtime.system import progress\nprogress.DELAY, progress._REDRAW = 0.0, 0.0\n"
        "progress.Progress.__init__.__kwdefaults__['delay'] = 0.0\nfrom trt_runtime.cli import main as "
        "cli\nsys.exit(cli.main())\n"
    )
    words = [
        str(copied) if word == "ARTIFACT" else str(tmp_path / "new.json") if word == "NEW" else word
        for word in words
    ]
    session = Session(sys.executable, script, *words, columns=100, lines=24, PYTHONPATH=str(ROOT))
    assert session.end() == 0
    assert said in session.terminal.received and said not in session.terminal.text()
    if words[0] == "verify":
        return  # silent by the same means as the others, and long
    session = Session(sys.executable, script, *words, "--quiet", columns=100, lines=24, PYTHONPATH=str(ROOT))
    assert session.end() == 0
    assert said not in session.terminal.received


def test_a_quantised_export_says_what_it_does(tmp_path):
    script, data = tmp_path / "at_once.py", tmp_path / "data.txt"
    script.write_text(
        "import sys\nfrom trt_runtime.system import progress\nprogress._REDRAW = 0.0\n"
        "progress.Progress.__init__.__kwdefaults__['delay'] = 0.0\nfrom export import "
        "cli\nsys.exit(cli.main())\n"
    )
    data.write_text("clean hall with mop\nfind red keys in attic\n")
    session = Session(
        sys.executable,
        script,
        "--model",
        "llada",
        "--out",
        tmp_path / "a",
        "--quantize",
        "w8a8",
        "--data",
        data,
        "--gate",
        "yes",
        "--verify",
        "no",
        columns=120,
        lines=24,
        PYTHONPATH=str(ROOT),
    )
    session.end()
    for said in (
        "for the comparison",
        "gate: decoding prompts with the original model: 1 of 2",
        "weights: ",
        "gate: commits, forced: 1 of 2",
        "gate: decoding prompts again: 1 of 2",
        "gate: canvases: ",
    ):
        assert said in session.terminal.received and said not in session.terminal.text(), said
