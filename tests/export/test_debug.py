"""Polygraphy on our graphs, on the CPU: runners beside PyTorch, the kit's commands as a user types them, and
a fault that they find."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from places import GOLDENS, export_quietly
from tiny import write_checkpoint

pytest.importorskip("polygraphy")
pytest.importorskip("torch")

from export import families
from export.debug import kit, record, runners
from export.parity.reference import TorchBackend
from export.parity.verify import verify
from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.cli import main as cli
from trt_runtime.decoding.backend import narrowed, widened
from trt_runtime.errors import DllmError

FAULTY = "layers.2.down_proj"


def with_fault(artifact: Path, out: Path) -> Path:
    """A copy whose graphs scale one layer by 1.02."""
    copy = shutil.copytree(artifact, out)
    manifest = json.loads((copy / "manifest.json").read_text())
    for role in contract.ROLES:
        scale(copy / f"{role}.onnx")
        file = copy / f"{role}.onnx"
        manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": manifests.sha256_of(file)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def scale(graph: Path, to: Path | None = None, weight: str = FAULTY) -> str:
    """Scale the faulty layer of a graph; the name of its output."""
    model = onnx.load(graph, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Gemm" and weight in node.input)
    node.attribute.append(onnx.helper.make_attribute("alpha", 1.02))
    (to or graph).write_bytes(model.SerializeToString())
    return node.output[0]


def test_three_runners_agree_on_both_graphs(golden_artifact):
    """PyTorch, our backend and Polygraphy's own runner of ONNX Runtime, over real calls with valid caches and
    ragged rows."""
    engine, reference = OrtBackend(golden_artifact, threads=1), TorchBackend(golden_artifact, threads=1)
    calls = record.decode(engine, kit.prompts(engine.manifest), kit.decoding(engine.manifest), 3)
    assert {call.role for call in calls} == set(contract.ROLES)
    assert any(len(set(call.inputs["kv_len"].tolist())) > 1 for call in calls)  # ragged
    assert any(
        call.role == "refine"
        and call.inputs["write_index"].min() > 0
        and np.abs(call.inputs["cache_key.1"]).max() > 0
        for call in calls
    )
    passed, measured, failure = runners.stage(golden_artifact, engine, reference)
    assert passed and failure == "" and measured["calls"] == len(calls)
    assert (
        0 < measured["dllm-trt, share of what is allowed"] < 1
        and measured["OnnxrtRunner, share of what is allowed"] < 1
    )


def test_verification_with_polygraphy_finds_a_layer_that_is_two_percent_off(golden_artifact, tmp_path):
    good = {
        stage.name: stage
        for stage in verify(shutil.copytree(golden_artifact, tmp_path / "good"), with_polygraphy=True)
    }
    assert good["polygraphy"].passed and list(good)[-1] == "polygraphy"
    broken = with_fault(golden_artifact, tmp_path / "broken")
    stages = {stage.name: stage for stage in verify(broken, with_polygraphy=True)}
    assert not stages["polygraphy"].passed and "times the tolerance" in str(stages["polygraphy"])
    assert manifests.load(broken).verified["passed"] is False


def test_caches_are_read_and_written_by_every_backend_alike(golden_artifact, golden_fp16):
    rng = np.random.default_rng(0)
    for backend in (OrtBackend(golden_artifact), OrtBackend(golden_fp16), TorchBackend(golden_artifact)):
        model = backend.manifest.model
        cache = backend.new_cache(3, 16)
        arrays = {
            name: rng.standard_normal((2, model.num_kv_heads, 16, model.head_dim)).astype(np.float32)
            for name in contract.cache_names("cache", backend.manifest.dims)
        }
        backend.write_cache(cache, slice(1, 3), arrays)
        for name, array in backend.read_cache(cache, slice(1, 3)).items():
            assert (array == widened(narrowed(arrays[name], model.dtype), model.dtype)).all()
        assert not any(array.any() for array in backend.read_cache(cache, slice(0, 1)).values())


def test_bf16_is_rounded_to_the_nearest_even():
    import torch

    values = np.concatenate(
        [np.random.default_rng(0).standard_normal(10_000), [0, -0.0, 1.00390625, 1.01171875, 3e38]]
    ).astype(np.float32)
    assert (
        widened(narrowed(values, "bf16"), "bf16") == torch.from_numpy(values).bfloat16().float().numpy()
    ).all()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The kit of a LLaDA of two layers, written by the command."""
    folder = tmp_path_factory.mktemp("kit")
    checkpoint = write_checkpoint(families.find("llada"), folder / "checkpoint", model={"n_layers": 2})
    artifact = export_quietly(checkpoint, folder / "artifact")
    assert cli.main(["polygraphy", str(artifact), str(folder / "kit"), "--quiet"]) == 0
    return folder / "kit"


def command(kit_of: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["./run.sh", *words],
        cwd=kit_of,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": path} | environment,
    )


def test_the_kit_says_what_it_holds(made):
    assert {
        "prefix.onnx",
        "refine.onnx",
        "weights.data",
        "run.sh",
        "settings.sh",
        "README.md",
        "load_windows.py",
        "postprocess.py",
    } <= {path.name for path in made.iterdir()}
    facts = json.loads((made / "facts.json").read_text())
    assert facts["capacity"] % 64 == 0 and facts["dtype"] == "fp32"
    assert (
        len(list((made / "windows").iterdir()))
        == len(list((made / "expected").iterdir()))
        == len(list((made / "expected-pytorch").iterdir()))
        == facts["calls"]
    )
    done = command(made)
    assert done.returncode == 2 and "./run.sh compare [ROLE]" in done.stdout
    assert made.joinpath("weights.data").stat().st_nlink == 1


def test_onnx_runtime_gives_what_was_recorded_and_the_graphs_are_clean(made):
    done = command(made, "onnxrt")
    assert done.returncode == 0 and done.stdout.count("Pass Rate: 100.00%") == 2, done.stdout[-2000:]
    done = command(made, "lint")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Graph Input" in command(made, "look", "refine").stdout


def test_tensorrt_rtx_takes_and_builds_them(made):
    pytest.importorskip("tensorrt_rtx")
    rtx = {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = command(made, "capability", **rtx)  # its exit status says nothing
    assert done.stdout.count("Graph is fully supported by TensorRT") == 2, done.stdout[-2000:]
    done = command(made, "convert", "refine", COMPUTE="8.9 12.0", **rtx)
    assert done.returncode == 0 and (made / "refine.engine").stat().st_size > 100_000, done.stdout[-2000:]


def test_constants_are_folded_into_a_file_of_their_own(made):
    before = (made / "weights.data").read_bytes()
    done = command(made, "sanitize", "refine")
    assert done.returncode == 0 and (made / "refine.sanitized.onnx").is_file(), done.stdout[-2000:]
    assert (made / "weights.data").read_bytes() == before


def test_the_layer_at_fault_is_found(made, tmp_path):
    """One layer 2 % off: the first tensor that differs, and what `debug reduce` leaves, are that layer's.

    `reduce` starts Polygraphy for each of its checks; without PyTorch, which an fp32 kit does not need, it
    starts in a quarter of the time.
    """
    tool = tmp_path / "polygraphy"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nsys.modules['torch'] = None\nfrom polygraphy.tools import main\n"
        "sys.exit(main())\n"
    )
    tool.chmod(0o755)
    output = scale(made / "refine.onnx", made / "bad.onnx", "layers.1.down_proj")
    done = command(made, "first", "refine", "bad.onnx")
    assert done.returncode != 0 and re.search(
        rf"Difference exceeds tolerance.*|{re.escape(output)}", done.stdout
    )
    done = command(made, "reduce", "refine", "bad.onnx", POLYGRAPHY=str(tool))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    left = onnx.load(made / "reduced-refine-linear.onnx")
    assert [node.op_type for node in left.graph.node] == ["Gemm"] and left.graph.node[0].output[0] == output


def test_wrong_use_is_one_line(made, golden_artifact, tmp_path, capsys):
    assert (
        cli.main(["polygraphy", str(golden_artifact), str(made)]) == 1
        and "already exists" in capsys.readouterr().err
    )
    legacy = export_quietly(GOLDENS / "llada_tiny", tmp_path / "legacy", lowering="legacy")
    with pytest.raises(DllmError, match="legacy lowering"):
        kit.write(legacy, tmp_path / "out", kit.KitConfig())
    assert not (tmp_path / "out").exists()
    assert (
        cli.main(["verify", str(golden_artifact), "--layers", "--with-polygraphy"]) == 1
        and "cannot be combined" in capsys.readouterr().err
    )


def test_a_bf16_artifact_is_recorded_on_its_twin(tmp_path):
    """NumPy has no bf16: the windows are fp32, and the loader makes torch tensors of them."""
    import torch

    artifact = export_quietly(GOLDENS / "llada_tiny", tmp_path / "bf16", dtype="bf16")
    kit.write(artifact, tmp_path / "kit", kit.KitConfig(count=1, reference=False))
    code = (
        "from load_windows import load_refine; f = next(load_refine()); print(f['cache_key.0'].dtype, "
        "f['input_ids'].dtype)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "kit", capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(torch.bfloat16), "int64"]
    assert (
        not (tmp_path / "kit" / "expected-pytorch").exists()
        and "REFINE_ATOL=(token:0 confidence:0.2" in (tmp_path / "kit" / "settings.sh").read_text()
    )
