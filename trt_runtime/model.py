"""The public Python API: an artifact opened on a backend, `generate` and `stream` over it.

import trt_runtime as rt
with rt.load("artifacts/llada-demo") as model:
    for result in model.generate(["take red cups from kitchen to garage, then hand blue pens to Mia, and clean
        hall with mop"]): print(result.text, result.nfe, result.tokens_per_forward)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Rows
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from trt_runtime.artifact.manifest import Manifest
from trt_runtime.artifact.tokenizer import Tokenizer
from trt_runtime.backends import open_backend
from trt_runtime.decoding.backend import Backend
from trt_runtime.decoding.cache_plan import PREFILL, PREFIX_PASS
from trt_runtime.decoding.config import GenerationConfig, configured
from trt_runtime.decoding.generator import Generator
from trt_runtime.decoding.rules import check_prompt, rules_of
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.decoding.speculation import Speculating
from trt_runtime.errors import DllmError
from trt_runtime.result import Result, Update

# Result and Update are imported from here by code written for 0.1
__all__ = ["Model", "Prompt", "Result", "Update", "load"]
Prompt = str | Rows[int] | Rows[Mapping[str, str]]


class Model:
    """An artifact opened on a backend. Make one with `load`; close it, or use it as a context manager.

    After `close`, `path`, `manifest` and `tokenizer` can still be read; everything else raises DllmError.
    """

    def __init__(self, path: Path, backend: Backend) -> None:
        self.path = path
        self._backend: Backend | None = backend
        self.manifest: Manifest = backend.manifest
        self.tokenizer = Tokenizer(path / self.manifest.tokenizer) if self.manifest.tokenizer else None

    def __enter__(self) -> Model:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        facts = self.manifest.model
        on = "closed" if self._backend is None else f"on {self._backend.name}"
        return (
            f"Model({str(self.path)!r}, {facts.family}, {facts.parameters / 1e6:,.1f} M parameters, "
            f"{facts.dtype}, {on})"
        )

    @property
    def backend(self) -> Backend:
        """What runs the graphs. Raises DllmError once the model is closed."""
        return self._check_open()

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self._backend = backend

    def generate(
        self,
        prompts: Rows[Prompt],
        config: GenerationConfig | None = None,
        *,
        raw: bool = False,
        seeds: Rows[int] | None = None,
    ) -> list[Result]:
        """Complete several prompts at once; the results are in their order.

        A prompt is a text (put into the chat template, if there is one and not `raw`), a list of messages
        {'role', 'content'}, or a list of token ids. `seeds`: of each prompt's draws (default: config.seed and
        the numbers after it). Without a config, the options that were tuned for the artifact, else the
        defaults. Raises DllmError for a prompt or an option that cannot be used.
        """
        config = config or configured({}, self.manifest)
        rows = self._sequences(prompts, config, raw, seeds)
        begin = time.perf_counter()
        finished: dict[int, float] = {}
        generator = self._generator(rows, config)
        while not generator.is_finished:
            for wanted in generator.step():
                if wanted.sequence.is_finished:
                    finished[wanted.slot] = time.perf_counter() - begin
        return [self._result(row, finished.get(i, 0.0)) for i, row in enumerate(rows)]

    def stream(
        self, prompts: Rows[Prompt], config: GenerationConfig | None = None, *, raw: bool = False
    ) -> Iterator[Update]:
        """Like `generate`, but yields an update for each row after each forward, or after the backend's
        `steps_per_sync`. Nothing runs before the first update is requested. Raises DllmError if the model is
        closed in between."""
        self._check_open()
        return self._streamed(prompts, config, raw)

    def _streamed(
        self, prompts: Rows[Prompt], config: GenerationConfig | None, raw: bool
    ) -> Iterator[Update]:
        config = config or configured({}, self.manifest)
        rows = self._sequences(prompts, config, raw)
        generator = self._generator(rows, config)
        while not generator.is_finished:
            self._check_open()
            before = [(row.block, len(row.trace)) for row in rows]
            for wanted in generator.step():
                block, since = before[wanted.slot]
                assert block is not None
                yield self.update_of(wanted.sequence, block, since, wanted.slot)

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt, in any form that `generate` accepts."""
        self._check_open()
        if not isinstance(prompt, str):
            return self._encode_list(prompt)
        tokenizer = self._need_tokenizer()
        if not prompt.strip():
            raise DllmError("the prompt is empty: give some text.")
        if tokenizer.has_chat_template and not raw:
            return tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": prompt}]))
        return tokenizer.encode(prompt, add_bos=tokenizer.adds_bos)

    def _encode_list(self, prompt: Rows[int] | Rows[Mapping[str, str]]) -> list[int]:
        if not isinstance(prompt, (list, tuple, np.ndarray)):
            raise DllmError(
                f"a prompt is {prompt!r}, expected a text, a list of token ids, or a list of messages."
            )
        items: list[Any] = list(prompt)
        if items and all(isinstance(item, Mapping) for item in items):
            tokenizer = self._need_tokenizer()
            return tokenizer.encode(tokenizer.render_chat(items))
        if wrong := [
            item for item in items if not isinstance(item, (int, np.integer)) or isinstance(item, bool)
        ]:
            raise DllmError(
                f"a prompt contains {wrong[0]!r}, expected a text, token ids, or {{'role', 'content'}} dicts."
            )
        return [int(item) for item in items]

    def close(self) -> None:
        """Free the model. Closing it twice does no harm."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def _check_open(self) -> Backend:
        if self._backend is None:
            raise DllmError(f"{self.path}: the model was closed: open it again with trt_runtime.load.")
        return self._backend

    def _need_tokenizer(self) -> Tokenizer:
        self._check_open()
        if self.tokenizer is None:
            raise DllmError(
                f"{self.path}: the artifact has no tokenizer: give the prompt as token ids (generate --ids)."
            )
        return self.tokenizer

    def _sequences(
        self, prompts: Rows[Prompt], config: GenerationConfig, raw: bool, seeds: Rows[int] | None = None
    ) -> list[Sequence]:
        if not isinstance(config, GenerationConfig):
            raise DllmError(f"config is a {type(config).__name__}, expected a GenerationConfig.")
        config = config.resolved(self.manifest)
        if isinstance(prompts, (str, bytes)) or not len(prompts):
            raise DllmError(f"prompts is {prompts!r}, expected a list of one or more prompts.")
        if seeds is not None and (len(seeds) != len(prompts) or any(seed < 0 for seed in seeds)):
            raise DllmError(f"{len(seeds)} seeds for {len(prompts)} prompts: expected one each, from 0.")
        rules = rules_of(config, self.manifest)
        if rules.sampler.needs_logits and not self.backend.gives_logits:
            raise DllmError(
                f"temperature is {config.temperature}, top_p {config.top_p}, top_k {config.top_k}, but this "
                f"artifact returns only statistics on {self.backend.name}: leave them out, or export it "
                "again with HEAD=logits (--head logits)."
            )
        rows = []
        for i, prompt in enumerate(prompts):
            ids = self.encode(prompt, raw=raw)
            check_prompt(ids, config, self.manifest)
            rows.append(
                Sequence(np.array(ids, np.int64), rules, config.seed + i if seeds is None else seeds[i])
            )
        return rows

    def _generator(self, rows: list[Sequence], config: GenerationConfig) -> Generator:
        if config.speculate == 1:
            return Generator(self.backend, rows)
        return Speculating(self.backend, rows, config.speculate)

    def _result(self, row: Sequence, seconds: float) -> Result:
        prefix_passes = (
            row.nfe
            if not row.rules.cache.keeps_cache
            else sum(step.kind in (PREFIX_PASS, PREFILL) for step in row.trace)
        )
        text = self._text(row.output[: row.num_useful])
        has_gaps = any(position < row.prompt_length for step in row.trace for position in step.positions)
        shown = row.canvas[0 if has_gaps else row.prompt_length : row.end].tolist()
        return Result(
            text,
            row.output.tolist(),
            row.num_useful,
            row.nfe,
            prefix_passes,
            row.nfe - prefix_passes,
            seconds,
            row.canvas[: row.end].tolist(),
            row.trace,
            row.ranges,
            [self.tokenizer.piece(token) if self.tokenizer else str(token) for token in shown],
            row.num_edits,
        )

    def sequence(self, prompt: Prompt, config: GenerationConfig, *, raw: bool = False) -> Sequence:
        """One row, checked, for a scheduler. Raises DllmError."""
        return self._sequences([prompt], config, raw)[0]

    def update_of(self, row: Sequence, block: tuple[int, int], since: int, slot: int = 0) -> Update:
        """What a row's forwards after the first `since` committed. block: the block that was being
        decoded."""
        steps, first = row.trace[since:], row.prompt_length
        in_gaps = (
            row.block is not None and row.block[0] < first
        )  # the answer is finished, the prompt's gaps come last
        settled = row.length if row.block is None or in_gaps else row.block[0]
        useful = first + row.num_useful
        settled = min(settled, useful)
        committed = self._text(row.canvas[first:settled], is_whole=row.is_finished)
        changed = [(p - first, c) for step in steps for p, c in step.changed if p < row.end]
        rest = row.canvas[settled:useful]
        provisional = self._text(rest[rest != row.rules.mask_token_id])
        return Update(
            slot,
            row.nfe,
            steps[-1].kind,
            committed,
            provisional,
            row.output.tolist(),
            [position for position, _ in changed],
            [confidence for _, confidence in changed],
            (block[0] - first, min(block[1], row.end) - first),
            row.is_finished,
            max(0, settled - first),
            [p - first for step in steps for p in (step.edits or ([], []))[0] if p < row.end],
        )

    def text(self, ids: np.ndarray[Any, Any]) -> str:
        """The text of token ids, without special tokens. Raises DllmError without a tokenizer."""
        return self._need_tokenizer().decode(ids.tolist())

    def piece(self, token: int) -> str:
        """The text of one token; special tokens as they are written. Raises DllmError without a tokenizer."""
        return self._need_tokenizer().piece(token)

    def _text(self, ids: np.ndarray[Any, Any], *, is_whole: bool = True) -> str | None:
        """The text of token ids, to which more may be added unless it `is_whole`; None without a
        tokenizer."""
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode(ids.tolist()) if is_whole else self.tokenizer.settled(ids.tolist())


def load(path: str | Path, backend: str = "ort", **options: Any) -> Model:
    """Open an artifact directory on a backend ('ort', or 'torch' in a checkout). The options are the
    backend's. Raises DllmError if the artifact is damaged, or the backend or its package is missing."""
    opened = open_backend(backend, Path(path), **options)
    try:
        return Model(Path(path), opened)
    except BaseException:
        opened.close()
        raise
