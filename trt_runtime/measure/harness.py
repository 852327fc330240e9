"""The interface of a model to lm-evaluation-harness: answers and likelihoods, and their cost. Needs the
`eval` extra."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trt_runtime.artifact.tokenizer import Tokenizer
from trt_runtime.decoding.blocks import usable_length
from trt_runtime.decoding.config import GenerationConfig, effective_temperature
from trt_runtime.errors import DllmError, unknown
from trt_runtime.measure import likelihood
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
MOST_WINDOW = 4096  # default most tokens per window of a rolling likelihood: some models claim 131,072


@dataclass
class Figures:
    """The cost of a run's answers and likelihoods."""

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
    """lm-evaluation-harness' view of a model. config: how answers are generated; samples: forwards per
    estimate of a likelihood.

    max_length: most tokens of a prompt with its answer (None: the model's), and of a window of a rolling
    likelihood (None: at most MOST_WINDOW).
    add_bos: whether texts get a BOS token: 'auto' (as the tokenizer does, and never before a rendered chat
    template), 'yes' or 'no'.
    escape_until: ignore the tasks' stop strings and keep answers whole.
    """

    progress: Progress = SILENT  # advanced with every answer and likelihood

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
            raise DllmError(
                f"{model.path}: has no tokenizer, which tasks need: export the checkpoint with its tokenizer."
            )
        self.model, self.config, self.batch, self.samples, self.check_greedy = (
            model,
            config,
            batch,
            samples,
            check_greedy,
        )
        self.add_bos, self.escape_until = add_bos, escape_until
        self._words: Tokenizer = model.tokenizer
        self._has_rendered = False  # chat templates write the BOS token themselves
        self.figures = Figures()
        most = model.manifest.model.max_length
        if max_length is not None and not 2 <= max_length <= most:
            raise DllmError(f"max_length is {max_length}, expected 2 to {most}, the model's maximum.")
        self.max_length, self.window = max_length or most, max_length or min(most, MOST_WINDOW)
        if add_bos not in ADD_BOS:
            raise unknown("add_bos", add_bos, ADD_BOS)
        if add_bos == "yes" and self._words.special_id("bos_token") is None:
            raise DllmError("add_bos is yes, but the tokenizer has no BOS token (bos_token): remove it.")

    @property
    def eot_token_id(self) -> int:
        return self.model.manifest.decoding.eos_token_ids[0]

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.path.name)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """A name for lm-eval's fingerprint of a run; the template itself is the artifact's."""
        return "the artifact's" if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The rendered conversation up to the start of the answer; if the task writes the start of the answer
        itself (gen_prefix, the last message), up to the end of that."""
        if not self._words.has_chat_template:
            raise DllmError(f"{self.model.path}: has no chat template: remove --chat.")
        self._has_rendered = True
        return self._words.render_chat(chat_history, continue_final_message=not add_generation_prompt)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
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
        """Answers, cut at the first stop string. Raises DllmError for a task's option that is not supported.

        The random draws of a request depend on the seed, on its text and on how often that text was asked
        before, but not on its batch.
        """
        answers: list[str] = []
        repeats: Counter[str] = Counter()
        with self.progress.task("answers", len(requests)) as task:
            for _, same in itertools.groupby(
                (request.args for request in requests), key=lambda args: args[1]
            ):
                asked = list(same)  # a batch decodes with one configuration
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
        """The sampling options of a task, where the command line gives none. do_sample without a temperature
        means temperature 1."""
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
        """A prompt, cut on the left (after its BOS token) if it leaves no room for `length` more tokens; cuts
        are counted."""
        facts = self.model.manifest.decoding
        longest = usable_length(facts, self.config.block_length, self.max_length)
        room = longest - length
        if room < 1:
            raise DllmError(
                f"the answer needs {length} tokens, but prompt and answer together may have at most "
                f"{longest}: {advice}."
            )
        if len(ids) <= room:
            return ids
        self.figures.truncated += 1
        keeps = self._adds_bos and ids[0] == self.prefix_token_id and room > 1
        return [ids[0], *ids[1 - room :]] if keeps else ids[-room:]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-likelihoods of answers after their contexts, with `progress` instead of lm-eval's bar."""
        likelihoods: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return likelihoods

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for _, asked, target in self.progress.each(requests, "likelihoods"):
            context = self._fitting(
                asked, len(target), "use a task with shorter answers, or a larger --max-length"
            )
            likely = self._likelihood(context, target)
            results.append((likely, self.check_greedy and likelihood.is_greedy(self.model, context, target)))
        return results

    def _likelihood(self, context: list[int], target: list[int]) -> float:
        estimate = likelihood.estimate(self.model, context, target, samples=self.samples)
        self.figures.likelihoods += 1
        self.figures.likelihood_forwards += estimate.forwards
        largest = max(self.figures.largest_standard_error, estimate.standard_error)
        self.figures.largest_standard_error = largest
        return estimate.mean

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihoods of whole texts, in disjoint windows of `window` tokens."""
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
    """The seed of a request's draws, independent of the other requests."""
    key = json.dumps([seed, repeat, context]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big")


def _cut(text: str, stops: list[str]) -> str:
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]
