"""lm-evaluation-harness over an artifact: likelihoods against enumeration, answers against `generate`, and
the command with the tasks of benchmarks/tasks."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from places import ROOT

from trt_runtime.cli import main as cli
from trt_runtime.decoding.backend import Window
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError
from trt_runtime.measure import likelihood
from trt_runtime.model import Model

pytest.importorskip("lm_eval")
from trt_runtime.measure import evaluation

TASKS = ROOT / "benchmarks" / "tasks"
ORDER = "clean hall with mop"


def _enumerated(model, context, target):
    """The expectation over all ways to mask: l uniform in 1..L, then a subset of l; log p of each masked
    token by itself."""
    ids, n = [*context, *target], len(target)
    mask, shift = model.manifest.decoding.mask_token_id, model.manifest.decoding.logit_shift
    cache, total = model.backend.new_cache(1, len(ids)), 0.0
    for count in range(1, n + 1):
        subsets = list(itertools.combinations(range(len(context), len(ids)), count))
        for subset in subsets:
            tokens = np.array([[mask if i in subset else token for i, token in enumerate(ids)]])
            window = Window(
                tokens,
                np.arange(len(ids))[None],
                np.zeros(1, np.int64),
                np.array([len(ids)]),
                np.arange(len(ids))[None],
            )
            logits = (
                model.backend.prefix(cache, slice(0, 1), window, want_logits=True)
                .logits[0]
                .astype(np.float64)
            )
            found = sum(logits[i - shift, ids[i]] - math.log(np.exp(logits[i - shift]).sum()) for i in subset)
            total += found * n / count / len(subsets) / n
    return total


def test_the_estimate_is_around_what_enumeration_gives(golden_backend, golden_artifact):
    model, rng = Model(golden_artifact, golden_backend), np.random.default_rng(0)
    for length in (1, 2, 4):
        context, target = rng.integers(0, 900, 5).tolist(), rng.integers(0, 900, length).tolist()
        exact = _enumerated(model, context, target)
        found = likelihood.estimate(model, context, target, samples=400)
        assert abs(found.mean - exact) <= max(1e-4, 4 * found.standard_error), (length, found, exact)
        assert (found.standard_error == 0) == (length == 1) and found.forwards == (1 if length == 1 else 400)
        assert likelihood.estimate(model, context, target, samples=7, seed=3) == likelihood.estimate(
            model, context, target, samples=7, seed=3
        )


def test_samples_mask_every_number_of_tokens_evenly():
    for samples, length, first in itertools.product((8, 64, 128), (1, 3, 8), (1, 2)):
        counts = np.bincount(likelihood.stratified(samples, length, min(first, length)), minlength=length + 1)
        assert counts[0] == 0 and counts[1:].sum() == samples and counts[1:].max() - counts[1:].min() <= 2


def test_a_text_is_greedy_if_the_model_writes_it(model):
    context = model.encode(ORDER)
    written = model.generate(
        [ORDER],
        GenerationConfig(gen_length=12, block_length=12, cache="none", policy="fixed", stop_at_eos=False),
    )[0].tokens
    assert likelihood.is_greedy(model, context, written) and not likelihood.is_greedy(
        model, context, [*written[:-1], written[0]]
    )


@pytest.mark.parametrize(
    ("context", "target", "said"),
    [([], [5], "0 tokens of context"), ([5], [], "0 of target"), ([5] * 200, [5] * 200, "shorten them")],
)
def test_texts_that_have_no_likelihood(model, context, target, said):
    with pytest.raises(DllmError, match=said):
        likelihood.estimate(model, context, target)


def _asked(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


@pytest.fixture
def harness(model):
    return evaluation.Harness(model, GenerationConfig(), batch=2, samples=8, check_greedy=True)


def test_answers_are_those_of_generate_cut_at_stop_strings(harness, model):
    prompts = [
        harness.apply_chat_template([{"role": "user", "content": text}])
        for text in (ORDER, "find red keys in attic", ORDER)
    ]
    plain = [result.text for result in model.generate(prompts, raw=True)]
    assert harness.generate_until(_asked(*((prompt, {"until": []}) for prompt in prompts))) == plain
    assert harness.figures.answers == 3 and harness.figures.nfe > 3 and harness.figures.useful_tokens > 30
    cut = harness.generate_until(
        _asked(
            (prompts[0], {"until": ["nothing", '"in"']}),
            (prompts[1], {"until": '"find"', "max_gen_toks": 40}),
        )
    )
    shorter = model.generate([prompts[1]], GenerationConfig(gen_length=40), raw=True)[
        0
    ].text  # the task says how long
    assert cut == [plain[0].split('"in"')[0], shorter.split('"find"')[0]] and '"find"' in shorter
    with pytest.raises(DllmError, match="unknown generation option of the task 'num_beams'"):
        harness.generate_until(_asked((prompts[0], {"num_beams": 4})))


def test_prompts_that_are_too_long_lose_their_beginning_and_are_counted(harness):
    assert (
        len(harness._fitting([5] * 500, 96)) == harness.model.manifest.model.max_length - 96
        and harness.figures.truncated == 1
    )
    with pytest.raises(DllmError, match="smaller --gen-length"):
        harness._fitting([5], 9000)


def test_likelihoods_prefer_what_is_right(harness):
    prompt = harness.apply_chat_template([{"role": "user", "content": ORDER}])
    answers = [
        '[{"do": "clean", "in": "hall", "with": "mop"}]',
        '[{"do": "clean", "in": "attic", "with": "mop"}]',
    ]
    right, wrong = harness.loglikelihood(_asked(*((prompt, answer) for answer in answers)), disable_tqdm=True)
    assert right[0] > wrong[0] + 3 and not wrong[1]
    assert harness.figures.likelihoods == 2 and harness.figures.likelihood_forwards == 16
    (whole,) = harness.loglikelihood_rolling(_asked((ORDER,)))
    ids = harness.tok_encode(ORDER)
    assert whole == likelihood.estimate(harness.model, [harness.eot_token_id], ids, samples=8).mean


def test_the_command_with_offline_tasks(demo_artifact, tmp_path):
    command = [
        sys.executable,
        "-m",
        "trt_runtime.cli",
        "eval",
        str(demo_artifact),
        "--tasks",
        "demo_plan,demo_needle,demo_choice",
        "--include-path",
        str(TASKS),
        "--chat",
        "--limit",
        "8",
        "--mc-samples",
        "8",
        "--policy",
        "factor",
        "--output",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={"HF_HOME": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "out.json").read_text())
    scores = {
        task: next(
            value for key, value in found.items() if key in ("exact_match,none", "found,none", "acc,none")
        )
        for task, found in report["results"].items()
    }
    assert set(scores) == {"demo_plan", "demo_needle", "demo_choice"} and all(
        score >= 0.7 for score in scores.values()
    ), scores
    assert (
        report["decoding"]["config"]["policy"] == "factor"
        and report["decoding"]["config"]["gen_length"] == 96
        and report["decoding"]["chat_template"]
    )
    assert (
        report["figures"]["answers"] == 16
        and report["figures"]["nfe"] > 100
        and report["figures"]["tokens_per_forward"] > 1.5
    )
    assert (
        "demo_plan" in done.stdout and "tokens per forward" in done.stdout and "Traceback" not in done.stderr
    )


def test_wrong_use_is_one_line(demo_artifact, capsys):
    for wrong, said in (
        (["--tasks", ","], "--tasks is ','"),
        (["--tasks", "x", "--include-path", "nowhere"], "no such directory"),
        (["--tasks", "x", "--limit", "0"], "--limit is 0"),
        (["--tasks", "demo_plant", "--include-path", str(TASKS)], "did you mean 'demo_plan'"),
        (["--tasks", "x", "--threshold", "3"], "threshold is 3"),
    ):
        assert cli.main(["eval", str(demo_artifact), *wrong]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_standard_error_holds_nothing_of_lm_eval(demo_artifact, quiet):
    """Neither its bars nor advice on options that this command has not, where standard error is a pipe."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "trt_runtime.cli",
            "eval",
            str(demo_artifact),
            "--tasks",
            "demo_plan,demo_choice",
            "--include-path",
            str(TASKS),
            "--chat",
            "--limit",
            "1",
            "--mc-samples",
            "1",
            *quiet,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "exact_match" in done.stdout, done.stderr
    assert "it/s" not in done.stderr and "--metadata" not in done.stderr, done.stderr


class _Told:
    """A Progress that notes what it is told."""

    def __init__(self):
        self.counts = {}

    @contextmanager
    def task(self, what, total):
        self.counts[what] = [0, total]

        def advance(done):
            self.counts[what][0] += done

        yield SimpleNamespace(advance=advance)

    def each(self, items, what):
        with self.task(what, len(items)) as task:
            for item in items:
                yield item
                task.advance(1)


def test_progress_counts_answers_and_likelihoods(model):
    told = _Told()
    harness = evaluation.Harness(model, GenerationConfig(), batch=2, samples=1, check_greedy=False)
    harness.progress = told
    asked = [
        SimpleNamespace(args=(ORDER, options))
        for options in ({"until": []}, {"until": []}, {"until": []}, {"until": ["x"]})
    ]
    assert len(harness.generate_until(asked)) == 4
    harness._loglikelihood_tokens([(None, [5, 6], [7])] * 3)
    harness.loglikelihood_rolling([SimpleNamespace(args=(ORDER,))] * 2)
    assert told.counts == {"answers": [4, 4], "likelihoods": [3, 3], "likelihoods of whole texts": [2, 2]}
