"""`dllm-trt eval` on tasks of the shapes that docs/how-to/evaluate-and-tune.md runs (tests/data/tasks)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from documents import commands
from evaluating import TASKS, evaluate
from places import ROOT

from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError

pytest.importorskip("lm_eval")
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.measure import evaluation

pytestmark = pytest.mark.usefixtures("offline")

TWINS = {
    "gsm8k": "twin_gsm8k",
    "minerva_math": "twin_minerva_math",
    "humaneval_instruct": "twin_humaneval_instruct",
    "mbpp_instruct": "twin_mbpp_instruct",
    "wikitext": "twin_wikitext",
    "arc_easy": "twin_choice",
    "humaneval_64": "twin_humaneval_64",
}
RECIPES = [
    words[1:]
    for name, words in commands()
    if name == "docs/how-to/evaluate-and-tune.md"
    and words[1] == "eval"
    and words[2] != "artifacts/llada-demo"
]


def test_every_recipe_has_a_twin():
    named = {words[words.index("--tasks") + 1] for words in RECIPES}
    assert named <= set(TWINS) and len(named) >= 4


@pytest.mark.parametrize("words", RECIPES, ids=lambda words: words[words.index("--tasks") + 1])
def test_the_documented_recipes_run_on_a_task_of_the_same_shape(demo_artifact, words, capsys, tmp_path):
    words = [TWINS.get(word, word) for word in words[2:]]
    for option in ("--include-path", "--limit", "--mc-samples"):
        assert option not in words
    assert (
        evaluate(demo_artifact, *words, "--gen-length", "96", "--output", str(tmp_path / "out.json")) == 0
    ), capsys.readouterr().err
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["figures"]["answers"] + report["figures"]["likelihoods"] > 0 and report["results"]
    assert words[words.index("--tasks") + 1] in capsys.readouterr().out


def test_answers_that_the_task_begins_are_right(demo_artifact, capsys, tmp_path):
    """gen_prefix in a conversation: the model goes on from it, and what it runs does what it should."""
    out = tmp_path / "out.json"
    assert (
        evaluate(
            demo_artifact,
            "--tasks",
            "twin_humaneval_instruct",
            "--chat",
            "--limit",
            "6",
            "--confirm-run-unsafe-code",
            "--output",
            str(out),
        )
        == 0
    )
    assert json.loads(out.read_text())["results"]["twin_humaneval_instruct"]["pass@1,create_test"] >= 0.5
    assert "pass@1 (create_test)" in capsys.readouterr().out


def test_a_begun_answer_stands_at_the_end_of_the_prompt_with_and_without_chat(model, monkeypatch):
    """Few shots as turns, too."""
    asked = []

    def answers(self, contexts, seeds, options):
        asked.extend(contexts)
        return ["x"] * len(contexts)

    monkeypatch.setattr(evaluation.Harness, "_answers", answers)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    for chat, shots in ((True, None), (False, None), (True, 3), (False, 3)):
        harness = evaluation.Harness(model, GenerationConfig(), batch=2, samples=2, check_greedy=False)
        name = "twin_humaneval_instruct" if shots is None else "twin_mbpp_instruct"
        asked.clear()
        evaluation.run(
            harness, [name], evaluation.Settings((TASKS,), False, shots, 2, chat, run_unsafe_code=True)
        )
        assert len(asked) == 2 and all(
            text.rstrip().endswith('[{"' if shots is None else "[") for text in asked
        ), asked
        opened = model.tokenizer.render_chat([{"role": "user", "content": "?"}]).partition("?")[2]
        assert all((opened.strip() in text) == chat for text in asked) and (
            shots is None or all(text.count("[") > 3 for text in asked)
        )


def test_repeats_are_draws_of_their_own(model, monkeypatch, demo_artifact, tmp_path):
    """The same ones for any batch, with other tasks beside them, and for one seed alone."""
    drawn, name = {}, ["1"]
    base = evaluation.Harness.generate_until

    def kept(self, requests, disable_tqdm=False):
        drawn[name[0]] = base(self, requests, disable_tqdm)
        return drawn[name[0]]

    monkeypatch.setattr(evaluation.Harness, "generate_until", kept)
    for name[0], words in {
        "1": ["--batch", "1"],
        "4": ["--batch", "4"],
        "again": ["--batch", "4"],
        "two": ["--batch", "12"],
        "command line": ["--batch", "5", "--gen-kwargs", "do_sample=False", "--temperature", "1.5"],
        "other seed": ["--batch", "4", "--temperature", "1.5", "--seed", "9"],
        "seed alone": ["--batch", "3", "--seed", "9"],
    }.items():
        assert evaluate(demo_artifact, "--tasks", "twin_humaneval_64", "--chat", *words) == 0
    assert len(drawn["1"]) == 12 and len(set(drawn["1"][:6])) >= 4 and len(set(drawn["1"][6:])) >= 4
    assert (
        drawn["1"]
        == drawn["4"]
        == drawn["again"]
        == drawn["two"]
        == drawn["command line"]
        != drawn["other seed"]
    )
    assert drawn["other seed"] == drawn["seed alone"]  # of a task that draws by itself
    name[0] = "beside"
    out = tmp_path / "out.json"
    assert (
        evaluate(
            demo_artifact,
            "--tasks",
            "twin_gsm8k,twin_humaneval_64",
            "--chat",
            "--limit",
            "1",
            "--output",
            str(out),
        )
        == 0
    )
    assert set(drawn["1"][:6]) <= set(drawn["beside"])
    assert json.loads(out.read_text())["results"]["twin_humaneval_64"]["texts,all"] == len(
        set(drawn["1"][:6])
    )


def test_the_demo_task_takes_examples(demo_artifact):
    assert (
        cli.main(
            [
                "eval",
                str(demo_artifact),
                "--tasks",
                "demo_plan",
                "--include-path",
                str(ROOT / "benchmarks" / "tasks"),
                "--num-fewshot",
                "2",
                "--limit",
                "1",
                "--gen-length",
                "32",
            ]
        )
        == 0
    )


@pytest.mark.parametrize("length", ["x", "1.5", "inf", "1e400", "True"])
def test_a_length_of_the_task_that_is_no_number_is_told(demo_artifact, length, capsys):
    assert evaluate(demo_artifact, "--tasks", "twin_gsm8k", "--gen-kwargs", f"max_gen_toks={length}") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: max_gen_toks of the task is") and "expected a whole number" in said


def test_take_first_takes_one_of_the_draws(demo_artifact, tmp_path):
    out = tmp_path / "out.json"
    assert evaluate(demo_artifact, "--tasks", "twin_take_first", "--chat", "--output", str(out)) == 0
    report = json.loads(out.read_text())
    assert report["figures"]["answers"] == 12 and "exact_match,first" in report["results"]["twin_take_first"]


def test_until_can_be_left_uncut(demo_artifact, tmp_path, model):
    options = {"until": ["]", "["], "max_gen_toks": 64}
    prompt = model.tokenizer.render_chat([{"role": "user", "content": "clean hall with mop"}])
    texts = []
    for escape in (False, True):
        harness = evaluation.Harness(
            model, GenerationConfig(), batch=1, samples=1, check_greedy=False, escape_until=escape
        )
        texts += harness.generate_until([type("R", (), {"args": (prompt, options)})()])
    assert texts[0] == "" and texts[1].startswith("[") and texts[1].endswith("]")
    out = tmp_path / "out.json"
    assert (
        evaluate(
            demo_artifact,
            "--tasks",
            "twin_gsm8k",
            "--escape-until",
            "--add-bos",
            "no",
            "--max-length",
            "100",
            "--gen-length",
            "32",
            "--output",
            str(out),
        )
        == 0
    )
    report = json.loads(out.read_text())["decoding"]
    assert (
        report["escape_until"]
        and report["add_bos"] == "no"
        and report["max_length"] == report["window"] == 100
    )


def test_what_is_drawn_is_the_tasks_unless_the_command_line_says(model):
    def drawn(options, **given):
        harness = evaluation.Harness(
            model, replace(GenerationConfig(), **given), batch=1, samples=1, check_greedy=False
        )
        return harness._config_of(options).temperature

    assert drawn({"do_sample": True, "temperature": 0.4}) == 0.4 and drawn({"temperature": 0.4}) == 0.4
    assert drawn({"do_sample": True}) == 1.0 and drawn({"do_sample": True, "temperature": 0}) == 0
    assert drawn({"do_sample": False, "temperature": 0.4}) == 0 and drawn({}) == 0
    assert drawn({"do_sample": True, "temperature": 1e-5}) == 0 and drawn({"temperature": 0.001}) == 0.001
    assert (
        drawn({"do_sample": True, "temperature": 0.4}, temperature=0.7) == 0.7
        and drawn({"do_sample": False}, temperature=0.7) == 0.7
    )
    with pytest.raises(
        DllmError, match=r"top_p.*The task asks for temperature 0.2, top_p 1.5 \(--gen-kwargs"
    ):
        drawn({"do_sample": True, "temperature": 0.2, "top_p": 1.5})
    harness = evaluation.Harness(model, GenerationConfig(), batch=1, samples=1, check_greedy=False)
    assert harness._config_of({"max_new_tokens": 24}).gen_length == 24
