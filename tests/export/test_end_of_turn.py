"""Which tokens of a template end a turn, and so a generation."""

from __future__ import annotations

import json
import shutil

import pytest
from places import DEMO

from trt_runtime.artifact.tokenizer import Tokenizer as Ours


def test_truncation_and_padding_of_a_training_run_are_left_behind(tmp_path):
    path = shutil.copytree(DEMO, tmp_path / "demo")
    held = json.loads((path / "tokenizer.json").read_text())
    held["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    held["padding"] = {
        "strategy": {"Fixed": 40},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (path / "tokenizer.json").write_text(json.dumps(held))
    text = "take red cups from kitchen to garage"
    assert Ours(path).encode(text) == Ours(DEMO).encode(text)


@pytest.mark.parametrize(
    "template",
    [
        "{{ '<|user|>' + messages[0]['content'] + '<|assistant|>' }}",
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}{{ '<|assistant|>' }}",
    ],
)
def test_a_token_that_ends_no_turn_is_not_taken_for_an_end(template):
    tokenizer = Ours(DEMO)
    tokenizer._template = template
    assert tokenizer.end_of_turn() is None
