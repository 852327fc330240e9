"""An artifact behind lm-evaluation-harness: accuracy on its tasks, with what the decoding cost beside it. Needs the `eval` extra."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trt_runtime import likelihood
from trt_runtime.bench import machine
from trt_runtime.config import GenerationConfig
from trt_runtime.errors import DllmError, unknown
from trt_runtime.model import Model
from trt_runtime.tokenizer import Tokenizer

_HONOURED = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


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
    largest_standard_error: float = 0.0

    def as_dict(self) -> dict[str, float]:
        per = {"tokens_per_forward": self.useful_tokens / max(1, self.nfe), "tokens_per_second": self.useful_tokens / max(1e-9, self.seconds),
               "nfe_an_answer": self.nfe / max(1, self.answers)}  # fmt: skip
        return asdict(self) | ({name: round(value, 3) for name, value in per.items()} if self.answers else {})


class Harness(TemplateLM):  # type: ignore[misc]
    """lm-evaluation-harness' view of a model. `config` is how answers are generated; likelihoods are estimated from `samples` forwards each."""

    def __init__(self, model: Model, config: GenerationConfig, *, batch: int, samples: int, check_greedy: bool) -> None:
        super().__init__()
        if model.tokenizer is None:
            raise DllmError(f"{model.path}: has no tokenizer: tasks are texts.")
        self.model, self.config, self.batch, self.samples, self.check_greedy = model, config, batch, samples, check_greedy
        self._words: Tokenizer = model.tokenizer
        self.figures = Figures()

    @property
    def eot_token_id(self) -> int:
        return self.model.manifest.decoding.eos_token_ids[0]

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.path.name)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """A name for lm-eval's fingerprint of a run; the template is the artifact's."""
        return "the artifact's" if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            raise DllmError(
                "the task begins the answer itself (gen_prefix), which chat templates of artifacts do not do: run it without a chat template."
            )
        return self._words.render_chat(chat_history)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._words.encode(string)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut at the first stop string. Options of a task that are not honoured are refused by name."""
        answers: list[str] = []
        for start in range(0, len(requests), self.batch):
            answers += self._answers([request.args for request in requests[start : start + self.batch]])
        return answers

    def _answers(self, asked: list[tuple[str, dict[str, Any]]]) -> list[str]:
        options = asked[0][1]
        if any(given != options for _, given in asked):  # a batch decodes in one way
            return [text for one in asked for text in self._answers([one])]
        config = self._config_of(options)
        assert config.gen_length is not None
        prompts = [self._fitting(self.tok_encode(context), config.gen_length) for context, _ in asked]
        begin = time.perf_counter()
        results = self.model.generate(prompts, config)
        self.figures.seconds += time.perf_counter() - begin
        self.figures.answers += len(results)
        self.figures.nfe += sum(result.nfe for result in results)
        self.figures.useful_tokens += sum(result.num_useful for result in results)
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else until
        return [_cut(result.text or "", stops) for result in results]

    def _config_of(self, options: dict[str, Any]) -> GenerationConfig:
        if strange := sorted(set(options) - _HONOURED):
            raise unknown(
                "generation option of the task", strange[0], _HONOURED, "Leave it out (--gen-kwargs), or take another task."
            )
        config, given = self.config, {}
        if options.get("do_sample") and options.get("temperature"):
            given = {name: options[name] for name in ("temperature", "top_p", "top_k") if options.get(name) is not None}
        if config.gen_length is None and options.get("max_gen_toks"):
            given["gen_length"] = min(int(options["max_gen_toks"]), self.model.manifest.model.max_length - 1)
        return replace(config, **given).resolved(self.model.manifest)

    def _fitting(self, ids: list[int], gen_length: int) -> list[int]:
        """The end of a prompt that is too long, which is counted."""
        room = self.model.manifest.model.max_length - gen_length
        if room < 1:
            raise DllmError(
                f"gen_length is {gen_length}, the model takes {room + gen_length} tokens with the prompt: give a smaller --gen-length."
            )
        self.figures.truncated += len(ids) > room
        return ids[-room:]

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any) -> list[tuple[float, bool]]:
        return [self._likelihood(context, target) for _, context, target in requests]

    def _likelihood(self, context: list[int], target: list[int]) -> tuple[float, bool]:
        context = self._fitting(context, len(target))
        found = likelihood.estimate(self.model, context, target, samples=self.samples)
        self.figures.likelihoods += 1
        self.figures.likelihood_forwards += found.forwards
        self.figures.largest_standard_error = max(self.figures.largest_standard_error, found.standard_error)
        return found.mean, self.check_greedy and likelihood.is_greedy(self.model, context, target)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's length that do not overlap."""
        longest, totals = self.model.manifest.model.max_length - 1, []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, longest, 1)
            totals.append(sum(self._likelihood(*make_disjoint_window(window))[0] for window in windows))
        return totals


def _cut(text: str, stops: list[str]) -> str:
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


@dataclass(frozen=True)
class Settings:
    """What is asked of lm-eval. Tasks are found in the directories `include`, and with `defaults` among its own, whose data come from a hub."""

    include: tuple[Path, ...] = ()
    defaults: bool = True
    few_shot: int | None = None
    limit: int | None = None
    chat: bool = False
    gen_kwargs: str | None = None
    run_unsafe_code: bool = False


def run(harness: Harness, tasks: list[str], settings: Settings) -> dict[str, Any]:
    """Evaluate: lm-eval's results, how they were decoded, what that took. Raises DllmError for a task that is not there."""
    manager = TaskManager(include_path=[str(path) for path in settings.include] or None, include_defaults=settings.defaults)
    for name in tasks:
        if name not in manager.all_tasks:
            raise unknown(
                "task", name, manager.all_tasks if len(manager.all_tasks) < 40 else ["gsm8k", "minerva_math", "humaneval", "mbpp"]
            )
    made = evaluator.simple_evaluate(
        harness, tasks=tasks, num_fewshot=settings.few_shot, limit=settings.limit, apply_chat_template=settings.chat, gen_kwargs=settings.gen_kwargs,
        task_manager=manager, bootstrap_iters=1000, log_samples=False, confirm_run_unsafe_code=settings.run_unsafe_code,
    )  # fmt: skip
    decoding = {"config": asdict(harness.config.resolved(harness.model.manifest)), "likelihood_samples": harness.samples,
                "check_greedy": harness.check_greedy, "chat_template": settings.chat, "few_shot": settings.few_shot, "limit": settings.limit,
                "batch": harness.batch, "gen_kwargs": settings.gen_kwargs}  # fmt: skip
    keep = ("results", "versions", "n-shot", "higher_is_better", "n-samples")
    return {"artifact": harness.model.path.name, "backend": harness.model.backend.name, **{key: made[key] for key in keep if key in made},
            "decoding": decoding, "figures": harness.figures.as_dict(), "machine": machine(), "lm_eval": metadata.version("lm_eval")}  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """Metrics of each task, and what they took."""
    lines = []
    for task, found in report["results"].items():
        for key, value in found.items():
            name, _, kind = key.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = found.get(f"{name}_stderr,{kind}")
                lines.append(f"{task:24} {name:20} {value:8.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""))
    took = report["figures"]
    if took["answers"]:
        lines.append(f"{took['answers']} answers: {took['nfe_an_answer']:.1f} forwards each, {took['tokens_per_forward']:.2f} tokens a forward, "
                     f"{took['tokens_per_second']:.0f} tokens/s; {took['truncated']} prompts cut at the left")  # fmt: skip
    if took["likelihoods"]:
        lines.append(
            f"{took['likelihoods']} likelihoods: {took['likelihood_forwards']} forwards, standard error of the estimates up to {took['largest_standard_error']:.3f}"
        )
    return "\n".join(lines)
