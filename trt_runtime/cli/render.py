"""What a terminal shows: a block while it is unmasked, a result's summary line, an artifact's description."""

from __future__ import annotations

import itertools
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO, cast

from trt_runtime.artifact.manifest import ABSOLUTE, ExpertFacts, Manifest, Quantization
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.model import Model, Prompt, Result, Update
from trt_runtime.system import program, screen

_MASK = "░"


def summary(result: Result) -> str:
    """One line about a result: useful tokens, forwards by kind, tokens per forward, time."""
    return (
        f"[{result.num_useful} tokens, {result.nfe} forwards "
        f"({_plural(result.prefix_passes, 'prefix pass', 'es')}, "
        f"{_plural(result.refine_steps, 'refine step', 's')}), {result.tokens_per_forward:.2f} tokens per "
        f"forward, {result.seconds:.2f} s, {result.num_useful / max(result.seconds, 1e-9):.0f} tokens/s]"
    )


def _plural(number: int, what: str, ending: str) -> str:
    return f"{number} {what}{'' if number == 1 else ending}"


def answer(model: Model, result: Result, *, whole: bool) -> str:
    """A result as text, or as token ids without a tokenizer. whole: the prompt too, with its gaps filled."""
    if not whole:
        return result.text if result.text is not None else " ".join(map(str, result.tokens))
    return model.tokenizer.decode(result.canvas) if model.tokenizer else " ".join(map(str, result.canvas))


class Stopped(KeyboardInterrupt):
    """Ctrl-C during an answer. text: the part of it before the first mask, which is on the screen; None
    without a tokenizer."""

    def __init__(self, text: str | None) -> None:
        super().__init__()
        self.text = text


def show_stream(
    model: Model,
    prompt: Prompt,
    config: GenerationConfig,
    *,
    raw: bool = False,
    out: TextIO | None = None,
    quiet: bool = False,
) -> str | None:
    """Decode one prompt on screen and return its text. If `out` is not a terminal, each block is printed
    once, when it is finished. quiet: no line about forwards and seconds. Ctrl-C stops before the next
    forward, marks the answer as stopped, and raises Stopped."""
    out = out or sys.stdout
    begin = time.perf_counter()
    live = screen.Live(out) if screen.is_terminal(out) else None
    shown, last = "", cast("Update | None", None)
    try:
        with _CtrlC() as ctrl_c, screen.unechoed() if live is not None else nullcontext():
            for last in model.stream([prompt], config, raw=raw):
                if live is not None:
                    live.show(*_spans(model, last))
                elif last.committed is not None:
                    # a character whose bytes end in the next block reads as U+FFFD until then
                    whole = last.committed if last.finished else last.committed.rstrip("\ufffd")
                    out.write(whole[len(shown) :])
                    out.flush()
                    shown = whole
                if ctrl_c.came:
                    break
        assert last is not None
        text = last.committed if last.finished else _settled(model, last)
        final = text if text is not None else " ".join(map(str, last.tokens))
        mark = "" if last.finished else " [stopped]"
        if live is not None:
            live.finish(final + mark)
        else:
            out.write((final[len(shown) :] if final.startswith(shown) else "") + mark + "\n")
            out.flush()
        live = None
    finally:
        if live is not None:
            live.abandon()
    if not last.finished:
        raise Stopped(text)
    if not quiet:
        print(f"[{_plural(last.nfe, 'forward', 's')}, {time.perf_counter() - begin:.2f} s]", file=sys.stderr)
    return last.committed


class _CtrlC:
    """A context that records the first Ctrl-C, so that the answer stops before its next forward; a second
    Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.came = False
        self.before: Any = None

    def __enter__(self) -> _CtrlC:
        if program.gets_ctrl_c():
            self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _note(self, *_: object) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True


def _settled(model: Model, update: Update) -> str | None:
    """The text before the first mask, which no later forward changes; None without a tokenizer."""
    if model.tokenizer is None:
        return None
    tokens = _useful(model, update)
    gap = tokens.index(mask) if (mask := model.manifest.decoding.mask_token_id) in tokens else len(tokens)
    return model.tokenizer.decode(tokens[:gap]).rstrip("\ufffd")


def _useful(model: Model, update: Update) -> list[int]:
    """The generated tokens before the first end token."""
    ends = [i for i, token in enumerate(update.tokens) if token in model.manifest.decoding.eos_token_ids]
    return update.tokens[: min(ends, default=len(update.tokens))]


def _spans(model: Model, update: Update) -> tuple[list[screen.Span], int]:
    """An update as styled text (masks shaded, new tokens bright), and the number of leading characters that
    will not change again."""
    tokens, mask, changed = _useful(model, update), model.manifest.decoding.mask_token_id, set(update.changed)
    gap = tokens.index(mask) if mask in tokens else len(tokens)
    spans = _styled(model, tokens[:gap], 0, changed, is_whole=update.finished)
    settled = sum(len(text) for text, _ in spans)
    for is_mask, group in itertools.groupby(range(gap, len(tokens)), key=lambda i: tokens[i] == mask):
        at = list(group)
        if is_mask:
            spans.append((_MASK * len(at), screen.DIM))
        else:
            spans += _styled(model, tokens[at[0] : at[-1] + 1], at[0], changed, is_whole=True)
    return spans, settled


def _styled(
    model: Model, tokens: list[int], first: int, changed: set[int], *, is_whole: bool
) -> list[screen.Span]:
    """A run of tokens from position `first`, decoded together because a character may span tokens. Unless
    `is_whole`, an incomplete character at the end is dropped."""

    def text_of(end: int) -> str:
        if model.tokenizer is None:
            return "".join(f"{token} " for token in tokens[:end])
        return screen.clean(model.tokenizer.decode(tokens[:end]))

    text = text_of(len(tokens))
    text = text if is_whole else text.rstrip("\ufffd")
    spans, done = list[screen.Span](), 0
    for is_new, group in itertools.groupby(range(len(tokens)), key=lambda i: first + i in changed):
        last = list(group)[-1]
        until = len(text) if last == len(tokens) - 1 else min(len(text), len(text_of(last + 1)))
        if until > done:
            spans.append((text[done:until], screen.bright() if is_new else screen.PLAIN))
            done = until
    return spans


def describe(path: Path, manifest: Manifest) -> str:
    """An artifact's description, one fact per line."""
    model, decoding = manifest.model, manifest.decoding
    verified = manifest.verified
    verdict = (
        "no"
        if verified is None
        else f"{'yes' if verified.get('passed') else 'FAILED'}, against {verified.get('against')}"
        + (f", on {verified['backend']}" if verified.get("backend") else "")
    )
    size = sum(file.size for file in manifest.files.values())
    per_token = (
        2 * model.num_layers * model.num_kv_heads * model.head_dim * (4 if model.dtype == "fp32" else 2)
    )
    rows = {
        "artifact": f"{path} ({size / 1e6:,.1f} MB in {len(manifest.files)} files)",
        "model": f"{model.family}, {model.parameters / 1e6:,.1f} M parameters, {model.dtype}",
        "network": f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads, "
        f"{model.num_kv_heads} KV heads "
        f"of {model.head_dim}, MLP {model.intermediate_size}, vocabulary {model.vocab_size}"
        + _experts(model.experts),
        "canvas": f"up to {model.max_length} tokens; the cache takes {per_token / 1024:g} KiB per token",
        "decoding": f"mask {decoding.mask_token_id}, end {', '.join(map(str, decoding.eos_token_ids))}, "
        f"logit shift {decoding.logit_shift}, {decoding.sampling} sampling, defaults: "
        + (", ".join(f"{key} {value}" for key, value in decoding.defaults.items()) or "none"),
        "source": str(manifest.source.get("checkpoint", "not named")),
        "graphs": f"opset {manifest.opset}, {manifest.lowering} lowering, {manifest.head} head",
        "tokenizer": manifest.tokenizer or "none (token ids only)",
        "made by": ", ".join(f"{name} {version}" for name, version in manifest.producer.items()),
        "verified": verdict,
    }
    if decoding.is_block_causal:
        origin = "position 0" if decoding.block_origin == ABSOLUTE else "the end of the prompt"
        small = f", decoded in small blocks of {decoding.small_block}" if decoding.small_block else ""
        rows["attention"] = f"block-causal: blocks of {decoding.block_length} from {origin}{small}"
    if decoding.tuned:
        rows["tuned"] = (
            ", ".join(f"{key} {value}" for key, value in decoding.tuned.items())
            + " (used where you give no options)"
        )
    if manifest.quantization is not None:
        rows["quantised"] = _quantised(manifest.quantization)
    return "\n".join(f"{name:10} {text}" for name, text in rows.items())


def _experts(experts: ExpertFacts | None) -> str:
    if experts is None:
        return ""
    shared = f" and one of {experts.shared_size} for all" if experts.shared_size else ""
    how = "; the chosen ones are computed, by ONNX Runtime's own operator" if experts.is_fused else ""
    return (
        f"; in {experts.num_layers} layers {experts.top_k} of {experts.num_experts} experts of "
        f"{experts.intermediate_size} for each row{shared}{how}"
    )


def _quantised(facts: Quantization) -> str:
    measured = facts.quality
    if measured is None:
        return f"{facts.scheme} for {facts.target}; its quality was not measured"
    return f"{facts.scheme} for {facts.target}; compared with the original model: {quality(measured)}"


def quality(measured: dict[str, Any]) -> str:
    """The quality that the export measured (manifest: quantization.quality), in words."""
    right = (
        f"; right answers {measured['right']} of {measured['judged']}, before {measured['right_before']}"
        if measured["judged"]
        else ""
    )
    same = (
        f"same token {100 * measured['same_token']:.1f} %, same commit {100 * measured['same_commit']:.1f} %"
    )
    return f"KL {measured['kl_mean']:.2g} nats, {same}{right}"
