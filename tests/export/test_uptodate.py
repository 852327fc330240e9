"""A second export of the same inputs keeps what is there; of other inputs it is refused, until told to
overwrite. And what to run next."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import replace

import pytest
from places import DEMO, ROOT

from export import cli, uptodate
from trt_runtime import __version__
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import Quantization
from trt_runtime.cli import main as runtime
from trt_runtime.cli import next_steps, render
from trt_runtime.machine import doctor
from trt_runtime.system import commands


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(DEMO, tmp_path / "a model")


@pytest.fixture
def run(tmp_path, capsys, checkpoint):
    """Exports to one place: status, what it said, and whether the artifact was made anew."""
    out = tmp_path / "out"

    def export(*options):
        before = (out / "prefix.onnx").stat().st_ino if out.exists() else None
        status = cli.main(["--checkpoint", str(checkpoint), "--out", str(out), "--verify", "no", *options])
        made = capsys.readouterr()
        return status, made.out + made.err, out.exists() and (out / "prefix.onnx").stat().st_ino != before

    return export


def test_the_same_again_is_up_to_date(run):
    assert run()[::2] == (0, True)
    status, said, made = run()
    assert (status, made) == (0, False) and "up to date" in said and "OVERWRITE=1" in said
    assert run("--overwrite")[::2] == (0, True)
    assert run("--model", "llada")[::2] == (0, False)
    status, said, made = run("--model", "dream")  # what is only checked is checked
    assert status == 1 and "model_type is 'llada'" in said and not made


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dtype", "fp16"], "dtype fp32, now fp16"),
        (["--head", "logits"], "head statistics, now logits"),
        (["--lowering", "legacy"], "lowering modern, now legacy"),
        (["--ignore-key", "x"], "ignored_keys [], now ['x']"),
        (["--quantize", "w8a8", "--gate", "no"], "quantize None, now w8a8"),
    ],
)
def test_other_options_are_refused(run, options, said):
    assert run()[0] == 0
    status, text, made = run(*options)
    assert (
        (status, made) == (1, False)
        and said in text
        and "OVERWRITE=1 (--overwrite)" in text
        and text.count("\n") == 1
    )


def test_other_files_are_refused(run, checkpoint):
    assert run()[0] == 0
    weights = checkpoint / "model.safetensors"
    data, facts = bytearray(weights.read_bytes()), weights.stat()
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # the content counts, not the time
    status, text, made = run()
    assert (status, made) == (1, False) and "(the checkpoint's files)" in text
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run()[::2] == (0, False)


def test_large_files_count_by_size_and_time(run, checkpoint, monkeypatch):
    monkeypatch.setattr(uptodate, "_HASHED", 1000)
    assert run()[0] == 0 and run()[::2] == (0, False)
    os.utime(checkpoint / "model.safetensors", (1, 1))
    assert run()[::2] == (1, False)


def test_another_version_a_damaged_and_a_foreign_artifact(run, tmp_path, monkeypatch):
    assert run()[0] == 0
    monkeypatch.setattr(uptodate, "__version__", __version__ + ".1")
    status, text, _ = run()
    assert status == 1 and "(the exporter)" in text
    monkeypatch.undo()
    with open(tmp_path / "out" / "weights.data", "r+b") as file:
        file.write(b"\xff")
    status, text, _ = run()
    assert status == 1 and "damaged" in text and "OVERWRITE=1" in text
    assert run("--overwrite")[::2] == (0, True)
    manifest = manifests.load(tmp_path / "out")
    manifest.source.pop(uptodate.KEY)
    manifests.write(manifest, tmp_path / "out")
    status, text, _ = run()
    assert status == 1 and "does not record what it was exported from" in text


def test_quantised_inputs(run, tmp_path):
    data = tmp_path / "prompts.txt"
    data.write_text("clean hall with mop\n")
    options = ["--quantize", "w8a8", "--data", str(data)]
    assert run(*options)[::2] == (0, True) and run(*options, "--target", "ort-cpu")[::2] == (0, False)
    data.write_text("find red keys in attic\n")
    status, text, _ = run(*options)
    assert status == 1 and "(the prompts of --data)" in text


def test_a_result_of_verify_is_kept(run, tmp_path):
    assert run()[0] == 0
    for passed, status, said in ((True, 0, "verified before"), (False, 1, "NOT VERIFIED before")):
        manifest = manifests.load(tmp_path / "out")
        manifests.write(replace(manifest, verified={"passed": passed}), tmp_path / "out")
        got, text, made = run()
        assert (got, made) == (status, False) and said in text and ("next: " in text) == passed


def test_bf16_is_said_to_be_for_no_cpu(run):
    status, said, _ = run("--dtype", "bf16")
    assert (
        status == 0 and "has no bf16 on a CPU" in said and "DTYPE=fp32" in said and "--quantize w8a8" in said
    )
    assert "next: " + commands.command("build") in said


def test_info_names_the_twin(run, tmp_path):
    assert run("--dtype", "bf16")[0] == 0
    manifest = manifests.load(tmp_path / "out")
    verified = {"passed": True, "against": "PyTorch", "backend": "onnxruntime 1, fp32 twin"}
    text = render.describe(tmp_path, replace(manifest, verified=verified))
    assert "yes, against PyTorch, on onnxruntime 1, fp32 twin" in text
    assert (
        "yes, against PyTorch\n"
        in render.describe(tmp_path, replace(manifest, verified={"passed": True, "against": "PyTorch"}))
        + "\n"
    )


def _next(said: str) -> list[str]:
    (line,) = [line for line in said.splitlines() if line.startswith("next: ")]
    return shlex.split(line.removeprefix("next: "), comments=True)


def test_the_next_step_runs(run, tmp_path, checkpoint, capsys):
    """From plan to export to an answer, each by the command that the one before printed."""
    assert runtime.main(["plan", str(checkpoint), "--device", "cpu"]) == 0
    made = capsys.readouterr()
    assert "next:" not in made.out
    words = _next(made.err)
    assert (
        words[words.index("--checkpoint") + 1] == str(checkpoint)
        and words[words.index("--dtype") + 1] == "fp32"
    )
    status, said, _ = run(*words[words.index("--dtype") :])
    words = _next(said)
    done = subprocess.run([*words, "--threads", "1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert status == 0 and done.returncode == 0 and done.stdout.strip(), (words, done.stderr)
    assert runtime.main(["plan", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert _next(capsys.readouterr().err)[1:3] == words[1:3]


def test_the_next_step_of_a_plan(tmp_path, checkpoint, capsys):
    def planned(*options):
        assert runtime.main(["plan", str(checkpoint), *options]) == 0
        return capsys.readouterr().err

    words = _next(planned("--quantize", "int4", "--device", "l4"))
    assert words[-6:] == ["--quantize", "int4", "--target", "tensorrt", "--data", "prompts.txt"]
    assert planned("--json") == ""
    made = {"model": {"dtype": "fp32"}, "quantised": None, "devices": {"x": {"fits": {"ort": False}}}}
    assert next_steps.after_plan("m n", made, "cpu") == commands.command(
        "plan", "m n", "--device", "cpu", "--quantize", "w8a8"
    )
    assert next_steps.after_plan("m", {**made, "quantised": {"scheme": "w8a8"}}, "cpu").endswith(
        "--quantize int4"
    )
    assert next_steps.after_plan("m", {**made, "quantised": {"scheme": "int4"}}, "cpu") is None
    assert next_steps.after_plan("m", made, "l4") is None


def test_the_next_step_of_builds_and_of_the_doctor(demo_artifact, tmp_path, monkeypatch, capsys):
    words = shlex.split(next_steps.after_build(demo_artifact, "tensorrt-rtx", tmp_path / "my engines"))
    assert words[-4:] == ["--backend", "tensorrt-rtx", "--engines", str(tmp_path / "my engines")] and words[
        -6
    ] == str(demo_artifact)
    manifest = manifests.load(demo_artifact)
    assert " build " in next_steps.of_artifact(
        demo_artifact, replace(manifest, quantization=Quantization("fp8", "tensorrt"))
    )
    words = shlex.split(next_steps.of_artifact(demo_artifact, replace(manifest, tokenizer=None)))
    special = {manifest.decoding.mask_token_id, *manifest.decoding.eos_token_ids}
    assert words[-2] == "--ids" and not special & set(map(int, words[-1].split(",")))
    monkeypatch.chdir(tmp_path)
    assert runtime.main(["doctor"]) == 0
    assert _next(capsys.readouterr().err)[-2:] == ["--model", "llada"]
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "broken").mkdir()
    (tmp_path / "artifacts" / "broken" / "manifest.json").write_text("{")
    (tmp_path / "artifacts" / "demo").symlink_to(demo_artifact)
    assert runtime.main(["doctor"]) == 0
    assert _next(capsys.readouterr().err)[2] == "artifacts/demo"
    monkeypatch.setattr(
        doctor, "findings", lambda: iter([doctor.Finding("numpy", doctor.FAILURE, "no", "pip install numpy")])
    )
    assert runtime.main(["doctor"]) == 1
    assert _next(capsys.readouterr().err) == ["pip", "install", "numpy"]
    assert runtime.main(["doctor", "--json"]) == 1
    made = capsys.readouterr()
    assert made.err == "" and json.loads(made.out)["healthy"] is False


def test_the_command_of_the_exporter_finds_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert commands.export("--help").endswith("dllm-trt export --help")
    done = subprocess.run(
        commands.export("--help"), shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "--checkpoint" in done.stdout


@pytest.mark.parametrize(
    ("given", "there", "absent"),
    [
        ([], ["--model llada"], ["--checkpoint", "--overwrite"]),
        (["CHECKPOINT=some dir"], ["--checkpoint 'some dir'"], ["--model", "--overwrite"]),
        (["MODEL=dream", "CHECKPOINT=x"], ["--model dream", "--checkpoint 'x'"], ["--overwrite"]),
        (["MODEL=dream"], ["--model dream"], ["--checkpoint"]),
        (["OVERWRITE=1", "MASK_TOKEN=<|mask|>"], ["--overwrite", "--mask-token '<|mask|>'"], []),
        (["OVERWRITE=0"], ["--model llada"], ["--overwrite", "--mask-token"]),
    ],
)
def test_make_export(given, there, absent):
    done = subprocess.run(
        ["make", "-n", "export", *given], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (command,) = [line for line in done.stdout.replace("\\\n", " ").splitlines() if "-m export" in line]
    assert all(text in command for text in there) and not any(text in command for text in absent), command


def test_make_clean_keeps_what_took_long(tmp_path):
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    kept, gone = (
        [".venv/lib/__pycache__", "artifacts/x/__pycache__", "engines/x"],
        ["build", "x.egg-info", ".mypy_cache", "a/__pycache__"],
    )
    for name in (*kept, *gone):
        (tmp_path / name).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, check=True)
    assert all((tmp_path / name).is_dir() for name in kept) and not any(
        (tmp_path / name).exists() for name in gone
    )
    subprocess.run(["make", "distclean"], cwd=tmp_path, capture_output=True, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "a"]
    assert (
        "make distclean" in (ROOT / ".ci" / "run").read_text()
        and "make clean" not in (ROOT / ".ci" / "run").read_text()
    )


def test_every_variable_of_the_makefile_is_explained():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    head = text.split("\n\n")[0]
    asked = {
        name
        for name in (
            "MODEL",
            "CHECKPOINT",
            "DTYPE",
            "WEIGHTS",
            "HEAD",
            "OUT",
            "OVERWRITE",
            "VERIFY",
            "MASK_TOKEN",
            "QUANTIZE",
            "TARGET",
            "DATA",
            "MATCH",
            "GATE",
            "PYTHON",
        )
        if f"$({name})" in text
    }
    assert len(asked) == 15 and all(f"{name}=" in head for name in asked)
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("export ")]
    assert all(f"{name}=" in line for name in asked - {"PYTHON"})
