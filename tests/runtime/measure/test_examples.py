"""Files of prompts as editors and programs write them: every line whole, its number that of the file."""

from __future__ import annotations

import codecs
import io
import json
import sys
from types import SimpleNamespace

import pytest

from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError
from trt_runtime.measure import bench, examples
from trt_runtime.measure.examples import Example

INSIDE = [
    "\u2028",
    "\u2029",
    "\x85",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1d",
    "\x1e",
    "\r",
]  # str.splitlines would end a line there
BOM = codecs.BOM_UTF8


@pytest.mark.parametrize("char", INSIDE, ids=ascii)
def test_only_a_line_feed_ends_a_line(char, tmp_path):
    path, prompt = tmp_path / "data", f"clean hall{char}with mop"
    path.write_bytes(f"{prompt}\nfind keys\n".encode())
    assert examples.read(path) == [Example(prompt, None), Example("find keys", None)]
    assert examples.lines_of(path) == [prompt, "find keys"]
    path.write_bytes(json.dumps({"prompt": prompt, "answers": [char]}, ensure_ascii=False).encode() + b"\n")
    if char in ("\u2028", "\u2029", "\x85"):  # JSON lets no other stand unescaped
        assert examples.read(path) == [Example(prompt, (char,))]


@pytest.mark.parametrize("bom", [b"", BOM], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "open"])
def test_marks_and_line_ends_of_windows_are_no_text(bom, end, last, tmp_path):
    path = tmp_path / "data"
    plain = ["clean hall", "", "   ", "find keys \t"]
    path.write_bytes(bom + end.join(plain).encode() + end.encode() * last)
    assert examples.read(path) == [Example("clean hall", None), Example("find keys \t", None)]
    assert [number for number, _ in examples.numbered_lines(path)] == [1, 4]
    lines = [json.dumps({"prompt": text, "answers": ["x"]}) for text in ("a", "b")]
    path.write_bytes(bom + end.join(lines).encode() + end.encode() * last)
    assert examples.read(path) == [Example("a", ("x",)), Example("b", ("x",))]


def test_line_numbers_are_those_of_the_file(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b'\n\n{"prompt": "a"}\r\n\n{"prompt": 5}\n')
    with pytest.raises(DllmError, match="line 5: expected"):
        examples.read(path)


@pytest.mark.parametrize(
    "made",
    [
        "a\nb\n".encode("utf-16"),
        "a\nb\n".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "a".encode("utf-16-be"),
        "a".encode("utf-32"),
        b"a\0b",
    ],
)
def test_other_encodings_are_named(made, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(made)
    with pytest.raises(DllmError, match=r"UTF-16 or binary\): save it as UTF-8"):
        examples.read(path)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (b"", "contains no prompt"),
        (BOM, "contains no prompt"),
        (b"\n \r\n", "contains no prompt"),
        (b"gr\xfc\xdfe", "cannot be read"),
    ],
)
def test_files_without_a_prompt(made, said, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(made)
    with pytest.raises(DllmError, match=said):
        examples.lines_of(path)
    with pytest.raises(DllmError, match="cannot be read"):
        examples.lines_of(tmp_path / "nowhere")


def test_the_prompts_of_a_benchmark_and_of_standard_input_are_read_alike(
    model, demo_artifact, tmp_path, monkeypatch, capsys
):
    text = "\ufeffclean hall\u2028with mop\r\n\r\nfind red keys in attic\x0b\n"
    path = tmp_path / "prompts"
    path.write_bytes(text.encode())
    asked = bench._prompts(model, SimpleNamespace(prompts=path, count=9))
    assert asked == ["clean hall\u2028with mop", "find red keys in attic\x0b"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert cli.main(["generate", str(demo_artifact), "-", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [held["text"] for held in made] == [result.text for result in model.generate(asked)] and len(
        made
    ) == 2


def test_a_quantised_export_and_tuning_read_them(demo_artifact, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    lines = [
        json.dumps({"prompt": f"clean hall\u2028with {tool}", "answers": ["[]"]}, ensure_ascii=False)
        for tool in ("mop", "cloth")
    ]
    path.write_bytes(BOM + "\r\n".join(lines).encode())
    assert cli.main(["tune", str(demo_artifact), "--data", str(path), "--max-drop", "100"]) == 0
    assert "of 2 right" in capsys.readouterr().out
