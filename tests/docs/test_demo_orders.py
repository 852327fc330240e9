"""The demo model answers every order in the documents correctly, and the answers shown there are correct."""

from __future__ import annotations

import random
import re

import demo_task
import pytest
from documents import DOCUMENTS
from places import ROOT

import trt_runtime as rt

SOURCES = [
    *DOCUMENTS,
    ROOT / ".ci" / "run",
    ROOT / "trt_runtime" / "model.py",
    ROOT / "tools" / "record_decoding.py",
]
_VERBS = [verb for verbs in demo_task.VERBS.values() for verb in verbs]
_WORDS = [
    *demo_task.COLORS,
    *demo_task.ITEMS,
    *demo_task.ROOMS,
    *demo_task.PEOPLE,
    *demo_task.TOOLS,
    "from",
    "to",
    "in",
    "with",
]
_STEP = rf"(?:{'|'.join(_VERBS)})(?: (?:{'|'.join(_WORDS)})\b)+"
_JOINTS = "|".join(re.escape(joint) for joint in sorted(demo_task.JOINTS, key=len, reverse=True))
_ORDER = re.compile(rf"\b{_STEP}(?:(?:{_JOINTS}){_STEP})*")


def orders_of(text: str) -> list[str]:
    """Every order in a text, also across line breaks."""
    return [order for order in _ORDER.findall(re.sub(r"\s+", " ", text)) if order.count(" ") > 2]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_order_is_answered_right(path, model):
    text = path.read_text(encoding="utf-8")
    for order in orders_of(text):
        plan = demo_task.plan_of(order)  # raises for an order outside the task
        for cache in ("none", "dual"):
            answer = model.generate([order], rt.GenerationConfig(cache=cache))[0].text
            assert demo_task.is_right(answer, plan), (order, cache, answer)


def test_the_answers_that_the_tutorial_shows_are_right():
    text = re.sub(r"\n {4}", " ", (ROOT / "docs" / "tutorial" / "demo.md").read_text(encoding="utf-8"))
    shown = re.findall(r"^> (.+)\n(\[\{.+\}\])$", text, re.M)
    assert len(shown) == 3
    for order, answer in shown:
        assert demo_task.is_right(answer, demo_task.plan_of(order)), order


def test_orders_are_found_and_understood():
    """Each document with orders is searched, and `plan_of` inverts `draw`."""
    orders = {
        path.relative_to(ROOT).as_posix(): orders_of(path.read_text(encoding="utf-8")) for path in SOURCES
    }
    for name in (
        "README.md",
        "docs/tutorial/demo.md",
        "docs/reference/python-api.md",
        "docs/how-to/serve.md",
        "docs/how-to/quantise.md",
        "docs/explanation/demo-model.md",
        ".ci/run",
        "trt_runtime/model.py",
        "tools/record_decoding.py",
    ):
        assert orders[name], name
    for seed in range(500):
        drawn = demo_task.draw(random.Random(seed), held_out=seed % 2 == 0)
        assert demo_task.plan_of(drawn.prompt) == drawn.plan
    for wrong in ("take red cups to garage", "take red cups from the kitchen to garage", "hello", ""):
        with pytest.raises(ValueError):
            demo_task.plan_of(wrong)
