"""tools/lint_house.py reports each violation of the house rules, and nothing else."""

from __future__ import annotations

import sys

import lint_house
import pytest


@pytest.fixture
def lint(tmp_path, monkeypatch, capsys):
    """Lint files, given as path -> text; returns the exit status and the lines printed."""

    def run(files, *folders):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(lint_house, "ROOT", tmp_path)
        monkeypatch.setattr(sys, "argv", ["lint_house.py", *folders])
        return lint_house.main(), capsys.readouterr().out.splitlines()

    return run


def test_a_file_or_a_function_that_is_too_long(lint):
    function = "def long():\n" + "    pass\n" * 60
    status, lines = lint(
        {"tools/a.py": function, "tests/b.py": "x = 1\n" * 351, "tests/c.py": "x = 1\n" * 350}
    )
    assert status == 1 and len(lines) == 2
    assert lines[0].startswith("tools/a.py:1: long has 61 lines, expected at most 60")
    assert lines[1].startswith("tests/b.py: 351 lines, expected at most 350")


@pytest.mark.parametrize(
    "text",
    [
        "held = 1",
        "x, made = 1, 2",
        "found: int",
        "for held in (): pass",
        "with open('x') as made: pass",
        "if (found := 1): pass",
        "x = [held for held in ()]",
        "def f(made): pass",
        "def f(*, found=1): pass",
        "x = lambda held: 1",
        "x.made = 1",
        "import x as found",
        "try: pass\nexcept OSError as held: pass",
    ],
)
@pytest.mark.parametrize("folder", ["trt_runtime", "export/deep"])
def test_a_filler_name(text, folder, lint):
    status, lines = lint({f"{folder}/a.py": text})
    assert status == 1 and len(lines) == 1
    assert lines[0].startswith(f"{folder}/a.py:{2 if 'except' in text else 1}: the name '")


def test_filler_names_elsewhere_and_of_other_libraries(lint):
    files = {
        "tests/a.py": "held = 1",
        "plugins/a.py": "made = 1",
        "trt_runtime/a.py": "x = f(found=1)\nmade_by = x.held\n",
    }
    assert lint(files) == (0, ["the house rules hold"])


def test_two_public_classes_of_one_name(lint):
    text = "class Call:\n    class Inner: pass\n"
    status, lines = lint({"trt_runtime/a.py": text, "export/b.py": f"x = 1\n{text}", "tools/c.py": text})
    assert status == 1
    assert lines == ["export/b.py:2: another class Call is in trt_runtime/a.py:1: rename one of them"]


def test_protocols_private_classes_and_families_may_share_a_name(lint):
    files = {
        "trt_runtime/a.py": "class Call: pass\nclass _Own: pass\n",
        "export/a.py": "class Call(Protocol): pass\nclass _Own: pass\n",
        "export/b.py": "class Call(typing.Protocol): pass\n",
        "export/families/c.py": "class Call: pass\nFAMILY = Call()\n",
    }
    assert lint(files) == (0, ["the house rules hold"])


def test_only_the_named_folders_are_checked(lint):
    files = {"tools/a.py": "x = 1\n" * 351, "tests/a.py": "x = 1\n"}
    assert lint(files, "tests") == (0, ["the house rules hold"])
    assert lint(files, "tests", "tools")[0] == 1
