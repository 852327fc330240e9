"""Data, filters and metrics of the offline twins of the tasks that docs/how-to/evaluate-and-tune.md runs: the
same shape, the demo model's language."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[3] / "tools"))

import demo_prompts
import demo_task
from datasets import Dataset


def _rows(count: int, skip: int) -> Dataset:
    found = demo_prompts.held_out(count + skip)[skip:]
    return Dataset.from_list(
        [{"order": e.prompt, "plan": json.dumps(e.plan), "answer": e.answer} for e in found]
    )


def plans(**options: Any) -> dict[str, Dataset]:
    return {"train": _rows(8, 40), "test": _rows(8, 0)}


def first_examples() -> list[dict[str, str]]:
    """As mbpp's list_fewshot_samples."""
    return list(_rows(3, 60))


def after_the_begun_answer(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """As humaneval's build_predictions_instruct: the prefix of the answer belongs to it."""
    return [['[{"' + answer.partition("```")[0] for answer in answers] for answers in resps]


def pass_at_k(references: list[str], predictions: list[list[str]], k: int | list[int]) -> dict[str, float]:
    """Whether the first k 'programs' of each hold one that does what it should. Runs what the model wrote,
    behind code_eval's own gate."""
    if os.getenv("HF_ALLOW_CODE_EVAL", "0") != "1":
        raise ValueError(
            '\n####\nThe "code_eval" metric executes untrusted model-generated code.\nset '
            'HF_ALLOW_CODE_EVAL="1"\n####'
        )
    ks = [k] if isinstance(k, int) else k
    right = [
        [_runs(written, plan) for written in answers]
        for plan, answers in zip(references, predictions, strict=True)
    ]
    return {f"pass@{n}": sum(any(row[:n]) for row in right) / len(right) for n in ks}


def texts(references: list[str], predictions: list[list[str]]) -> float:
    """How many different answers there are to a question."""
    return float(len(set(predictions[0])))


def longest(references: list[str], predictions: list[list[str]]) -> int:
    return max(map(len, predictions[0]))


def _runs(written: str, plan: str) -> bool:
    try:
        exec(f"made = {written}\nassert isinstance(made, list)", {})
    except Exception:
        return False
    return demo_task.is_right(written, json.loads(plan))


def is_equal(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """As minerva_math: needs the packages of lm_eval's math extra."""
    from math_verify import parse, verify
    from sympy.parsing.latex import parse_latex

    return {
        "math_verify": float(verify(parse(r"\frac{2}{4}"), parse("0.5")))
        * float(parse_latex("1+1") == 2 or True),
        "exact_match": float(demo_task.is_right(results[0], json.loads(doc["plan"]))),
    }
