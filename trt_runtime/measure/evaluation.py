"""Evaluate an artifact with lm-evaluation-harness: accuracy on its tasks, and the cost of decoding. Needs the
`eval` extra."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string

from trt_runtime.errors import DllmError, unknown
from trt_runtime.measure.bench import machine
from trt_runtime.measure.evaluation_errors import in_one_line, unsafe
from trt_runtime.measure.harness import Harness


@dataclass(frozen=True)
class Settings:
    """The settings for lm-eval. include: directories of tasks; defaults: load lm-eval's own tasks too, whose
    data come from a hub."""

    include: tuple[Path, ...] = ()
    defaults: bool = True
    few_shot: int | None = None
    limit: int | None = None
    chat: bool = False
    gen_kwargs: str | None = None
    run_unsafe_code: bool = False


def run(harness: Harness, tasks: list[str], settings: Settings) -> dict[str, Any]:
    """Evaluate, and return lm-eval's results, the decoding options and the cost.

    Raises DllmError for an unknown task, and for anything that lm-eval, its data or the task's own code
    raise.
    """
    with in_one_line(run_unsafe_code=settings.run_unsafe_code):
        manager = _tasks_of(tasks, settings)
        for name in tasks:
            _check_task(manager, name, settings)
        evaluated = evaluator.simple_evaluate(
            harness,
            tasks=tasks,
            num_fewshot=settings.few_shot,
            limit=settings.limit,
            apply_chat_template=settings.chat,
            gen_kwargs=_options_of(settings.gen_kwargs),
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
            confirm_run_unsafe_code=settings.run_unsafe_code,
        )
    decoding = {
        "config": asdict(harness.config.resolved(harness.model.manifest)),
        "likelihood_samples": harness.samples,
        "check_greedy": harness.check_greedy,
        "chat_template": settings.chat,
        "few_shot": settings.few_shot,
        "limit": settings.limit,
        "batch": harness.batch,
        "gen_kwargs": settings.gen_kwargs,
        "max_length": harness.max_length,
        "window": harness.window,
        "add_bos": harness.add_bos,
        "escape_until": harness.escape_until,
    }
    keep = ("results", "versions", "n-shot", "higher_is_better", "n-samples")
    results = {key: evaluated[key] for key in keep if key in evaluated}
    return {
        "artifact": harness.model.path.name,
        "backend": harness.model.backend.name,
        **json.loads(json.dumps(results, default=_plain)),
        "decoding": decoding,
        "figures": harness.figures.as_dict(),
        "machine": machine(),
        "lm_eval": metadata.version("lm_eval"),
    }


def _tasks_of(tasks: list[str], settings: Settings) -> TaskManager:
    """lm-eval's index of tasks. Its own 14,000 files take ten seconds to read; they are left out if every
    task is a single one of the user's directories."""
    include = [str(path) for path in settings.include]
    if include:
        own = TaskManager(include_path=include, include_defaults=False)
        if not settings.defaults or set(tasks) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=include or None, include_defaults=settings.defaults)


def _check_task(manager: TaskManager, name: str, settings: Settings) -> None:
    """Raise DllmError for a task that does not exist or is not allowed. lm-eval skips files that it cannot
    read: if one of them names the task, the error says why it cannot be read."""
    if name in manager.all_tasks:  # before its data are downloaded; lm-eval itself checks the tasks of groups
        if (manager.task_index[name].cfg or {}).get("unsafe_code") and not settings.run_unsafe_code:
            raise unsafe()
        return
    for file in sorted(file for folder in settings.include for file in folder.glob("**/*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        if re.search(rf"^\s*(task|group|tag)\s*:.*\b{re.escape(name)}\b", text, re.MULTILINE):
            try:
                manager.load([str(file)])
            except Exception as error:  # PyYAML's, and those of its tags
                said = " ".join(str(error).split())
                raise DllmError(
                    f"{file}: lm-eval cannot read it ({type(error).__name__}: {said}): fix the file."
                ) from error
    raise unknown(
        "task",
        name,
        manager.all_tasks if len(manager.all_tasks) < 40 else ["gsm8k", "minerva_math", "humaneval", "mbpp"],
    )


def _options_of(text: str | None) -> dict[str, Any] | None:
    """The generation options of --gen-kwargs. Raises DllmError."""
    if wrong := [part for part in (text or "").split(",") if part.strip() and not part.partition("=")[2]]:
        raise DllmError(f"--gen-kwargs contains {wrong[0]!r}, expected the form A=1,B=2.")
    return simple_parse_args_string(text) or None


def _plain(value: Any) -> Any:
    """A result as a JSON value: tasks return NumPy numbers, and functions as settings."""
    return value.item() if isinstance(value, np.generic) else str(value)


def table(report: dict[str, Any]) -> str:
    """The metrics of each task and their cost, as a table."""
    lines = []
    for task, metrics in report["results"].items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if isinstance(value, (int, float)) and kind and not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr,{kind}")
                label = name if kind == "none" else f"{name} ({kind})"  # of several filters, which one
                lines.append(
                    f"{task:24} {label:20} {value:8.4f}"
                    + (f" ± {error:.4f}" if isinstance(error, float) else "")
                )
    took = report["figures"]
    if took["answers"]:
        lines.append(
            f"{took['answers']} answers: {took['nfe_an_answer']:.1f} forwards each, "
            f"{took['tokens_per_forward']:.2f} tokens per forward, "
            f"{took['tokens_per_second']:.0f} tokens/s; {took['truncated']} prompts cut at the left"
        )
    if took["likelihoods"]:
        lines.append(
            f"{took['likelihoods']} likelihoods: {took['likelihood_forwards']} forwards, standard error of "
            f"the estimates up to {took['largest_standard_error']:.3f}"
        )
    if took["windows"]:
        lines.append(
            f"{took['windows']} windows of up to {report['decoding']['window']} tokens (--max-length)"
        )
    return "\n".join(lines)
