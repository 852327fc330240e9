"""`dllm-trt eval` on tasks of the shapes that docs/how-to/evaluate-and-tune.md runs (tests/data/tasks), and what goes wrong
with tasks, in one line each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from documents import commands
from places import ROOT

from trt_runtime.cli import main as cli
from trt_runtime.errors import DllmError

pytest.importorskip("lm_eval")
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.measure import evaluation, evaluation_errors

TASKS = ROOT / "tests" / "data" / "tasks"
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
    if name == "docs/how-to/evaluate-and-tune.md" and words[1] == "eval" and words[2] != "artifacts/llada-demo"
]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """No network, and the warnings of lm-eval and datasets are theirs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    os.environ.pop("HF_ALLOW_CODE_EVAL", None)


def _eval(artifact, *words):
    return cli.main(
        ["eval", str(artifact), "--include-path", str(TASKS), "--limit", "2", "--mc-samples", "2", *words]
    )


def test_every_recipe_has_a_twin():
    named = {words[words.index("--tasks") + 1] for words in RECIPES}
    assert named <= set(TWINS) and len(named) >= 4


@pytest.mark.parametrize("words", RECIPES, ids=lambda words: words[words.index("--tasks") + 1])
def test_the_documented_recipes_run_on_a_task_of_the_same_shape(demo_artifact, words, capsys, tmp_path):
    words = [TWINS.get(word, word) for word in words[2:]]
    for option in ("--include-path", "--limit", "--mc-samples"):
        assert option not in words
    assert _eval(demo_artifact, *words, "--gen-length", "96", "--output", str(tmp_path / "out.json")) == 0, (
        capsys.readouterr().err
    )
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["figures"]["answers"] + report["figures"]["likelihoods"] > 0 and report["results"]
    assert words[words.index("--tasks") + 1] in capsys.readouterr().out


def test_answers_that_the_task_begins_are_right(demo_artifact, capsys, tmp_path):
    """gen_prefix in a conversation: the model goes on from it, and what it runs does what it should."""
    out = tmp_path / "out.json"
    assert (
        _eval(
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
        assert _eval(demo_artifact, "--tasks", "twin_humaneval_64", "--chat", *words) == 0
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
        _eval(
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
    assert _eval(demo_artifact, "--tasks", "twin_gsm8k", "--gen-kwargs", f"max_gen_toks={length}") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: max_gen_toks of the task is") and "expected a whole number" in said


def test_take_first_takes_one_of_the_draws(demo_artifact, tmp_path):
    out = tmp_path / "out.json"
    assert _eval(demo_artifact, "--tasks", "twin_take_first", "--chat", "--output", str(out)) == 0
    report = json.loads(out.read_text())
    assert report["figures"]["answers"] == 12 and "exact_match,first" in report["results"]["twin_take_first"]


UNSAFE = "runs code that the model writes"
WRONG = {
    "unsafe": (
        None,
        ["twin_humaneval_instruct"],
        (UNSAFE, "--confirm-run-unsafe-code", "HF_ALLOW_CODE_EVAL=1"),
    ),
    "no data": (
        "dataset_path: nobody/nothing\n",
        ["broken"],
        ("data cannot be downloaded", "--include-path"),
    ),
    "no yaml": (
        "task: broken\ndoc_to_text: [\n",
        ["broken"],
        ("broken.yaml: lm-eval cannot read it", ", line "),
    ),
    "no function": ("custom_dataset: !function nowhere.data\n", ["broken"], ("missing", "nowhere")),
    "no package": (
        "custom_dataset: !function code.needs_package\n",
        ["broken"],
        ("package that is missing", "no_such_package"),
    ),
    "no math": ("custom_dataset: !function code.needs_math\n", ["broken"], ("[eval]", "antlr4")),
    "raises": (
        "custom_dataset: !function code.raises\n",
        ["broken"],
        ("lm-eval failed (ValueError: first line; code.py, line 7)",),
    ),
    "exits": (
        "custom_dataset: !function code.leaves\n",
        ["broken"],
        ("lm-eval failed (SystemExit: 3; code.py, line 9)",),
    ),
    "too big": (
        "custom_dataset: !function code.too_big\n",
        ["broken"],
        ("memory does not suffice", "--batch"),
    ),
    "metric": (
        "custom_dataset: !function code.rows\nmetric_list: [{metric: no_such_metric}]\n",
        ["broken"],
        ("lm-eval failed (KeyError: None; task.py, line ",),
    ),
    "bad option": (
        "custom_dataset: !function code.rows\ngeneration_kwargs: {num_beams: 3}\n",
        ["broken"],
        ("num_beams", "--gen-kwargs"),
    ),
    "bad value": (
        "custom_dataset: !function code.rows\ngeneration_kwargs: {do_sample: true, temperature: 500}\n",
        ["broken"],
        ("temperature is 500", "--gen-kwargs"),
    ),
    "result": (
        "custom_dataset: !function code.rows\nprocess_results: !function code.bad_results\n",
        ["broken"],
        ("ZeroDivisionError",),
    ),
    "asked wrongly": (
        "custom_dataset: !function code.rows\n",
        ["broken", "--gen-kwargs", "temperature"],
        ("--gen-kwargs has 'temperature'",),
    ),
}
CODE = """
def needs_package(**o):
    import no_such_package
def needs_math(**o):
    raise AssertionError("`sympy`, `math_verify` and `antlr4-python3-runtime==4.11` are required: pip install lm-eval[math]")
def raises(**o):
    raise ValueError("\\nfirst line\\nsecond line")
def leaves(**o):
    raise SystemExit(3)
def too_big(**o):
    raise MemoryError("1 TB")
def bad_results(doc, results):
    return {"exact_match": 1 / 0}
def rows(**o):
    from datasets import Dataset
    return {"test": Dataset.from_list([{"q": "clean hall with mop", "a": "x"}])}
"""
SHAPE = (
    'task: broken\noutput_type: generate_until\ntest_split: test\ndoc_to_text: "{{q}}"\ndoc_to_target: '
    '"{{a}}"\n'
)


@pytest.mark.parametrize("name", WRONG)
def test_what_goes_wrong_with_a_task_is_one_line(name, demo_artifact, tmp_path, capsys):
    text, words, said = WRONG[name]
    if text is not None:
        body = text if text.startswith("task:") else SHAPE + text
        if "metric_list" not in body:
            body += (
                "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
                if name != "no yaml"
                else ""
            )
        (tmp_path / "broken.yaml").write_text(body)
        (tmp_path / "code.py").write_text(CODE)
    folder = TASKS if text is None else tmp_path
    assert (
        cli.main(
            ["eval", str(demo_artifact), "--include-path", str(folder), "--limit", "1", "--tasks", *words]
        )
        == 1
    )
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith("error: ") and all(part in last for part in said) and "Traceback" not in error, (
        error
    )


def test_python_says_more_and_keeps_the_cause(model):
    """What the metric's own gate says, where the caller allowed the code and forgot the variable."""
    harness = evaluation.Harness(model, GenerationConfig(), batch=1, samples=1, check_greedy=False)
    with pytest.raises(DllmError, match="set HF_ALLOW_CODE_EVAL=1 as well") as error:
        evaluation.run(
            harness,
            ["twin_humaneval_instruct"],
            evaluation.Settings((TASKS,), False, None, 1, True, run_unsafe_code=True),
        )
    assert isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize("kind", ["ConnectionError", "requests", "httpx", "hub"])
def test_a_network_that_is_not_there(kind):
    import httpx
    import requests
    from huggingface_hub.errors import LocalEntryNotFoundError

    made = {
        "ConnectionError": ConnectionError("Couldn't reach x"),
        "requests": requests.exceptions.ReadTimeout("slow"),
        "httpx": httpx.ConnectError("no route"),
        "hub": LocalEntryNotFoundError("not cached"),
    }[kind]
    with (
        pytest.raises(DllmError, match="the task's data cannot be downloaded"),
        evaluation_errors.in_one_line(run_unsafe_code=False),
    ):
        raise RuntimeError("wrapped") from made


def test_errors_of_this_project_stay_as_they_are():
    with pytest.raises(DllmError, match=r"^mine$"), evaluation_errors.in_one_line(run_unsafe_code=False):
        try:
            raise DllmError("mine")
        except DllmError as error:
            raise ValueError("lm-eval's wrapping") from error


def test_the_same_in_a_process_of_its_own(demo_artifact, tmp_path):
    """As a user sees it: no data without a network."""
    command = [
        sys.executable,
        "-m",
        "trt_runtime.cli",
        "eval",
        str(demo_artifact),
        "--tasks",
        "gsm8k",
        "--limit",
        "1",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={"HF_HOME": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.fullmatch(
        r"error: the task's data cannot be downloaded \(.*gsm8k.*\): .*", done.stderr.splitlines()[-1]
    )


def test_an_artifact_without_a_template_is_told_to_leave_chat_out(model, monkeypatch):
    harness = evaluation.Harness(model, GenerationConfig(), batch=1, samples=1, check_greedy=False)
    monkeypatch.setattr(type(model.tokenizer), "has_chat_template", False)
    with pytest.raises(DllmError, match="leave --chat out"):
        evaluation.run(harness, ["twin_gsm8k"], evaluation.Settings((TASKS,), False, 0, 1, True))


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
        _eval(
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
