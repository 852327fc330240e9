"""The demo model's task: a spoken order to a household robot becomes a JSON plan.

    take red cups from kitchen to garage, then hand blue pens to Mia
    [{"do": "move", "item": "cups", "color": "red", "from": "kitchen", "to": "garage"}, {"do": "give", ...}]

A plan has many right spellings: the keys of a step come in one of several orders, and all keys of an answer
follow one of two vocabularies ("do", "item", ... or "action", "object", ...). Tokens of an answer therefore
depend on one another: a decoder that commits two keys at once, each plausible by itself, repeats a key or
mixes the vocabularies. `is_right` accepts every right spelling and nothing else.

A tenth of all pairs of a thing and a colour never occurs in training; each held-out prompt contains one of
them (`is_held_out`). Everything is drawn from a `random.Random`, so a seed names a data set. Standard library
only.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from dataclasses import dataclass
from typing import Any

GEN_LENGTH = 96
MIN_ANSWER, MAX_ANSWER = 48, GEN_LENGTH - 1

ITEMS = (
    "apples", "balls", "books", "bottles", "bowls", "boxes", "chairs", "cups", "keys", "lamps",
    "lemons", "pens", "plates", "ropes", "shoes", "toys",
)  # fmt: skip
COLORS = ("black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white")
ROOMS = ("attic", "cellar", "garage", "garden", "hall", "kitchen", "library", "office", "pantry", "porch")
PEOPLE = ("Ada", "Ben", "Dan", "Eva", "Kim", "Leo", "Mia", "Nora", "Sam", "Tom")
TOOLS = ("broom", "cloth", "mop", "sponge")

VERBS = {
    "move": ("take", "move", "carry", "bring"),
    "give": ("hand", "give", "deliver"),
    "find": ("find", "seek", "locate"),
    "clean": ("clean", "tidy"),
}
OPENINGS = ("", "", "please ", "robot , ", "now ", "could you ")
JOINTS = (", then ", ", and then ", "; after that ", ". next ", ", and ")
VOCABULARIES = (
    ("do", "item", "color", "from", "to", "for", "in", "with"),
    ("action", "object", "paint", "source", "target", "person", "room", "tool"),
)
_KEYS = dict(zip(VOCABULARIES[0], VOCABULARIES[1], strict=True))
_GOODS_ORDERS = (("item", "color"), ("color", "item"))

Step = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """An order in words, the plan it means (keys of the first vocabulary), and one right spelling of the
    answer."""

    prompt: str
    plan: list[Step]
    answer: str


def is_held_out(step: Step) -> bool:
    """Whether the step's thing and colour are among the tenth of all pairs that training never shows."""
    return "item" in step and zlib.crc32(f"{step['item']}/{step['color']}".encode()) % 10 == 0


def _draw_step(rng: random.Random) -> Step:
    do = rng.choices(("move", "give", "find", "clean"), (5, 3, 3, 2))[0]
    if do == "clean":
        return {"do": do, "in": rng.choice(ROOMS), "with": rng.choice(TOOLS)}
    goods = {"do": do, "item": rng.choice(ITEMS), "color": rng.choice(COLORS)}
    if do == "move":
        source, target = rng.sample(ROOMS, 2)
        return goods | {"from": source, "to": target}
    return goods | ({"for": rng.choice(PEOPLE)} if do == "give" else {"in": rng.choice(ROOMS)})


def _say(step: Step, rng: random.Random) -> str:
    verb = rng.choice(VERBS[step["do"]])
    if step["do"] == "clean":
        return f"{verb} {step['in']} with {step['with']}"
    goods = f"{step['color']} {step['item']}"
    if step["do"] == "move":
        return f"{verb} {goods} from {step['from']} to {step['to']}"
    if step["do"] == "find":
        return f"{verb} {goods} in {step['in']}"
    return f"{verb} {goods} to {step['for']}" if rng.random() < 0.5 else f"{verb} {step['for']} {goods}"


def _spell(step: Step, rng: random.Random, vocabulary: int) -> Step:
    """One right order of the keys: "do" first; the goods in either order, before or after the places."""
    goods = [key for key in rng.choice(_GOODS_ORDERS) if key in step]
    places = [key for key in step if key not in ("do", "item", "color")]
    groups = [goods, places] if rng.random() < 0.5 else [places, goods]
    keys = ["do", *groups[0], *groups[1]]
    return {(_KEYS[key] if vocabulary else key): step[key] for key in keys}


def _answer_tokens(plan: list[Step]) -> int:
    """Tokens of the answer: glue, key, glue, value for each field, and the closing bracket."""
    return 4 * sum(len(step) for step in plan) + 1


def draw(rng: random.Random, *, held_out: bool, drill: bool = False) -> Example:
    """One example; with `held_out`, at least one step has a pair that training never shows; otherwise
    none has.

    A `drill` is a single step; training includes some, because copying is learnt from them first.
    """
    while True:
        plan: list[Step] = [_draw_step(rng)]
        while not drill and _answer_tokens(plan) < MIN_ANSWER:
            plan.append(_draw_step(rng))
        if not drill and rng.random() < 0.5:
            plan.append(_draw_step(rng))
        if _answer_tokens(plan) <= MAX_ANSWER and any(map(is_held_out, plan)) == held_out:
            break
    prompt = rng.choice(OPENINGS) + _say(plan[0], rng)
    for step in plan[1:]:
        prompt += rng.choice(JOINTS) + _say(step, rng)
    vocabulary = rng.randrange(2)
    return Example(prompt, plan, json.dumps([_spell(step, rng, vocabulary) for step in plan]))


def plan_of(prompt: str) -> list[Step]:
    """The plan of an order, the inverse of `draw`. Raises ValueError if the text is not an order."""
    opening = max((text for text in OPENINGS if prompt.startswith(text)), key=len)
    joints = "|".join(re.escape(text) for text in sorted(JOINTS, key=len, reverse=True))
    return [_step_of(clause) for clause in re.split(joints, prompt[len(opening) :])]


def _step_of(clause: str) -> Step:
    goods = f"(?P<color>{'|'.join(COLORS)}) (?P<item>{'|'.join(ITEMS)})"
    room, person, tool = (f"({'|'.join(names)})" for names in (ROOMS, PEOPLE, TOOLS))
    spoken = {
        "move": (f"{goods} from (?P<from_>{room}) to (?P<to>{room})",),
        "give": (f"{goods} to (?P<for_>{person})", f"(?P<for_>{person}) {goods}"),
        "find": (f"{goods} in (?P<in_>{room})",),
        "clean": (f"(?P<in_>{room}) with (?P<with_>{tool})",),
    }
    for do, patterns in spoken.items():
        for pattern in patterns:
            if match := re.fullmatch(f"({'|'.join(VERBS[do])}) {pattern}", clause):
                return {"do": do} | {key.rstrip("_"): value for key, value in match.groupdict().items()}
    raise ValueError(f"{clause!r} is not a step of an order")


def is_right(answer: str, plan: list[Step]) -> bool:
    """Whether `answer` is a right spelling of `plan`: JSON without a repeated key, all keys of one
    vocabulary."""
    try:
        read = json.loads(answer, object_pairs_hook=_without_repeats)
    except ValueError:
        return False
    return read in spellings(plan)


def spellings(plan: list[Step]) -> list[list[Step]]:
    """The plan in both vocabularies; the order of keys is free."""
    return [plan, [{_KEYS[key]: value for key, value in step.items()} for step in plan]]


def _without_repeats(pairs: list[tuple[str, Any]]) -> Step:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def words() -> list[str]:
    """Every word of the task, in a fixed order: the vocabulary of the tokenizer."""
    words = [*ITEMS, *COLORS, *ROOMS, *PEOPLE, *TOOLS]
    words += [verb for verbs in VERBS.values() for verb in verbs] + list(VERBS)
    words += [*VOCABULARIES[0], *VOCABULARIES[1]]
    words += [
        "please",
        "robot",
        "now",
        "could",
        "you",
        "then",
        "and",
        "after",
        "that",
        "next",
        "the",
        "a",
        "from",
        "to",
        "in",
        "with",
        "is",
        "are",
        "me",
        "my",
        "of",
    ]
    return list(dict.fromkeys(words))


def glue() -> list[str]:
    """Every run of punctuation of the task: each is one token."""
    return ['[{"', '": "', '", "', '"}, {"', '"}]', ", ", " , ", "; ", ". ", ",", ".", "?", "!"]
