"""Files and directories that several processes write, or that a signal interrupts: whole before, whole after,
and nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from places import DEMO, ROOT

from trt_runtime.artifact import manifest as manifests
from trt_runtime.errors import DllmError
from trt_runtime.measure import tune
from trt_runtime.system import atomic

ENDINGS = [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]


@pytest.fixture
def artifact(demo_artifact, tmp_path):
    return shutil.copytree(demo_artifact, tmp_path / "artifact")


def held(directory) -> str:
    return (directory / "file").read_text()


def write(out, text: str, **options) -> None:
    with atomic.sealed(out, **options) as directory:
        (directory / "file").write_text(text)


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_replaced_as_a_whole_and_keeps_usual_rights(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic.replace(path, b"one")
    assert path.read_bytes() == b"one" and path.stat().st_mode & 0o777 == 0o666 & ~atomic._umask()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        atomic.replace(path, b"two")
    assert path.read_bytes() == b"one" and names(tmp_path) == ["file"]


def test_a_directory_takes_its_place_or_vanishes(tmp_path):
    out = tmp_path / "out"
    write(out, "first")
    write(out, "second")
    assert held(out) == "second" and names(tmp_path) == ["out"]
    with pytest.raises(SystemExit), atomic.sealed(out) as directory:
        (directory / "file").write_text("third")
        raise SystemExit(143)
    assert held(out) == "second" and names(tmp_path) == ["out"]


def test_what_another_process_wrote_meanwhile_is_not_replaced(tmp_path):
    """Of two exports to one new place, one is told."""
    out = tmp_path / "out"
    with (
        pytest.raises(DllmError, match="written by another process in the meantime"),
        atomic.sealed(out, overwrite=False) as directory,
    ):
        (directory / "file").write_text("slow")
        write(out, "quick", overwrite=False)
    assert held(out) == "quick" and names(tmp_path) == ["out"]
    out = tmp_path / "empty"
    out.mkdir()
    write(out, "new", overwrite=False)  # an empty directory is nobody's
    assert held(out) == "new"


@pytest.mark.parametrize("step", [1, 2])
def test_without_an_exchange_the_old_one_is_restored(tmp_path, monkeypatch, step):
    """A file system that knows no exchange: an end between the two renames, or in the second, leaves the old
    directory."""
    from pathlib import Path

    out, real, calls = tmp_path / "out", Path.rename, []
    write(out, "old")
    monkeypatch.setattr(atomic, "_renameat2", lambda *_: errno.EINVAL)

    def rename(self, target):
        calls.append(target)
        if len(calls) == 2 and step == 2:
            raise SystemExit(143)
        made = real(self, target)
        if len(calls) == 1 and step == 1:
            raise SystemExit(143)
        return made

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(SystemExit):
        write(out, "new")
    monkeypatch.setattr(Path, "rename", real)
    assert held(out) == "old" and names(tmp_path) == ["out"]
    write(out, "new")
    assert held(out) == "new" and names(tmp_path) == ["out"]
    monkeypatch.setattr(atomic, "_renameat2", lambda *_: errno.EINVAL)
    write(tmp_path / "other", "x", overwrite=False)
    assert held(tmp_path / "other") == "x"


def test_what_killed_processes_left_is_removed_and_what_lives_stays(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from trt_runtime.system import atomic\n"
        "with atomic.sealed(Path(sys.argv[1])) as made:\n    (made / 'file').write_text('x'); "
        "print('there', flush=True); time.sleep(600)"
    )
    out = tmp_path / "a[1]*"
    killed, alive = (
        subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, cwd=ROOT, text=True)
        for _ in range(2)
    )
    for process in (killed, alive):
        assert process.stdout.readline() == "there\n"
    killed.kill()
    killed.wait()
    assert len(names(tmp_path)) == 2
    write(out, "mine")
    assert len(names(tmp_path)) == 2 and out.name in names(tmp_path)  # the one that lives keeps its own
    alive.send_signal(signal.SIGHUP if os.environ.get("NOHUP") is None else signal.SIGTERM)
    alive.wait()
    write(out, "mine")
    assert names(tmp_path) == [out.name]
    for process in (killed, alive):
        process.stdout.close()


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_an_export_that_is_ended_leaves_the_old_artifact_alone(artifact, number):
    """The process is ended while it holds a whole new artifact that has not taken its place."""
    before = manifests.load(artifact, check_hashes=True)
    code = (
        "import sys, time; from export import cli, pipeline\n"
        "real = pipeline._manifest\n"
        "def slow(*given):\n    made = real(*given); print('now', flush=True); time.sleep(600)\n"
        "pipeline._manifest = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    options = ["--checkpoint", str(DEMO), "--out", str(artifact), "--overwrite", "--verify", "no"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    while process.stdout.readline() not in ("now\n", ""):
        pass
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == 128 + number and "Traceback" not in said, said
    assert manifests.load(artifact, check_hashes=True) == before and names(artifact.parent) == ["artifact"]


def test_ignored_signals_stay_ignored():
    """Under nohup a lost terminal ends nothing."""
    code = (
        "import signal; from trt_runtime.system import atomic; atomic.end_on_signals(); "
        "print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    )
    wrapped = (
        f"import signal, subprocess, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        f"subprocess.run([sys.executable, '-c', {code!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", wrapped], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "True"


def test_two_processes_that_note_something_lose_nothing(artifact):
    """Both write again and again; the manifest is readable at every moment, and what each noted last is
    there."""
    code = (
        "import sys; from dataclasses import replace; from pathlib import Path; from trt_runtime.artifact "
        "import manifest; from trt_runtime.measure import tune\n"
        "path, what = Path(sys.argv[1]), sys.argv[2]\n"
        "for i in range(40):\n"
        "    if what == 'tune': tune.write(path, {'policy': 'eb', 'gamma': i / 100})\n"
        "    else: manifest.update(path, lambda held: replace(held, verified={'passed': True, 'number': "
        "i}), since=manifest.load(path))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(artifact), what], cwd=ROOT)
        for what in ("tune", "verify", "tune")
    ]
    while any(process.poll() is None for process in running):
        manifests.load(artifact)
    assert [process.returncode for process in running] == [0, 0, 0]
    found = manifests.load(artifact)
    assert found.decoding.tuned == {"policy": "eb", "gamma": 0.39} and found.verified == {
        "passed": True,
        "number": 39,
    }
    assert not [name for name in names(artifact) if name.endswith(".tmp")]


def test_what_was_noted_meanwhile_stays(artifact):
    """A verification that began before a tuning was noted does not take it back."""
    since = manifests.load(artifact)
    tune.write(artifact, {"policy": "eb", "gamma": 0.05})
    manifests.update(artifact, lambda now: replace(now, verified={"passed": True}), since=since)
    found = manifests.load(artifact)
    assert found.decoding.tuned["gamma"] == 0.05 and found.verified == {"passed": True}


def test_nothing_is_noted_in_another_artifact(artifact):
    since = manifests.load(artifact)
    other = replace(since, model=replace(since.model, max_length=since.model.max_length - 1))
    manifests.write(other, artifact)
    with pytest.raises(DllmError, match="replaced by another export in the meantime"):
        manifests.update(artifact, lambda now: replace(now, verified={"passed": True}), since=since)
    assert manifests.load(artifact) == other


def test_the_lock_is_waited_for(tmp_path):
    order = []

    def second() -> None:
        with atomic.locked(tmp_path):
            order.append("second")

    with atomic.locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_links_that_lead_in_a_circle_are_one_line(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(DllmError, match="circular symbolic links"), atomic.sealed(tmp_path / "a" / "out"):
        pass


def test_no_telemetry_of_onnx_runtime(tmp_path):
    """It looks up a host and writes an identifier into the home directory unless it is told not to before its
    import."""
    code = "import export, os, onnxruntime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for module in (
        "export",
        "trt_runtime.backends.ort",
        "trt_runtime.machine.doctor",
        "export.parity.verify",
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("import export", f"import {module}")],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={
                **{k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"},
                "HOME": str(tmp_path),
                "XDG_CACHE_HOME": str(tmp_path),
            },
        )
        assert done.stdout.strip() == "1"
    assert not list(tmp_path.rglob("*deviceid*"))
