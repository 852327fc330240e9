"""The parsers: bounds of numbers, guesses for misspelt words, versions, help."""

from __future__ import annotations

import argparse

import pytest
from messages import is_one_line

from export import cli as exporter
from export import options as exporter_options
from trt_runtime import __version__
from trt_runtime.cli import main as cli
from trt_runtime.cli import parser as cli_parser
from trt_runtime.errors import DllmError


def _parsers():
    top = cli.build_parser()
    (subcommands,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    return subcommands.choices | {"export": exporter_options.build_parser()}


def test_every_whole_number_has_an_upper_bound():
    checked = 0
    for name, parser in _parsers().items():
        for action in parser._actions:
            if action.type is int:
                with pytest.raises(DllmError, match="expected at most"):
                    cli_parser.check(argparse.Namespace(**{action.dest: 1 << 64}))
                checked += 1
        words = {
            "plan": ["x"],
            "triton-repo": ["x", "y"],
            "polygraphy": ["x", "y"],
            "replay": ["x", "y"],
            "doctor": [],
            "export": [],
        }.get(name, ["x"])
        words += {"eval": ["--tasks", "x"], "tune": ["--data", "x"]}.get(name, [])
        cli_parser.check(parser.parse_args(words))  # the defaults are in range
    assert checked > 60


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "x", "y", "--treshold", "0.5"], "did you mean --threshold?"),
        (["generate", "x", "y", "--thresh", "0.5"], "did you mean --threshold?"),
        (["generate", "x", "y", "--treshold=0.5"], "did you mean --threshold?"),
        (["bench", "x", "--repeat", "1"], "did you mean --repeats?"),
        (["genrate", "x"], "did you mean generate?"),
        (["info", "x", "--jsn"], "did you mean --json?"),
        (["info", "x", "--zzzzzzzz"], "unrecognized arguments: --zzzzzzzz ("),
        (["generate", "x", "--ids", "1", "--threads", "9" * 5000], "invalid int value"),
    ],
)
def test_what_is_misspelt_is_one_line_with_a_guess(capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and is_one_line(error) and said in error and len(error) < 500


def test_misspelt_options_of_the_export(capsys):
    for words, said in (
        (["--quantise", "w8a8"], "--quantize?"),
        (["--quantize", "w8a9"], "did you mean w8a8?"),
    ):
        with pytest.raises(SystemExit) as stop:
            exporter.main(words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and is_one_line(error) and said in error


def test_versions(capsys):
    for main in (cli.main, exporter.main):
        with pytest.raises(SystemExit) as stop:
            main(["--version"])
        assert stop.value.code == 0
        assert capsys.readouterr().out.startswith(f"dllm-trt {__version__}, onnxruntime 1.")


def test_help_is_grouped_and_spelled_right():
    for name, parser in _parsers().items():
        page = parser.format_help()
        assert "example:\n  " in page and "--quiet" in page, name
        for wrong in ("openai's", "tensorrt ", "triton inference", "http.", "pytorch ", "json "):
            assert wrong not in parser.description.replace("tensorrt-rtx", ""), (name, wrong)
    page = cli.build_parser().format_help()
    for right in (
        "OpenAI's API over HTTP",
        "TensorRT engines",
        "Triton Inference Server",
        "PyTorch reference",
        "--version",
    ):
        assert right in page
    generate = _parsers()["generate"].format_help()
    assert all(
        f"\n{title}:\n" in generate
        for title in ("decoding", "caches", "schedules and sampling", "backend", "output")
    )
