"""The scripts that carry TensorRT 8.6 to a machine without network: their syntax, and the checks of
unpacking."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile

import pytest
from places import ROOT

PACK, UNPACK = ROOT / "tools" / "pack_tensorrt86.sh", ROOT / "tools" / "unpack_tensorrt86.sh"
RUN = b'#!/bin/sh\necho "ran $*"\n'


def _archive(name: str = "run") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(RUN), 0o755
        archive.addfile(info, io.BytesIO(RUN))
    return packed.getvalue()


def _write_pieces(folder, archive: bytes, count: int = 3) -> None:
    folder.mkdir()
    size = -(-len(archive) // count)
    lines = []
    for index in range(count):
        piece, name = archive[index * size : (index + 1) * size], f"tensorrt86.tar.xz.{index:02d}"
        (folder / name).write_bytes(piece)
        lines.append(f"{hashlib.sha256(piece).hexdigest()}  {name}\n")
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture
def pieces(tmp_path):
    folder = tmp_path / "the pieces"
    _write_pieces(folder, _archive())
    return folder


def _run(*command, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, timeout=60, **options
    )


def _refusal(*command, **options) -> str:
    """The one error line of a command that fails."""
    done = _run(*command, **options)
    assert done.returncode != 0 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("script", [PACK, UNPACK], ids=lambda path: path.name)
def test_the_scripts_are_valid_bash(script):
    done = _run("bash", "-n", script)
    assert (done.returncode, done.stderr) == (0, "")


def test_good_pieces_become_a_tree_that_runs(pieces, tmp_path):
    target = tmp_path / "a" / "target"
    done = _run("bash", UNPACK, pieces, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{target}/run python3 -c 'import tensorrt; print(tensorrt.__version__)'\n"
    assert _run(target / "run", "python3", "script.py").stdout == "ran python3 script.py\n"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_machine_without_xz_unpacks_with_python(pieces, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "chmod", "cut", "ls", "mkdir", "mktemp", "mv", "rm", "sha256sum", "tar"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "python3").chmod(0o755)
    (tools / "sh").symlink_to("/bin/sh")
    done = _run(tools / "bash", UNPACK, pieces, tmp_path / "target", env={"PATH": str(tools)})
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "target" / "run").read_bytes() == RUN


@pytest.mark.parametrize("arguments", [[], ["pieces"], ["pieces", "target", "more"]], ids=len)
def test_two_arguments_are_asked_for(arguments, tmp_path):
    line = _refusal("bash", UNPACK, *arguments, cwd=tmp_path)
    assert f"got {len(arguments)} arguments, expected two" in line and "PIECES_DIR TARGET_DIR" in line


def test_packing_asks_for_one_argument(tmp_path):
    line = _refusal("bash", PACK, cwd=tmp_path)
    assert "got 0 arguments, expected one" in line and "OUT_DIR" in line


def test_missing_pieces_are_named(pieces, tmp_path):
    (pieces / "tensorrt86.tar.xz.01").unlink()
    (pieces / "tensorrt86.tar.xz.02").unlink()
    line = _refusal("bash", UNPACK, pieces, tmp_path / "target")
    assert "has 1 of the 3 pieces" in line and line.endswith(
        "copy what is missing: tensorrt86.tar.xz.01 tensorrt86.tar.xz.02"
    )
    assert not (tmp_path / "target").exists()


def test_a_damaged_piece_is_named_with_both_sums(pieces, tmp_path):
    piece = pieces / "tensorrt86.tar.xz.01"
    expected = hashlib.sha256(piece.read_bytes()).hexdigest()
    piece.write_bytes(piece.read_bytes()[:-1])
    line = _refusal("bash", UNPACK, pieces, tmp_path / "target")
    assert str(piece) in line and f"SHA-256 is {hashlib.sha256(piece.read_bytes()).hexdigest()}" in line
    assert f"SHA256SUMS says {expected}" in line and "copy it again" in line
    assert not (tmp_path / "target").exists()


def test_the_list_of_sums_must_be_there_and_name_the_pieces_in_order(pieces, tmp_path):
    sums = pieces / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text(lines[0] + lines[2])
    assert "lists 'tensorrt86.tar.xz.02', expected tensorrt86.tar.xz.01" in _refusal(
        "bash", UNPACK, pieces, tmp_path / "t"
    )
    sums.write_text("0" * 64 + "  ../tensorrt86.tar.xz.00\n")
    assert "expected tensorrt86.tar.xz.00" in _refusal("bash", UNPACK, pieces, tmp_path / "t")
    sums.write_text("")
    assert "is empty" in _refusal("bash", UNPACK, pieces, tmp_path / "t")
    sums.unlink()
    assert "SHA256SUMS: not found" in _refusal("bash", UNPACK, pieces, tmp_path / "t")


def test_a_list_cut_short_leaves_no_half_a_tree(pieces, tmp_path):
    sums = pieces / "SHA256SUMS"
    sums.write_text("".join(sums.read_text().splitlines(keepends=True)[:2]))
    done = _run("bash", UNPACK, pieces, tmp_path / "target")
    assert (
        done.returncode != 0
        and "the joined pieces are not a complete archive" in done.stderr.splitlines()[-1]
    )
    assert list((tmp_path / "target").iterdir()) == [] and list(tmp_path.glob("target.*")) == []


def test_an_archive_of_something_else_is_refused(tmp_path):
    _write_pieces(tmp_path / "pieces", _archive("other"))
    assert "has no program 'run'" in _refusal("bash", UNPACK, tmp_path / "pieces", tmp_path / "target")


def test_a_full_target_is_left_alone(pieces, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("kept")
    assert "not an empty directory" in _refusal("bash", UNPACK, pieces, target)
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_a_full_directory_is_not_packed_into(tmp_path):
    (tmp_path / "mine").write_text("kept")
    assert "the pieces need an empty directory" in _refusal("bash", PACK, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
