"""The command line as a user meets it: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
from demo import PLAN, PROMPT, demo_task
from places import DEMO, GOLDENS

from trt_runtime.cli import main as cli
from trt_runtime.model import load


def run(*argv) -> int:
    return cli.main([str(item) for item in argv])


def failed(capsys, *argv) -> str:
    """Run a command that must fail: status 1, one line on standard error, no traceback."""
    assert run(*argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_generate_prints_answers(demo_artifact, capsys):
    assert run("generate", demo_artifact, PROMPT) == 0
    printed = capsys.readouterr()
    assert demo_task.is_right(printed.out.strip(), PLAN)
    assert "forwards" in printed.err and "tokens/s" in printed.err
    assert run("generate", demo_artifact, PROMPT, "clean hall with mop", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert len(results) == 2 and results[0]["text"] == printed.out.strip()
    assert results[0]["nfe"] == len(results[0]["trace"]) and results[0]["tokens_per_forward"] > 1


def test_generate_reads_standard_input_and_ids(demo_artifact, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n\nclean hall with mop\n"))
    assert run("generate", demo_artifact, "-") == 0
    assert capsys.readouterr().out.count("[{") == 2
    ids = ",".join(map(str, load(demo_artifact).encode(PROMPT)))
    assert run("generate", demo_artifact, "--ids", ids) == 0
    assert demo_task.is_right(capsys.readouterr().out.strip(), PLAN)


@pytest.mark.parametrize(
    "options",
    [
        ["--cache", "none"],
        ["--policy", "factor"],
        ["--policy", "fixed", "--steps", "48"],
        ["--temperature", "0.1", "--seed", "3"],
        ["--threads", "1", "--block-length", "16"],
    ],
)
def test_generate_takes_its_options(demo_artifact, capsys, options):
    assert run("generate", demo_artifact, PROMPT, *options) == 0
    assert capsys.readouterr().out.startswith("[{")


def test_unknown_words_are_warned_of(demo_artifact, capsys):
    assert run("generate", demo_artifact, "take zeppelins from kitchen to garage") == 0
    assert "warning: not in the model's vocabulary: zeppelins" in capsys.readouterr().err


def test_stream_to_a_pipe_prints_finished_text_once(demo_artifact, capsys):
    assert run("generate", demo_artifact, PROMPT, "--stream") == 0
    printed = capsys.readouterr().out
    assert demo_task.is_right(printed.strip(), PLAN) and "\x1b" not in printed


def test_chat_answers_line_by_line(demo_artifact, capsys, monkeypatch):
    """An empty line is nothing, /new and /reset begin a new conversation, and the prompt is shown to nobody
    who does not type."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n/new\n\n/nwe\nclean hall with mop\n"))
    assert run("chat", demo_artifact, "--single-turn") == 0
    printed = capsys.readouterr()
    answers = printed.out.strip().splitlines()
    assert len(answers) == 2 and demo_task.is_right(answers[0], PLAN)
    assert (
        "error: unknown command '/nwe': did you mean '/new'?" in printed.err
        and "new conversation" in printed.err
    )


def test_chat_takes_commands(demo_artifact, capsys, monkeypatch):
    for ending in ("/exit", "/quit"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"/help\n{ending}\nclean hall with mop\n"))
        assert run("chat", demo_artifact) == 0
        said = capsys.readouterr().out
        assert (
            all(name in said for name in ("/help", "/reset", "/new", "/exit", "/quit")) and "[{" not in said
        )


def test_chat_keeps_the_conversation_until_it_is_reset(demo_artifact, monkeypatch):
    from trt_runtime.model import Model

    asked, stream = [], Model.stream

    def listening(self, prompts, config=None, *, raw=False):
        asked.append(prompts[0])
        return stream(self, [[prompts[0][-1]]], config, raw=raw)

    monkeypatch.setattr(Model, "stream", listening)
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("clean hall with mop\nclean hall with mop\n/reset\nclean hall with mop\n")
    )
    assert run("chat", demo_artifact) == 0
    assert [len(messages) for messages in asked] == [1, 3, 1]
    assert asked[1][1] == {"role": "assistant", "content": '[{"do": "clean", "in": "hall", "with": "mop"}]'}


def test_info_says_what_an_artifact_is(demo_artifact, capsys):
    assert run("info", demo_artifact, "--check") == 0
    page = capsys.readouterr().out
    for said in ("llada", "fp32", "4 layers", "logits head", "tokenizer", "gen_length"):
        assert said in page
    assert run("info", demo_artifact, "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"]["family"] == "llada"


def test_replay_compares_and_records(golden_artifact, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert run("replay", golden_artifact, GOLDENS / "cases.json", "--output", out) == 0
    said = capsys.readouterr().out
    assert "skipped: 79 cases of other families" in said
    assert "79 cases on ort in fp32: 79 with expectations, 0 mismatches, 0 ambiguous" in said
    written = json.loads(out.read_text())["cases"]
    assert len(written) == 79 and set(written[0]) == {"id", "output", "nfe", "trace"}
    recorded = tmp_path / "recorded.json"
    assert run("replay", golden_artifact, "--record", recorded, "--count", "6") == 0
    assert run("replay", golden_artifact, recorded) == 0
    cases = json.loads(recorded.read_text())
    cases["cases"][2]["trace"][1][4][0] ^= 1
    recorded.write_text(json.dumps(cases))
    capsys.readouterr()
    assert run("replay", golden_artifact, recorded) == 1
    said = capsys.readouterr().out
    assert "MISMATCH random-0-2: step 1: position" in said and "1 mismatches" in said


def test_the_demo_model_replays_what_pytorch_recorded(demo_artifact, capsys):
    """What `make demo` proves without PyTorch."""
    assert run("replay", demo_artifact, DEMO / "cases.json") == 0
    assert "0 mismatches" in capsys.readouterr().out


def test_bench_measures_variants(demo_artifact, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n")
    out = tmp_path / "bench.json"
    assert (
        run("bench", demo_artifact, "--prompts", prompts, "--repeats", "1", "--output", out, "--threads", "1")
        == 0
    )
    table = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert [row["variant"] for row in report["rows"]] == [
        "ort none",
        "ort prefix",
        "ort dual",
        "ort none+parallel",
        "ort prefix+parallel",
        "ort dual+parallel",
    ]
    assert all(row["variant"] in table for row in report["rows"])
    rows = {row["variant"]: row for row in report["rows"]}
    assert rows["ort none"]["tokens_per_forward"] <= 1 < rows["ort dual+parallel"]["tokens_per_forward"]
    assert rows["ort none"]["refine_ms"] is None and rows["ort dual"]["refine_ms"] > 0
    assert report["peak_memory_mib"]["ort"] > 20 and report["machine"]["versions"]["onnxruntime"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threshold", "0"], "threshold is 0.0"),
        (["--threshold", "2"], "threshold is 2.0"),
        (["--gen-length", "0"], "gen_length is 0"),
        (["--gen-length", "250"], "more than the model's 256"),
        (["--cache", "both"], "unknown cache 'both'"),
        (["--policy", "best"], "unknown policy 'best'"),
        (["--backend", "cuda"], "unknown backend 'cuda'"),
        (["--threads", "0"], "--threads is 0"),
        (["--checkpoint", "x"], "--checkpoint needs --backend torch"),
        (["--ids", "1,x"], "--ids is '1,x'"),
        (["--stream", "--json"], "remove --json"),
        (["--speculate", "2147483648"], "--speculate is 2147483648, expected at most"),
        (["--speculate", "100000"], "speculate is 100000, expected 1"),
    ],
)
def test_generate_refuses(demo_artifact, capsys, arguments, said):
    assert said in failed(capsys, "generate", demo_artifact, PROMPT, *arguments)


def test_errors_are_one_line(demo_artifact, golden_artifact, tmp_path, capsys):
    assert "the prompt is empty" in failed(capsys, "generate", demo_artifact, "")
    assert "no prompt" in failed(capsys, "generate", demo_artifact)
    assert "mask token" in failed(capsys, "generate", demo_artifact, "take <|mdm_mask|> cups")
    assert "more than the model's 256" in failed(capsys, "generate", demo_artifact, "red " * 300)
    assert "not an artifact" in failed(capsys, "info", tmp_path)
    assert "no chat template" in failed(capsys, "chat", golden_artifact)
    assert "no cases" in failed(capsys, "replay", golden_artifact)
    assert "not readable as JSON" in failed(capsys, "replay", golden_artifact, tmp_path / "none.json")
    (tmp_path / "cases.json").write_text('{"cases": [{"id": "x", "family": "other"}]}')
    assert run("replay", golden_artifact, tmp_path / "cases.json") == 1
    assert "no case is of the family" in capsys.readouterr().err
    (tmp_path / "cases.json").write_text('{"cases": [{"id": "x"}]}')
    assert "case x: has no 'mode'" in failed(capsys, "replay", golden_artifact, tmp_path / "cases.json")
    assert "--repeats is 0" in failed(capsys, "bench", demo_artifact, "--repeats", "0")
    damaged = shutil.copytree(demo_artifact, tmp_path / "damaged")
    with open(damaged / "weights.data", "r+b") as file:
        file.seek(5000)
        file.write(b"\xff\xff\xff")
    assert "SHA-256" in failed(capsys, "info", damaged, "--check")
    with open(damaged / "weights.data", "ab") as file:
        file.write(b"x")
    assert "the manifest says" in failed(capsys, "generate", damaged, PROMPT)


def test_a_prompt_may_stand_behind_an_option(demo_artifact, capsys):
    assert run("generate", demo_artifact, "--gen-length", "96", PROMPT) == 0
    assert demo_task.is_right(capsys.readouterr().out.strip(), PLAN)
    for wrong in (["generate", demo_artifact, PROMPT, "--thresold", "1"], ["info", demo_artifact, "more"]):
        with pytest.raises(SystemExit) as stop:
            run(*wrong)
        assert stop.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--threshold", "0.8", "--policy", "fixed"],
            "threshold needs policy threshold or ",
        ),
        (["--factor", "2"], "factor needs policy factor"),
        (["--steps", "20", "--policy", "factor"], "one of threshold, fixed"),
        (["--steps", "8"], "at least one step per block"),
        (
            ["--alg-temp", "0.5"],
            "alg_temp needs policy entropy or maskgit_plus or topk_margin, got policy 'threshold'",
        ),
        (["--top-k", "0"], "top_k is 0"),
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--steps", "2", "--policy", "fixed"], "at least one step per block"),
        (["--seed", "3"], "--seed has no effect without random draws"),
        (["--seed", "-3", "--temperature", "1"], "seed is -3"),
        (["--temperature", "1e308"], "temperature is 1e+308"),
        (["--threads", "100000"], "--threads is 100000"),
    ],
)
def test_no_option_is_ignored(demo_artifact, capsys, arguments, said):
    assert said in failed(capsys, "generate", demo_artifact, PROMPT, *arguments)


def test_infill_prints_the_whole_text(demo_artifact, capsys):
    template = (
        '<|user|>clean hall with mop<|assistant|>[{"do": "clean", "in": "<|mdm_mask|>", "with": '
        '"<|mdm_mask|>"}]'
    )
    assert run("generate", demo_artifact, template, "--raw", "--infill", "--gen-length", "0") == 0
    assert '"in": "hall", "with": "mop"}]' in capsys.readouterr().out


def test_bytes_that_are_no_text_and_outputs_that_cannot_be_written(
    demo_artifact, golden_artifact, tmp_path, capsys
):
    assert "not valid Unicode" in failed(capsys, "generate", demo_artifact, "\udcff\udcfe")
    assert "cannot be written" in failed(
        capsys, "replay", golden_artifact, "--record", tmp_path / "no" / "x.json", "--count", "1"
    )
    assert "remove --output" in failed(
        capsys, "replay", golden_artifact, "--record", tmp_path / "x.json", "--output", tmp_path / "y.json"
    )
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    assert "not UTF-8 text" in failed(capsys, "bench", demo_artifact, "--prompts", tmp_path / "bytes.txt")
