"""What goes wrong in an evaluation is one line: tasks, their code, their data, the network."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from evaluating import TASKS

from trt_runtime.cli import main as cli
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError

pytest.importorskip("lm_eval")
from trt_runtime.measure import evaluation, evaluation_errors

pytestmark = pytest.mark.usefixtures("offline")

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
        ("out of memory", "--batch"),
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
        ("--gen-kwargs contains 'temperature'",),
    ),
}
CODE = """
def needs_package(**o):
    import no_such_package
def needs_math(**o):
    raise AssertionError("`sympy` and `antlr4-python3-runtime==4.11` are required: pip install lm-eval[math]")
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
    with pytest.raises(DllmError, match="remove --chat"):
        evaluation.run(harness, ["twin_gsm8k"], evaluation.Settings((TASKS,), False, 0, 1, True))
