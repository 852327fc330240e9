"""Forecasts: against what a process really takes, and against counting by hand; what fits and what to
change."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from places import ROOT, export_quietly
from random_checkpoint import PRESETS, write

from export.parity.verify_graphs import exposed
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.tensorrt import store
from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError
from trt_runtime.machine import devices, roofline, step_costs
from trt_runtime.machine import forecast as plan
from trt_runtime.machine.roofline import MEMORY_LAYOUTS, Work

SMALL = {
    "n_layers": 4,
    "d_model": 1024,
    "n_heads": 8,
    "n_kv_heads": 4,
    "mlp_hidden_size": 4096,
    "vocab_size": 2000,
    "embedding_size": 2000,
    "mask_token_id": 1999,
    "eos_token_id": 1998,
    "pad_token_id": 1998,
}
_MEASURE = """
import sys
from pathlib import Path
import numpy, onnxruntime, tokenizers
from trt_runtime.decoding.backend import Window
from trt_runtime.backends.ort import OrtBackend
def held():
    lines = [line for line in open("/proc/self/status") if line.startswith("Rss")]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
def step(batch, rows):
    row = numpy.tile(numpy.arange(rows), (batch, 1))
    zero = numpy.zeros(batch, numpy.int64)
    return Window(row.copy(), row, zero, zero + rows, row[:, :1].copy())
begin = held()
backend = OrtBackend(Path(sys.argv[1]), threads=1)
backend.prefix(backend.new_cache(1, 1), slice(0, 1), step(1, 1))
opened = held()
cache = backend.new_cache(4, 2000)
for name in cache.buffers.arrays:
    cache.buffers.arrays[name][:] = 1
anonymous, in_files = opened["RssAnon"] - begin["RssAnon"], opened["RssFile"] - begin["RssFile"]
print([anonymous, in_files, held()["RssAnon"] - opened["RssAnon"]])
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan")
    write(PRESETS["llada-140m"][0] | SMALL, path / "checkpoint")
    return export_quietly(path / "checkpoint", path / "artifact")


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_weights_and_cache_are_what_a_process_takes(small, tmp_path, dtype):
    """ONNX Runtime on the CPU: forecast within 10 % of what was measured. (Rows of the embedding that no
    token has asked for stay on
    the disk: the vocabulary is small here.)"""
    if dtype == "fp16":
        small = export_quietly(small.parent / "checkpoint", tmp_path / "fp16", dtype="fp16")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(small)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    anonymous, mapped, cache = json.loads(done.stdout)
    facts = manifests.load(small).model
    assert roofline.cache_bytes(facts, Work(4, 2000, 32)) == pytest.approx(cache, rel=0.1)
    assert roofline.memory(facts, Work(1, 1, 1), MEMORY_LAYOUTS[0], on_cpu=True).weights == pytest.approx(
        anonymous + mapped, rel=0.1
    )


def test_the_artifact_takes_the_disk_that_was_forecast(small, tmp_path):
    facts = manifests.load(small).model
    made = plan.report(facts, Work(1, 64, 8), ["cpu"])
    assert made["disk"]["artifact"] == pytest.approx((small / "weights.data").stat().st_size, rel=0.01)


def test_multiplications_are_those_of_the_graph(small):
    """Every Gemm of the refine graph as ONNX Runtime ran it, counted by its real shapes; attention by
    hand."""
    facts, rows, asked = manifests.load(small).model, 12, 5
    import onnxruntime

    model = onnx.load(small / "refine.onnx", load_external_data=False)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    linear = 0
    inputs = [node.input[0] for node in model.graph.node if node.op_type == "Gemm"]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(small))
    session = onnxruntime.InferenceSession(
        exposed(small, "refine", sorted(set(inputs))), options, providers=["CPUExecutionProvider"]
    )
    row = np.arange(rows)[None]
    feeds = {
        "input_ids": row,
        "position_ids": row,
        "write_index": np.zeros(1, np.int64),
        "kv_len": np.array([rows]),
        "logit_rows": row[:, :asked],
    }
    dims = manifests.load(small).dims
    feeds |= {
        spec.name: np.zeros((1, dims.num_kv_heads, rows, dims.head_dim), np.float32)
        for spec in plan.contract.inputs("refine", dims)
        if spec.name.startswith("cache")
    }
    got = dict(zip(sorted(set(inputs)), session.run(sorted(set(inputs)), feeds), strict=True))
    for node in model.graph.node:
        if node.op_type == "Gemm":
            out, into = shapes[node.input[1]]
            linear += 2 * got[node.input[0]].shape[0] * into * out
    attention = 4 * facts.num_heads * facts.head_dim * rows * (rows * (facts.num_layers - 1) + asked)
    assert roofline.flops(facts, rows, rows, asked) == linear + attention


FACTS = manifests.ModelFacts("llada", 32, 32, 32, 128, 4096, 12288, 126464, 4096, "bf16", 8_015_581_184)


def test_a_refine_step_reads_the_weights_and_a_prefix_pass_multiplies():
    """LLaDA-8B on an H200: a refine step is bound by 16 GB (the head in float32) and 0.7 GB of cache at 4.8
    TB/s, a prefix pass of 1,280 by 2 x 7 G x 1,280 at 989 TFLOPS."""
    work, device = Work(1, 1280, 32), devices.find("h200")
    step, full = (roofline.seconds(FACTS, work, device, rows=rows) for rows in (32, 1280))
    assert step == pytest.approx(
        ((8.0156e9 - 126464 * 4096) * 2 + 126464 * 4096 * 2 + 0.67e9) / 4.8e12, rel=0.01
    )
    assert full == pytest.approx(2 * (8.0156e9 - 2 * 126464 * 4096) * 1280 / 989.4e12, rel=0.1)
    assert roofline.cache_bytes(FACTS, work) == 512 * 1024 * 1280
    assert roofline.seconds(FACTS, work, devices.this_machine(), rows=32) is None


def test_verdicts_say_what_to_change():
    def said(name, work, layout=1, **change):
        return plan.verdict(plan.replace(FACTS, **change), work, devices.find(name), MEMORY_LAYOUTS[layout])

    assert said("h200", Work(8, 1280, 32)).startswith(
        "fits: tensorrt, one engine (shared) on H200 SXM needs 23"
    )
    assert "a batch of 6 would" in said("l4", Work(8, 1280, 32))
    assert "even a canvas of 64 tokens alone needs" in said("rtx-5080", Work(1, 1280, 32)) and "L4" in said(
        "rtx-5080", Work(1, 1280, 32)
    )
    assert "or one engine instead of two" in said("l4", Work(1, 1280, 32), 2)
    assert "DTYPE=bf16" in said("rtx-4090", Work(1, 1280, 32), dtype="fp32")
    assert "a batch of 1 and a canvas of 1216 tokens" in said("rtx-5090", Work(1, 1280, 32), dtype="fp32")
    batch = int(said("l4", Work(8, 1280, 32)).split("a batch of ")[1].split()[0])
    free = devices.find("l4").memory - devices.find("l4").reserved
    assert roofline.memory(FACTS, Work(batch, 1280, 32), MEMORY_LAYOUTS[1]).total <= free
    assert roofline.memory(FACTS, Work(batch + 1, 1280, 32), MEMORY_LAYOUTS[1]).total > free


def test_the_command(small, tmp_path, capsys):
    assert cli.main(["plan", str(small)]) == 0
    said = capsys.readouterr().out
    assert "67.02 M parameters, fp32; batch 1, canvas 1280" in said
    assert all(device.name in said for device in devices.DEVICES.values()) and "fits:" not in said
    config = tmp_path / "only-config"
    config.mkdir()
    shutil.copyfile(small.parent / "checkpoint" / "config.json", config / "config.json")
    assert cli.main(["plan", str(config), "--device", "l4", "--batch", "3", "--length", "100", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (
        made["model"]["parameters"] == manifests.load(small).model.parameters
        and made["model"]["dtype"] == "bf16"
    )
    assert made["work"] == {"batch": 3, "length": 100, "block_length": 32} and list(made["devices"]) == ["L4"]
    assert len(made["verdicts"]) == len(MEMORY_LAYOUTS)
    for arguments, error in (
        (["--device", "h20"], "unknown device 'h20': did you mean 'h200'"),
        (["--batch", "0"], "--batch is 0"),
        (["--length", "9999"], "--length is 9999, but the model's canvas has at most 4096"),
        (["--dtype", "fp8"], "dtype is fp8"),
    ):
        assert cli.main(["plan", str(small), *arguments]) == 1
        assert error in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path / "none")]) == 1
    assert "no such directory" in capsys.readouterr().err


def test_devices_are_found_by_name():
    assert devices.find("cpu").memory > devices.GIB
    with pytest.raises(DllmError, match="did you mean 'h200'"):
        devices.find("h20")


def test_opening_an_engine_counts_where_host_and_gpu_have_one_memory(tmp_path):
    """A TensorRT before 10.7 holds the engine's file whole beside its weights: of LLaDA-8B that is more than
    an Orin of 32 GB has."""
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["llada-8b"][0]))
    facts = plan.model_of(str(tmp_path), "bf16").facts
    work, shared = (
        roofline.Work(1, 1280, 32),
        next(layout for layout in roofline.MEMORY_LAYOUTS if layout.label == "trt shared"),
    )
    orin, thor, card = (devices.DEVICES[name] for name in ("orin-32g", "thor", "l4"))
    assert roofline.opening_bytes(facts, shared, orin) == roofline.memory(facts, work, shared).weights > 16e9
    assert (
        roofline.opening_bytes(facts, shared, thor) == store.PIECE
        and roofline.opening_bytes(facts, shared, card) == 0
    )
    assert roofline.opening_bytes(facts, roofline.MEMORY_LAYOUTS[0], orin) == 0
    said = plan.verdict(facts, work, orin, shared)
    assert (
        said.startswith("does not fit")
        and "keeps the engine's whole file in memory besides its weights" in said
    )
    assert plan.verdict(facts, work, thor, shared).startswith("fits") and plan.verdict(
        facts, work, devices.DEVICES["orin-64g"], shared
    ).startswith("fits")


def _of_preset(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(PRESETS[name][0]))
    return plan.model_of(str(tmp_path / name), "bf16").facts


def test_a_refine_step_on_a_gpu_is_estimated_by_its_parts(tmp_path):
    """LLaDA-8B in bf16 on an H200: 5.2 to 5.6 ms, of which the roofline is 3.48 (an audit of the engines)."""
    facts, h200 = _of_preset("llada-8b", tmp_path), devices.find("h200")
    parts = {cost.name: cost for cost in step_costs.refine_step(facts, Work(1, 1280, 32), h200)}
    total = sum(cost.seconds for cost in parts.values())
    assert 5.2e-3 < total < 5.6e-3 and 32e-3 > step_costs.prefix_pass(facts, Work(1, 1280, 32), h200) > 31e-3
    assert parts["matrix products of the layers"].seconds == pytest.approx(3.42e-3, rel=0.01)
    assert parts["the head, which multiplies in float32"].seconds == pytest.approx(0.51e-3, rel=0.02)
    assert parts["copies of the caches"].seconds == pytest.approx(0.31e-3, rel=0.02)
    batch = {cost.name: cost for cost in step_costs.refine_step(facts, Work(8, 1280, 32), h200)}
    assert batch["copies of the caches"].seconds == pytest.approx(8 * parts["copies of the caches"].seconds)
    assert batch["short kernels"] == parts["short kernels"]
    for cost in (*parts.values(), *batch.values()):
        assert (cost.after is None) == (not cost.mend) and (cost.after or 0) < cost.seconds
    roof = roofline.seconds(facts, Work(1, 1280, 32), h200, rows=32)
    assert roof < total
    short = sum(cost.seconds for cost in step_costs.refine_step(facts, Work(1, 256, 32), h200))
    assert total - short == pytest.approx(
        0.8 * (parts["attention"].seconds + parts["copies of the caches"].seconds)
    )


def test_what_cannot_be_estimated_is_not(tmp_path):
    facts = _of_preset("llada-140m", tmp_path)
    work, h200 = Work(1, 384, 32), devices.find("h200")
    assert step_costs.refine_step(facts, work, devices.find("cpu")) is None
    assert step_costs.refine_step(replace(facts, dtype="fp32"), work, h200) is None
    assert step_costs.prefix_pass(facts, work, replace(h200, bandwidth=None)) is None


def test_the_command_shows_the_parts_of_a_step(tmp_path, capsys):
    _of_preset("llada-8b", tmp_path)
    assert cli.main(["plan", str(tmp_path / "llada-8b"), "--device", "h200"]) == 0
    said = capsys.readouterr().out
    assert "a prefix pass 31.56 ms, a refine step 5.30 ms:" in said
    assert "copies of the caches" in said and "attention over the cache in place would leave 0 ms" in said
    assert cli.main(["plan", str(tmp_path / "llada-8b")]) == 0
    assert "copies of the caches" not in capsys.readouterr().out  # with one device only
    assert cli.main(["plan", str(tmp_path / "llada-8b"), "--device", "h200", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["devices"]["H200 SXM"]["estimate"]
    assert sum(part["seconds"] for part in row["refine_step"]) == pytest.approx(row["refine_step_seconds"])
