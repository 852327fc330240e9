"""An artifact behind lm-evaluation-harness: accuracy on its tasks, with what the decoding cost beside it.
Needs the `eval` extra."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from trt_runtime.artifact.tokenizer import Tokenizer
from trt_runtime.decoding.config import GenerationConfig, effective_temperature
from trt_runtime.errors import DllmError, unknown
from trt_runtime.measure import likelihood
from trt_runtime.measure.bench import machine
from trt_runtime.measure.evaluation_errors import in_one_line, unsafe
from trt_runtime.model import Model
from trt_runtime.system.progress import SILENT, Progress

_LENGTHS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # one option, in lm-eval's order
_HONOURED = {"until", "do_sample", "temperature", "top_p", "top_k", *_LENGTHS}
ADD_BOS = ("auto", "yes", "no")
MOST_WINDOW = (
    4096  # tokens of a rolling likelihood's window, where the user says nothing: some models claim 131,072
)


@dataclass
class Figures:
    """What the answers and likelihoods of a run took."""

    answers: int = 0
    nfe: int = 0
    useful_tokens: int = 0
    seconds: float = 0.0
    truncated: int = 0
    likelihoods: int = 0
    likelihood_forwards: int = 0
    windows: int = 0
    largest_standard_error: float = 0.0

    def as_dict(self) -> dict[str, float]:
        per = {
            "tokens_per_forward": self.useful_tokens / max(1, self.nfe),
            "tokens_per_second": self.useful_tokens / max(1e-9, self.seconds),
            "nfe_an_answer": self.nfe / max(1, self.answers),
        }
        return asdict(self) | ({name: round(value, 3) for name, value in per.items()} if self.answers else {})


class Harness(TemplateLM):  # type: ignore[misc]
    """lm-evaluation-harness' view of a model. `config` is how answers are generated; likelihoods are
    estimated from `samples` forwards each.

    max_length: tokens of a prompt with its answer (None: the model's), and of a rolling likelihood's window
    (None: at most MOST_WINDOW).
    add_bos: whether texts get a BOS token: 'auto' (as the tokenizer says, and never before what a chat
    template wrote), 'yes' or 'no'.
    escape_until: leave answers whole, whatever stop strings a task has.
    """

    progress: Progress = SILENT  # told of every answer and likelihood

    def __init__(
        self,
        model: Model,
        config: GenerationConfig,
        *,
        batch: int,
        samples: int,
        check_greedy: bool,
        max_length: int | None = None,
        add_bos: str = "auto",
        escape_until: bool = False,
    ) -> None:
        super().__init__()
        if model.tokenizer is None:
            raise DllmError(f"{model.path}: has no tokenizer: tasks are texts.")
        self.model, self.config, self.batch, self.samples, self.check_greedy = (
            model,
            config,
            batch,
            samples,
            check_greedy,
        )
        self.add_bos, self.escape_until = add_bos, escape_until
        self._words: Tokenizer = model.tokenizer
        self._has_rendered = False  # chat templates write the begin of a text themselves
        self.figures = Figures()
        most = model.manifest.model.max_length
        if max_length is not None and not 2 <= max_length <= most:
            raise DllmError(
                f"max_length is {max_length}, expected 2 to {most}, which is what the model takes."
            )
        self.max_length, self.window = max_length or most, max_length or min(most, MOST_WINDOW)
        if add_bos not in ADD_BOS:
            raise unknown("add_bos", add_bos, ADD_BOS)
        if add_bos == "yes" and self._words.special_id("bos_token") is None:
            raise DllmError("add_bos is yes, but the tokenizer has no BOS token (bos_token): leave it out.")

    @property
    def eot_token_id(self) -> int:
        return self.model.manifest.decoding.eos_token_ids[0]

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.path.name)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """A name for lm-eval's fingerprint of a run; the template is the artifact's."""
        return "the artifact's" if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The rendered conversation, up to where the answer begins; or, where the task begins the answer
        itself (gen_prefix, then the last message), right behind that beginning."""
        if not self._words.has_chat_template:
            raise DllmError(f"{self.model.path}: has no chat template: leave --chat out.")
        self._has_rendered = True
        return self._words.render_chat(chat_history, continue_final_message=not add_generation_prompt)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self._words.special_id("bos_token")
        return bos if bos is not None and self._adds_bos else self.eot_token_id

    @property
    def _adds_bos(self) -> bool:
        return self.add_bos == "yes" or (
            self.add_bos == "auto" and self._words.adds_bos and not self._has_rendered
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._words.encode(
            string, add_bos=self._adds_bos if add_special_tokens is None else add_special_tokens
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut at the first stop string. Options of a task that are not honoured are refused by name.

        What is drawn for a request depends on the seed, on its text and on how often that text was asked
        before: not on the batch.
        """
        answers: list[str] = []
        repeats: Counter[str] = Counter()
        with self.progress.task("answers", len(requests)) as task:
            for _, same in itertools.groupby(
                (request.args for request in requests), key=lambda args: args[1]
            ):
                asked = list(same)  # a batch decodes in one way
                for start in range(0, len(asked), self.batch):
                    part = asked[start : start + self.batch]
                    contexts, seeds = [context for context, _ in part], []
                    for context in contexts:
                        seeds.append(_seed(self.config.seed, context, repeats[context]))
                        repeats[context] += 1
                    answers += self._answers(contexts, seeds, part[0][1])
                    task.advance(len(part))
        return answers

    def _answers(self, contexts: list[str], seeds: list[int], options: dict[str, Any]) -> list[str]:
        config = self._config_of(options)
        assert config.gen_length is not None
        prompts = [self._fitting(self.tok_encode(context), config.gen_length) for context in contexts]
        begin = time.perf_counter()
        results = self.model.generate(prompts, config, seeds=seeds)
        self.figures.seconds += time.perf_counter() - begin
        self.figures.answers += len(results)
        self.figures.nfe += sum(result.nfe for result in results)
        self.figures.useful_tokens += sum(result.num_useful for result in results)
        until = [] if self.escape_until else options.get("until") or []
        stops = [str(stop) for stop in (until if isinstance(until, (list, tuple)) else [until])]
        return [_cut(result.text or "", stops) for result in results]

    def _config_of(self, options: dict[str, Any]) -> GenerationConfig:
        if strange := sorted(set(options) - _HONOURED):
            raise unknown(
                "generation option of the task",
                strange[0],
                _HONOURED,
                "Leave it out (--gen-kwargs), or take another task.",
            )
        config, given = self.config, self._drawing(options)
        name, length = next(((name, options[name]) for name in _LENGTHS if options.get(name)), ("", None))
        if config.gen_length is None and length is not None:
            if (
                isinstance(length, bool)
                or not isinstance(length, (int, float))
                or not float(length).is_integer()
            ):
                raise DllmError(
                    f"{name} of the task is {length!r}, expected a whole number from 1 (--gen-kwargs "
                    f"overrides it)."
                )
            given["gen_length"] = min(int(length), max(1, self.max_length // 2))  # the prompt needs room too
        try:
            return replace(config, **given).resolved(self.model.manifest)
        except DllmError as error:
            told = ", ".join(f"{name} {value}" for name, value in given.items())
            raise DllmError(
                f"{error} The task asks for {told} (--gen-kwargs overrides it)." if given else str(error)
            ) from error

    def _drawing(self, options: dict[str, Any]) -> dict[str, Any]:
        """What a task says of drawing, where the command line says nothing. do_sample without a temperature
        is temperature 1."""
        temperature, given = options.get("temperature"), {}
        if isinstance(temperature, (int, float)):
            temperature = effective_temperature(temperature)
        does = bool(temperature) if options.get("do_sample") is None else options["do_sample"]
        if does and not self.config.temperature:
            given["temperature"] = 1.0 if temperature is None else temperature
        if does and (self.config.temperature or given["temperature"]):
            for name, neutral in (("top_p", 1.0), ("top_k", None)):
                if options.get(name) is not None and getattr(self.config, name) == neutral:
                    given[name] = options[name]
        return given

    def _fitting(self, ids: list[int], length: int, advice: str = "give a smaller --gen-length") -> list[int]:
        """The end of a prompt that leaves no room for `length` more tokens, behind its BOS token; it is
        counted."""
        room = self.max_length - length
        if room < 1:
            raise DllmError(
                f"{length} tokens are to follow a prompt, with which there may be {self.max_length}: "
                f"{advice}."
            )
        if len(ids) <= room:
            return ids
        self.figures.truncated += 1
        keeps = self._adds_bos and ids[0] == self.prefix_token_id and room > 1
        return [ids[0], *ids[1 - room :]] if keeps else ids[-room:]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of answers behind their contexts; `progress` shows how far it is, not lm-eval's bar."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for _, asked, target in self.progress.each(requests, "likelihoods"):
            context = self._fitting(
                asked, len(target), "take a task with shorter answers, or a larger --max-length"
            )
            likely = self._likelihood(context, target)
            found.append((likely, self.check_greedy and likelihood.is_greedy(self.model, context, target)))
        return found

    def _likelihood(self, context: list[int], target: list[int]) -> float:
        found = likelihood.estimate(self.model, context, target, samples=self.samples)
        self.figures.likelihoods += 1
        self.figures.likelihood_forwards += found.forwards
        self.figures.largest_standard_error = max(self.figures.largest_standard_error, found.standard_error)
        return found.mean

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of `window` tokens that do not overlap."""
        totals = []
        for (text,) in self.progress.each(
            [request.args for request in requests], "likelihoods of whole texts"
        ):
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = list(get_rolling_token_windows(ids, self.prefix_token_id, self.window - 1, 1))
            self.figures.windows += len(windows)
            totals.append(sum(self._likelihood(*make_disjoint_window(window)) for window in windows))
        return totals


def _seed(seed: int, context: str, repeat: int) -> int:
    """Of what is drawn for a request: its own, whatever else is asked beside it."""
    key = json.dumps([seed, repeat, context]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big")


def _cut(text: str, stops: list[str]) -> str:
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


@dataclass(frozen=True)
class Settings:
    """What is asked of lm-eval. Tasks are found in the directories `include`, and with `defaults` among its
    own, whose data come from a hub."""

    include: tuple[Path, ...] = ()
    defaults: bool = True
    few_shot: int | None = None
    limit: int | None = None
    chat: bool = False
    gen_kwargs: str | None = None
    run_unsafe_code: bool = False


def run(harness: Harness, tasks: list[str], settings: Settings) -> dict[str, Any]:
    """Evaluate: lm-eval's results, how they were decoded, what that took.

    Raises DllmError for a task that is not there, and for whatever lm-eval, its data and the task's own code
    raise.
    """
    with in_one_line(run_unsafe_code=settings.run_unsafe_code):
        manager = TaskManager(
            include_path=[str(path) for path in settings.include] or None, include_defaults=settings.defaults
        )
        for name in tasks:
            _check_task(manager, name, settings)
        made = evaluator.simple_evaluate(
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
    found = json.loads(json.dumps({key: made[key] for key in keep if key in made}, default=_plain))
    return {
        "artifact": harness.model.path.name,
        "backend": harness.model.backend.name,
        **found,
        "decoding": decoding,
        "figures": harness.figures.as_dict(),
        "machine": machine(),
        "lm_eval": metadata.version("lm_eval"),
    }


def _check_task(manager: TaskManager, name: str, settings: Settings) -> None:
    """Raise for a task that is not there, or not allowed. lm-eval leaves out files that it cannot read: the
    one that names the task then says why."""
    if name in manager.all_tasks:  # before its data are downloaded; those of groups are found out by lm-eval
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
                    f"{file}: lm-eval cannot read it ({type(error).__name__}: {said}): mend the file."
                ) from error
    raise unknown(
        "task",
        name,
        manager.all_tasks if len(manager.all_tasks) < 40 else ["gsm8k", "minerva_math", "humaneval", "mbpp"],
    )


def _options_of(text: str | None) -> dict[str, Any] | None:
    """Generation options as --gen-kwargs has them. Raises DllmError."""
    if wrong := [part for part in (text or "").split(",") if part.strip() and not part.partition("=")[2]]:
        raise DllmError(f"--gen-kwargs has {wrong[0]!r}, expected A=1,B=2.")
    return simple_parse_args_string(text) or None


def _plain(value: Any) -> Any:
    """A result as JSON has it: tasks return numbers of NumPy, and functions as settings."""
    return value.item() if isinstance(value, np.generic) else str(value)


def table(report: dict[str, Any]) -> str:
    """Metrics of each task, and what they took."""
    lines = []
    for task, found in report["results"].items():
        for key, value in found.items():
            name, _, kind = key.partition(",")
            if isinstance(value, (int, float)) and kind and not name.endswith("_stderr"):
                error = found.get(f"{name}_stderr,{kind}")
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
