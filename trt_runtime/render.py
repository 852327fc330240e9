"""What a terminal shows: the block being unmasked in place, a result in a line, an artifact in a page."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TextIO

from trt_runtime.config import GenerationConfig
from trt_runtime.manifest import Manifest, Quantization
from trt_runtime.model import Model, Prompt, Result, Update

_MASK = "░"
_DIM, _BRIGHT, _PLAIN, _UP, _CLEAR = "\x1b[2m", "\x1b[1;32m", "\x1b[0m", "\x1b[{}A", "\x1b[J"


def summary(result: Result) -> str:
    """One line about a result: useful tokens, forwards by kind, tokens a forward, time."""
    return (
        f"[{result.num_useful} tokens, {result.nfe} forwards ({_plural(result.prefix_passes, 'prefix pass', 'es')}, "
        f"{_plural(result.refine_steps, 'refine step', 's')}), {result.tokens_per_forward:.2f} tokens a forward, {result.seconds:.2f} s, "
        f"{result.num_useful / max(result.seconds, 1e-9):.0f} tokens/s]"
    )


def _plural(number: int, what: str, ending: str) -> str:
    return f"{number} {what}{'' if number == 1 else ending}"


def answer(model: Model, result: Result, *, whole: bool) -> str:
    """A result as text, or as token ids without a tokenizer; `whole`: with the prompt, whose gaps were filled."""
    if not whole:
        return result.text if result.text is not None else " ".join(map(str, result.tokens))
    return model.tokenizer.decode(result.canvas) if model.tokenizer else " ".join(map(str, result.canvas))


def show_stream(
    model: Model, prompt: Prompt, config: GenerationConfig, *, raw: bool = False, out: TextIO | None = None
) -> str | None:
    """Decode one prompt on screen; returns its text. Where `out` is no terminal, each finished block is printed once."""
    out = out or sys.stdout
    begin, shown, lines = time.perf_counter(), "", 0
    last: Update | None = None
    for last in model.stream([prompt], config, raw=raw):
        if out.isatty():
            text, lines = _canvas(model, last, lines)
            out.write(text)
        elif last.committed is not None:
            # a character whose bytes end in the next block reads as U+FFFD until then
            whole = last.committed if last.finished else last.committed.rstrip("\ufffd")
            out.write(whole[len(shown) :])
            shown = whole
        out.flush()
    assert last is not None
    if out.isatty():
        out.write((_UP.format(lines) if lines else "") + "\r" + _CLEAR + (last.committed or " ".join(map(str, last.tokens))))
    elif last.committed is None:
        out.write(" ".join(map(str, last.tokens)))
    out.write("\n")
    seconds = time.perf_counter() - begin
    print(f"[{last.nfe} forwards, {seconds:.2f} s]", file=sys.stderr)
    return last.committed


def _canvas(model: Model, update: Update, lines: int) -> tuple[str, int]:
    """The escape sequences that draw a canvas over the last one of `lines` lines, and the lines that it takes."""
    import shutil

    width = max(20, shutil.get_terminal_size().columns - 1)
    mask = model.manifest.decoding.mask_token_id
    ends = [i for i, token in enumerate(update.tokens) if token in model.manifest.decoding.eos_token_ids]
    drawn, column, rows = "", 0, 0
    for i, token in enumerate(update.tokens[: min(ends, default=len(update.tokens))]):
        piece = _MASK if token == mask else _piece(model, token)
        style = _DIM if token == mask else _BRIGHT if i in update.changed else _PLAIN
        if column + len(piece) > width:
            drawn, column, rows = drawn + "\n", 0, rows + 1
        drawn, column = drawn + style + piece + _PLAIN, column + len(piece)
    return (_UP.format(lines) if lines else "") + "\r" + _CLEAR + drawn, rows


def _piece(model: Model, token: int) -> str:
    text = model.tokenizer.decode([token]) if model.tokenizer else f"{token} "
    return "".join(character if character.isprintable() else " " for character in text)


def describe(path: Path, manifest: Manifest) -> str:
    """An artifact in a page."""
    model, decoding = manifest.model, manifest.decoding
    verified = manifest.verified
    said = (
        "no"
        if verified is None
        else f"{'yes' if verified.get('passed') else 'FAILED'}, against {verified.get('against')}"
        + (f", on {verified['backend']}" if verified.get("backend") else "")
    )
    size = sum(file.size for file in manifest.files.values())
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * (4 if model.dtype == "fp32" else 2)
    rows = {
        "artifact": f"{path} ({size / 1e6:,.1f} MB in {len(manifest.files)} files)",
        "model": f"{model.family}, {model.parameters / 1e6:,.1f} M parameters, {model.dtype}",
        "network": f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads, {model.num_kv_heads} KV heads "
        f"of {model.head_dim}, MLP {model.intermediate_size}, vocabulary {model.vocab_size}",
        "canvas": f"up to {model.max_length} tokens; the cache takes {per_token / 1024:g} KiB a token",
        "decoding": f"mask {decoding.mask_token_id}, end {', '.join(map(str, decoding.eos_token_ids))}, "
        f"logit shift {decoding.logit_shift}, {decoding.sampling} sampling, defaults: "
        + (", ".join(f"{key} {value}" for key, value in decoding.defaults.items()) or "none"),
        "source": str(manifest.source.get("checkpoint", "not named")),
        "graphs": f"opset {manifest.opset}, {manifest.lowering} lowering, {manifest.head} head",
        "tokenizer": manifest.tokenizer or "none (token ids only)",
        "made by": ", ".join(f"{name} {version}" for name, version in manifest.producer.items()),
        "verified": said,
    }
    if manifest.quantization is not None:
        rows["quantised"] = _quantised(manifest.quantization)
    return "\n".join(f"{name:10} {text}" for name, text in rows.items())


def _quantised(facts: Quantization) -> str:
    measured = facts.quality
    if measured is None:
        return f"{facts.scheme} for {facts.target}; its quality was not measured"
    right = (
        f"; right answers {measured['right']} of {measured['judged']}, before {measured['right_before']}"
        if measured["judged"]
        else ""
    )
    return (
        f"{facts.scheme} for {facts.target}; beside the model as it was: KL {measured['kl_mean']:.2g} nats, same token "
        f"{100 * measured['same_token']:.1f} %, same commit {100 * measured['same_commit']:.1f} %{right}"
    )
