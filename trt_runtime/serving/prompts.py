"""From a request to rows: texts become token ids, the answer gets the remaining room, gaps become mask
tokens. Runs outside the event loop."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from trt_runtime.artifact.tokenizer import Tokenizer
from trt_runtime.decoding.blocks import usable_length
from trt_runtime.decoding.config import DEFAULT_GEN_LENGTH, GenerationConfig
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.model import Model
from trt_runtime.serving.errors import Failure
from trt_runtime.serving.requests import LARGEST_SEED, ChatRequest, Common, CompletionRequest, Mask


@dataclass(frozen=True)
class PreparedRow:
    """A choice: its sequence, and which part of it is shown. prompt: index of its prompt; prompt_tokens:
    tokens that the client sent; shown: the part of the canvas that is the answer if gaps of the prompt are
    filled, None for the text generated after the prompt; gaps: tokens to fill."""

    sequence: Sequence
    prompt: int
    prompt_tokens: int
    shown: slice | None = None
    gaps: int = 0


@dataclass(frozen=True)
class PreparedRows:
    """The rows of a request, in the order of its choices, and the seed if anything is random."""

    rows: list[PreparedRow]
    seed: int | None


def prepare(model: Model, body: Common, longest: int) -> PreparedRows:
    """The rows that a request asks for. longest: tokens of the longest canvas that the server takes. Raises
    DllmError and Failure."""
    body.stops()
    config = body.config(model.manifest)
    if body.seed is None and config.draws:
        config = replace(config, seed=secrets.randbelow(2**31))
    if config.make_sampler(model.manifest).needs_logits and not model.backend.gives_logits:
        raise Failure(
            400, "this server's model returns no logits: remove temperature, top_p and top_k.", "temperature"
        )
    rows: list[PreparedRow] = []
    for number, (ids, gap, tail) in enumerate(_prompts(model, body, config, longest)):
        for _ in range(body.choices):
            rows.append(
                _row(
                    model,
                    replace(config, seed=(config.seed + len(rows)) % (LARGEST_SEED + 1)),
                    number,
                    ids,
                    gap,
                    tail,
                )
            )
    return PreparedRows(rows, config.seed if config.draws or body.seed is not None else None)


def _row(
    model: Model,
    config: GenerationConfig,
    number: int,
    ids: list[int],
    gap: int | None,
    tail: list[int] | None,
) -> PreparedRow:
    """A choice. gap: tokens to generate after `ids`, None if `ids` contain the gaps; tail: ids after the
    gap."""
    mask = model.manifest.decoding.mask_token_id
    if gap is not None and tail is None:
        sequence = model.sequence(ids, replace(config, gen_length=gap), raw=True)
        return PreparedRow(sequence, number, len(ids))
    whole = ids if gap is None else [*ids, *[mask] * gap, *(tail or [])]
    sequence = model.sequence(whole, replace(config, gen_length=0, infill=True), raw=True)
    gaps = whole.count(mask)
    shown = slice(0, len(whole)) if gap is None else slice(len(ids), len(ids) + gap)
    return PreparedRow(sequence, number, len(whole) - gaps, shown, gaps)


def _prompts(
    model: Model, body: Common, config: GenerationConfig, longest: int
) -> list[tuple[list[int], int | None, list[int] | None]]:
    """For each prompt: its token ids, the tokens to generate, and the ids after these if a suffix is
    given."""
    if isinstance(body, ChatRequest):
        return [
            _with_room(
                model, body, config, _encoded(model, [m.plain for m in body.messages], longest), None, longest
            )
        ]
    assert isinstance(body, CompletionRequest)
    if body.template is not None:
        return [(_template(model, body, longest), None, None)]
    tail = _inside(model, body.suffix, longest) if body.suffix else None
    prompts = body.prompts()
    if not prompts:
        raise Failure(400, "the prompt is empty: give at least one.", "prompt")
    return [
        _with_room(
            model,
            body,
            config,
            [] if tail and prompt == "" else _encoded(model, prompt, longest),
            tail,
            longest,
        )
        for prompt in prompts
    ]


def _with_room(
    model: Model, body: Common, config: GenerationConfig, ids: list[int], tail: list[int] | None, longest: int
) -> tuple[list[int], int, list[int] | None]:
    """The number of tokens to generate: as many as requested, but at most as many as fit."""
    longest = usable_length(model.manifest.decoding, config.block_length, longest)
    room = longest - len(ids) - len(tail or [])
    if room < 1:
        raise too_long(f"{len(ids) + len(tail or [])} tokens" + (" with its suffix" if tail else ""), longest)
    default = config.gen_length or model.manifest.decoding.defaults.get("gen_length", DEFAULT_GEN_LENGTH)
    return ids, min(body.length() or default, room), tail


def too_long(what: str, longest: int) -> Failure:
    return Failure(
        400,
        f"the prompt has {what}, but prompt and answer together may have {longest} on this server: shorten "
        f"the prompt to {longest - 1}.",
        "prompt",
        "context_length_exceeded",
    )


def _encoded(model: Model, prompt: Any, longest: int) -> list[int]:
    """Token ids of a prompt: a text, messages, or ids. A prompt that cannot fit is refused before all of it
    is tokenised."""
    if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], dict)):
        if len(prompt) >= longest:
            raise too_long(f"{len(prompt)} tokens", longest)
        return _without_masks(model, model.encode(prompt))
    if not isinstance(prompt, str):
        return _inside(model, _tokenizer(model).render_chat(prompt), longest)
    _check_size(model, prompt, longest)
    return _without_masks(model, model.encode(prompt, raw=True))


def _inside(model: Model, text: str, longest: int, *, add_bos: bool = False) -> list[int]:
    """Token ids of a text inside a prompt, which may be empty. add_bos: it is the beginning, for a tokenizer
    that adds a BOS token."""
    _check_size(model, text, longest)
    return _without_masks(model, _tokenizer(model).encode(text, add_bos=add_bos))


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise Failure(400, "this model has no tokenizer: give the prompt as token ids.", "prompt")
    return model.tokenizer


def _check_size(model: Model, text: str, longest: int) -> None:
    if _tokenizer(model).surely_exceeds(text, longest):
        raise too_long(f"more than {longest} tokens", longest)


def _without_masks(model: Model, ids: list[int]) -> list[int]:
    mask = model.manifest.decoding.mask_token_id
    if mask in ids:
        said = "use the field template of /v1/completions to fill gaps, or remove it."
        raise Failure(
            400,
            f"the prompt contains the mask token ({mask}) at position {ids.index(mask)}: {said}",
            "prompt",
        )
    return ids


def _template(model: Model, body: CompletionRequest, longest: int) -> list[int]:
    """Token ids of a template: fixed text, and as many mask tokens as each gap wants."""
    parts = body.template or []
    is_provisional = body.stream_options is not None and body.stream_options.provisional
    if body.length() is not None or body.suffix or is_provisional:
        said = (
            "template cannot be combined with max_tokens, suffix or stream_options.provisional: remove them."
        )
        raise Failure(400, said, "template")
    if not any(isinstance(part, Mask) for part in parts):
        raise Failure(400, 'template has no gap: give at least one {"mask": N}.', "template")
    mask = model.manifest.decoding.mask_token_id
    ids: list[int] = []
    for part in parts:
        if isinstance(part, Mask):
            ids += [mask] * min(part.mask, longest + 1)
        elif part:
            ids += _inside(model, part, longest, add_bos=not ids and _tokenizer(model).adds_bos)
        if len(ids) > longest:
            said = f"template has more than {longest} tokens, the limit of this server: shorten it."
            raise Failure(400, said, "template", "context_length_exceeded")
    return ids
