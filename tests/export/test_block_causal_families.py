"""Families with block-causal attention beyond their recorded cases (test_official_families.py): answers in
the form of the file, recorded batches and quirks, the graphs' numbers, published files, engines."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from official import BLOCK_CAUSAL, name_of
from places import GOLDENS, ROOT, export_quietly
from safetensors.numpy import load_file
from tiny import write_checkpoint

from export import families, pipeline
from export.parity.verify import verify
from export.pipeline import ExportConfig
from export.quantize import export as quantize
from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.cli import main as cli
from trt_runtime.decoding.backend import Window
from trt_runtime.decoding.blocks import row_lengths
from trt_runtime.measure import recordings, replay


@pytest.fixture(scope="module", params=BLOCK_CAUSAL, ids=name_of)
def official(request):
    return request.param


@pytest.fixture(scope="module")
def artifact(official, tmp_path_factory):
    return official.export(tmp_path_factory.mktemp(official.name) / "artifact")


def test_the_answer_of_replay_is_the_recording(official, artifact, tmp_path, capsys):
    """In the form of the file: kinds, tokens and forwards as recorded, but for the last store."""
    out = tmp_path / "answers.json"
    assert cli.main(["replay", str(artifact), str(official.file), "--output", str(out)]) == 0
    said = capsys.readouterr()
    count = official.count
    assert f"{count} cases on ort in fp32: {count} with expectations, 0 mismatches" in said.out
    assert ("skipped: 20 cases of full attention" in said.err + said.out) == (official.name == "a2d_qwen3")
    answers = json.loads(out.read_text())["cases"]
    expected = {case["id"]: case for case in official.recording()["cases"]}
    assert len(answers) == count
    for answer in answers:
        case = expected[answer["id"]]
        theirs, mine = case["trace"], [step[:5] for step in answer["trace"]]
        is_stored = len(mine) == len(theirs) - 1 and theirs[-1][0] == "store"
        assert mine == (theirs[:-1] if is_stored else theirs), answer["id"]
        assert answer["nfe"] == case["nfe"] - is_stored
        # Fast-dLLM v2's last store brings one more token, or a part of the block that gen_length rounds off
        rows = zip(answer["output"], case["output"], strict=True)
        assert all(own == whole[: len(own)] and len(whole) - len(own) <= 1 for own, whole in rows)


def test_rows_of_recorded_batches_are_the_rows_alone(official, artifact):
    """Fast-dLLM v2's and A2D's own batches, as one batch here: what each row gives alone."""
    backend, batches = OrtBackend(artifact, threads=1), official.recording().get("batch_cases", [])
    batches = [case for case in batches if case["api"] in ("batch_sample", "bd3lm")]
    assert len(batches) == {"sdar": 0, "fastdllm_v2": 20, "a2d_qwen3": 4}[official.name]
    for batch in batches:
        singles = batch.get("single_output", batch["output"])
        cases = [
            recordings.as_case(
                {
                    **{key: value for key, value in batch.items() if key not in ("trace", "nfe")},
                    "prompt": [prompt],
                    "output": [single],
                },
                2,
            )
            for prompt, single in zip(batch["prompt"], singles, strict=True)
        ]
        done = replay.replay_together(backend, cases)
        assert [replay.compare(*pair) for pair in zip(cases, done, strict=True)] == [None] * len(cases)


def test_quirks_of_the_official_loops_are_not_repeated(official, artifact):
    """Where a recording says what its rule makes of the same inputs without the quirk, that is what comes
    out."""
    backend, checked = OrtBackend(artifact, threads=1), 0
    for case in official.recording()["quirk_cases"]:
        if "sane_output" not in case or len(case["prompt"]) > 1:
            continue
        sane = {**case, "output": case["sane_output"], "nfe": case["sane_nfe"]}
        sane |= {"trace": case["sane_trace"]} if "sane_trace" in case else {}
        for key in ("full_output", *([] if "sane_trace" in case else ["trace", "nfe"])):
            sane.pop(key, None)
        read = recordings.as_case(sane, 2)
        assert replay.compare(read, replay.replay(backend, read)) is None, case["id"]
        checked += 1
    assert checked == {"sdar": 6, "fastdllm_v2": 6, "a2d_qwen3": 1}[official.name]


def _window(ids, start, row_len):
    """A call over ids [1, S] from `start`, with logits of every row."""
    rows = np.arange(ids.shape[1])[None]
    return Window(
        ids.astype(np.int64),
        rows + start,
        np.array([start]),
        np.array([int(row_len.max())]),
        rows,
        row_len[None].astype(np.int64),
    )


@pytest.mark.parametrize("lowering", contract.LOWERINGS)
def test_the_graphs_compute_the_recorded_numbers(official, tmp_path, lowering):
    """Logits of a canvas, keys after RoPE, values, a step against cached blocks, and the store."""
    backend = OrtBackend(official.export(tmp_path / "artifact", lowering=lowering), threads=1)
    numbers = load_file(GOLDENS / f"{official.name}_forward.safetensors")
    facts = json.loads((GOLDENS / f"{official.name}_forward_meta.json").read_text())

    def logits(cache, start, ids, row_len):
        role = "refine" if start else "prefix"
        call = _window(ids, start, row_len)
        return backend.forward(role, cache, slice(0, 1), call, want_logits=True).logits

    for name, fact in facts.items():
        ids, length = numbers[f"{name}.input_ids"], fact["L"]
        reach = row_lengths(np.arange(length), length, fact["block_length"], fact.get("left_pad", 0))
        cache = backend.new_cache(1, length)
        whole = logits(cache, 0, ids, reach)
        assert np.abs(whole - numbers[f"{name}.logits"]).max() < 1e-3
        held = backend.read_cache(cache, slice(0, 1))
        for layer in range(3):
            for kind in ("key", "value"):
                assert np.abs(held[f"cache_{kind}.{layer}"] - numbers[f"{name}.{kind}.{layer}"]).max() < 1e-4
        start, end = fact["s"], fact["e"]
        cache = backend.new_cache(1, length)
        logits(cache, 0, ids[:, :start], reach[:start])  # the prefill alone
        step = logits(cache, start, ids[:, start:end], reach[start:end])
        assert np.abs(step - numbers[f"{name}.step_logits"]).max() < 1e-3
        if f"{name}.final_ids" not in numbers:
            continue
        edited = logits(cache, start, numbers[f"{name}.edited_ids"], reach[start:end])
        assert np.abs(edited - numbers[f"{name}.edited_logits"]).max() < 1e-3
        store = logits(cache, start, numbers[f"{name}.final_ids"], reach[start:end])
        assert np.abs(store - numbers[f"{name}.store_logits"]).max() < 1e-3
        held = backend.read_cache(cache, slice(0, 1))
        for layer in range(3):
            stored = held[f"cache_key.{layer}"][:, :, start:end]
            assert np.abs(stored - numbers[f"{name}.stored_key.{layer}"]).max() < 1e-4


def test_published_sdar_files_are_understood(tmp_path):
    """SDAR-8B-Chat's own config.json, tokenizer and index, with weights of the right names and no size."""
    real = ROOT / "tests" / "data" / "real" / "SDAR-8B-Chat"
    facts = pipeline.facts_of_checkpoint(str(real), "bf16")
    assert round(facts.parameters / 1e9, 2) == 8.19 and facts.head_dim == 128
    family = families.find("sdar")
    config = json.loads((real / "config.json").read_text())
    decoder = family.decoder(families.base.ConfigReader(config, "config.json"))
    names = {family.tensor_name(name) for name in pipeline.weights.weight_shapes(decoder)}
    index = json.loads((real / "model.safetensors.index.json").read_text())["weight_map"]
    assert names == set(index) and len(names) == 399


def test_the_mask_of_published_checkpoints_is_found_by_its_text(tmp_path):
    """SDAR's has two spellings, and may stand in added_tokens.json alone."""
    for number, text in enumerate(("<|MASK|>", "<MASK>")):
        path = shutil.copytree(GOLDENS / "sdar_tiny", tmp_path / f"checkpoint{number}")
        config = json.loads((path / "config.json").read_text())
        del config["mask_token_id"]
        (path / "config.json").write_text(json.dumps(config))
        (path / "added_tokens.json").write_text(json.dumps({text: 1000}))
        made = export_quietly(path, tmp_path / f"out{number}")
        assert manifests.load(made).decoding.mask_token_id == 1000


def test_it_is_quantised(tmp_path):
    path = write_checkpoint(families.find("sdar"), tmp_path / "checkpoint", model={"intermediate_size": 128})
    made = tmp_path / "out"
    quantize.export(
        ExportConfig(str(path), made),
        quantize.QuantizeConfig("w8a8", gate=False),
        lambda total: lambda done: None,
    )
    failed = [stage.name for stage in verify(made) if not stage.passed]
    assert failed == ["quality"]  # no prompts were given, so the gate was not run


@pytest.mark.parametrize("name", ["sdar", "fast_dllm_qwen"])
@pytest.mark.parametrize(("dtype", "lowering"), [("fp16", "modern"), ("bf16", "modern"), ("fp16", "legacy")])
def test_tensorrt_rtx_builds_it(tmp_path, name, dtype, lowering):
    """Engines of one and two graphs, and of one and two profiles; attention is one fused kernel."""
    pytest.importorskip("tensorrt_rtx_bindings")
    from trt_runtime.backends.tensorrt import store

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"hidden_size": 128} | (
        {"head_dim": 64} if name == "sdar" else {}
    )  # fp16 sums in fp32 from 64 on
    path = write_checkpoint(families.find(name), tmp_path / "checkpoint", model=sizes)
    made = export_quietly(path, tmp_path / "artifact", dtype=dtype, lowering=lowering)
    config = store.BuildConfig(
        "tensorrt-rtx", targets=("sm86", "sm89", "sm120"), max_batch=2, max_length=64, block_length=8
    )
    layouts = {"shared": ["shared"], "split": ["prefix", "refine"]}
    for layout in layouts if lowering == "modern" else ["split"]:
        engines = store.build(made, tmp_path / "engines", store.replace(config, layout=layout))
        assert sorted(file.stem for file in engines.glob("*.engine")) == layouts[layout]
        built = json.loads((engines / "engine.json").read_text(encoding="utf-8"))
        for engine, kernels in built["attention"].items():
            # the prefix graph alone: TensorRT-RTX 1.7 takes the scale out of its fp16 attention, and says so
            sums = "fp16" if (engine, dtype, lowering) == ("prefix", "fp16", "modern") else "fp32"
            assert [(kernel["sums"], kernel["dtype"]) for kernel in kernels] == [(sums, dtype)]
