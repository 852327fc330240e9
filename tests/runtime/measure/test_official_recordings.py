"""Recorded cases of the official loops: with or without a trace they expect the same, what they say is read
or refused by name, and what this version records of them replays."""

from __future__ import annotations

import json

import pytest
from official import BLOCK_CAUSAL, EXPERTS, FULL, Official, name_of

from trt_runtime.backends.ort import OrtBackend
from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError
from trt_runtime.measure import recordings, replay

OFFICIALS = [*FULL, *BLOCK_CAUSAL, *EXPERTS]


@pytest.fixture(scope="module", params=OFFICIALS, ids=name_of)
def official(request) -> Official:
    return request.param


@pytest.fixture(scope="module")
def artifact(official, tmp_path_factory):
    return official.export(tmp_path_factory.mktemp("official") / "artifact")


def _file(official, path, change, number: int = -1):
    """A file of one recorded case of the official's attention, changed: {key: value}, None for an absent key
    under `_without`."""
    recorded = official.recording()
    cases = [case for case in recorded["cases"] if official.keeps(case)]
    case = {key: value for key, value in cases[number].items() if key not in change.get("_without", ())}
    case |= {key: value for key, value in change.items() if key != "_without"}
    path.write_text(json.dumps({"format": recorded["format"], "cases": [case]}))
    return path


def _replayed(capsys, *argv) -> tuple[int, str]:
    code = cli.main(["replay", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_file_without_traces_expects_the_same(official, artifact, tmp_path, capsys):
    """The number of forwards is compared as this loop counts them, without the official one's last store."""
    recorded = official.recording()
    cases = [{key: value for key, value in case.items() if key != "trace"} for case in recorded["cases"]]
    (tmp_path / "cases.json").write_text(json.dumps({"format": recorded["format"], "cases": cases}))
    code, said = _replayed(capsys, artifact, tmp_path / "cases.json")
    assert code == 0 and f"{official.count} with expectations, 0 mismatches" in said, said
    wrong = [{**case, "nfe": case["nfe"] + 1, "nfe_nonempty": case["nfe"] + 1} for case in cases]
    (tmp_path / "wrong.json").write_text(json.dumps({"format": recorded["format"], "cases": wrong}))
    _, said = _replayed(capsys, artifact, tmp_path / "wrong.json")
    # LLaDA2 decodes behind the answer, and Fast-dLLM v2 may: then the number is not known
    least = {"llada2": 10, "llada21": 10}.get(official.name, official.count)
    assert said.count("nfe: expected") >= least, said


def test_what_this_version_records_of_them_replays(official, artifact, tmp_path):
    """Stop tokens, the mask, schedules and edits are inputs of a recorded case."""
    backend = OrtBackend(artifact, threads=1)
    recorded = replay.record(backend, official.cases()[:12])
    (tmp_path / "again.json").write_text(json.dumps(recorded))
    again = recordings.read_file(tmp_path / "again.json", backend.manifest.model.family)
    assert len(again.cases) == 12 and again.format == 3 and not again.unread
    assert [replay.compare(case, replay.replay(backend, case)) for case in again.cases] == [None] * 12


@pytest.mark.parametrize("value", [None, "a", -1, True, 1.5, {}, [["a"]]], ids=repr)
def test_values_of_the_wrong_kind_are_refused_by_name(official, tmp_path, value):
    """Before anything runs, and never read as another value."""
    (case,) = json.loads(_file(official, tmp_path / "cases.json", {}).read_text())["cases"]
    keys = ("mask_token_id", "prompt", "block_length", "mode", "steps", "output", "nfe", "trace", "matches")
    for key in [key for key in keys if key in case]:
        if (key, value) == ("matches", {}) or (
            key == "steps" and value is None and official in FULL + EXPERTS[:1]
        ):
            continue  # valid: steps do not bound a threshold
        with pytest.raises(DllmError, match=f"{key} is") as error:
            recordings.read_file(_file(official, tmp_path / "cases.json", {key: value}))
        assert f"cases.json: case {case['id']}: " in str(error.value) and "\n" not in str(error.value)


REFUSED = [
    ("sdar", {"gen_length": 0}, "gen_length is 0, expected a whole number from 1"),
    ("sdar", {"gen_length": 10**6}, "but gen_length 1000000 after"),
    ("sdar", {"alg": "best"}, "alg is best, expected 'low_confidence_dynamic' or"),
    ("sdar", {"threshold": None, "alg": "low_confidence_dynamic"}, "threshold is missing"),
    ("sdar", {"prompt": [[1], [2]]}, "expected one row of token ids"),
    ("sdar", {"temperature": 1.0}, "temperature is 1.0, expected 0"),
    ("sdar", {"api": "generate"}, "api is generate, but a recording of SDAR's loop has no such field"),
    ("sdar", {"stop": [99999]}, "stop is [99999], expected ids below 1024"),
    ("sdar", {"eos_token_id": 7}, "a recording of SDAR's loop has no such field"),
    ("sdar", {"nfe": 99}, "nfe is 99, but its trace has"),
    ("fastdllm_v2", {"api": "sample"}, "api is sample, expected 'generate' or 'batch_sample'"),
    ("fastdllm_v2", {"gen_length": 1}, "gen_length is 1, which this loop rounds down"),
    ("fastdllm_v2", {"small_block": 5}, "small_block is 5, expected a divisor of block_length"),
    ("fastdllm_v2", {"threshold": None}, "threshold is null, expected a number"),
    ("a2d_qwen3", {"api": "any"}, "api is any, expected 'mdlm' or 'bd3lm'"),
    ("a2d_qwen3", {"threshold": 0.9}, "these samplers have a schedule only"),
    ("lladamoe", {"alg": "best"}, "unknown alg 'best'"),
    ("lladamoe", {"mode": "block"}, "mode is block, expected 'none' or 'prefix' or 'dual'"),
    ("lladamoe", {"_without": ("mask_token_id",)}, "has no 'mask_token_id', and the checkpoint names none"),
    ("llada2", {"_without": ("mask_token_id",)}, "has no 'mask_token_id', and the checkpoint names none"),
    ("llada2", {"mask_token_id": 5000}, "mask_token_id is 5000, expected below 1024"),
    ("llada2", {"minimal_topk": 0}, "minimal_topk is 0, expected a whole number from 1"),
    ("llada2", {"minimal_topk": 10**5}, "this loop then takes no step"),
    ("llada2", {"alg": "low_confidence_static"}, "a recording of LLaDA2.0's loop has no such field"),
    ("llada2", {"trace": [["near", 0, 8, [9], [1]]], "nfe": 1}, "trace has a step 'near'"),
    ("llada21", {"num_to_transfer": 0}, "num_to_transfer is 0"),
    ("llada21", {"_without": ("editing_threshold",), "family": "llada21"}, "has no 'editing_threshold'"),
    ("llada21", {"eos_token_id": 99999}, "eos_token_id is 99999, expected ids below 1024"),
    ("llada21", {"trace": [["full", 0, 8, [9], [1]]], "nfe": 1}, "edited positions, their new tokens"),
    ("rnd1", {"mode": "dual"}, "mode is dual, expected 'none'"),
    ("rnd1", {"eb_gamma": -1}, "eb_gamma is -1, expected a number from 0"),
    ("rnd1", {"seq_len": 3}, "seq_len is 3, expected room for"),
    ("rnd1", {"eos_token_id": "a"}, "eos_token_id is a, expected a token id"),
    (
        "rnd1",
        {"seq_len": 600, "_without": ("output", "trace", "nfe")},
        "more than the 511 that the model has",
    ),
]


def test_what_a_loop_does_not_have_is_refused(official, artifact, tmp_path, capsys):
    own = [(change, said) for name, change, said in REFUSED if name == official.name]
    for change, expected in own:
        code, said = _replayed(capsys, artifact, _file(official, tmp_path / "cases.json", change))
        assert code == 1 and expected in said and "case " in said, (change, said)
    assert own or official.name == "illada"


def test_a_case_that_names_no_family_is_of_the_artifact(official, artifact, tmp_path, capsys):
    """Of the families that its fields leave open."""
    code, said = _replayed(capsys, artifact, _file(official, tmp_path / "x.json", {"_without": ("family",)}))
    assert code == 0 and "1 with expectations, 0 mismatches" in said and "skipped" not in said, said


def test_what_is_not_read_is_said(official, artifact, tmp_path, capsys):
    """A field that no loop has, other lists of the file, and cases of another family."""
    file = _file(official, tmp_path / "cases.json", {"transfer_schedule": "cosine"})
    read = json.loads(file.read_text())
    file.write_text(json.dumps(read | {"quirk_cases": [{}, {}]}))
    code, said = _replayed(capsys, artifact, file)
    assert code == 0 and "not read: fields of cases that no loop here has: transfer_schedule (1)" in said
    assert "not replayed: quirk_cases (2); only 'cases' are" in said
    code, said = _replayed(capsys, artifact, _file(official, file, {"family": "unheard_of"}))
    assert code == 1 and "skipped: 1 cases of other families" in said and "nothing was compared" in said
    file.write_text('{"cases": []}')
    code, said = _replayed(capsys, artifact, file)
    assert code == 1 and "contains no cases" in said
