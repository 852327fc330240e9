"""Answers that are begun by the prompt, and BOS tokens: the published templates (tests/data/templates)
against transformers."""

from __future__ import annotations

import json

import pytest
from places import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from trt_runtime.artifact.tokenizer import Tokenizer as Ours
from trt_runtime.errors import DllmError

PUBLISHED = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "tests/data/templates").glob("*.jinja"))
}
TEMPLATES = PUBLISHED | {
    "trims the end": "{% for m in messages %}<{{ m.role }}>{{ m.content.rstrip() }}</s>\n{% endfor %}",
    "keeps all": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if "
    "add_generation_prompt %}<assistant>{% endif %}",
}
SPECIAL = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|im_start|>",
    "<|im_end|>",
]
BEGUN = [
    "[",
    "Here is it:\n```python\ndef f(x):\n",
    "\n```python\n",
    " a ",
    "x\t",
    "The answer is",
    "</s> odd <|eot_id|>",
    "a" * 500,
    " ",
]
QUESTION = {"role": "user", "content": "Write f. Here is it: ["}
BEFORE = [
    [QUESTION],
    [{"role": "system", "content": "Be brief."}, QUESTION],
    [
        QUESTION,
        {"role": "assistant", "content": "["},
        {"role": "user", "content": "  And \n g? "},
    ],  # few shots as turns
]


def _write(path, config, post_processor=None):
    """A byte-level tokenizer without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    if post_processor:
        made.post_processor = post_processor(made)
    path.mkdir(exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (path / "tokenizer_config.json").write_text(json.dumps(base | config))
    return path


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_begun_answer_is_rendered_as_transformers_does(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = _write(tmp_path / "t", {"chat_template": TEMPLATES[name]})
    ours, theirs = Ours(path), transformers.PreTrainedTokenizerFast.from_pretrained(path)
    for before in BEFORE:
        for begun in BEGUN:
            messages = [*before, {"role": "assistant", "content": begun}]
            expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
            text = ours.render_chat(messages, continue_final_message=True)
            assert text == expected, (name, begun)
            assert text.endswith(begun) or (
                text.endswith(begun.strip()) and name not in ("dream", "keeps all")
            )
            assert messages[-1]["content"] == begun  # the caller's own
            assert ours.render_chat(messages, add_generation_prompt=False) == theirs.apply_chat_template(
                messages, tokenize=False
            )


def test_llada_writes_its_header_whatever_is_asked_and_a_begun_answer_has_none_behind_it(tmp_path):
    ours = Ours(_write(tmp_path / "t", {"chat_template": PUBLISHED["llada"]}))
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert ours.render_chat([QUESTION], add_generation_prompt=False).endswith(header)
    text = ours.render_chat(
        [QUESTION, {"role": "assistant", "content": "def f"}], continue_final_message=True
    )
    assert text.endswith(header + "def f") and text.count(header) == 1


@pytest.mark.parametrize(
    ("template", "messages", "options", "said"),
    [
        (
            "{{ messages[0].content }}",
            [QUESTION, {"role": "assistant", "content": "x"}],
            {},
            "drops or changes the last message",
        ),
        (
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            [{"role": "assistant", "content": "x"}],
            {},
            "drops or changes",
        ),
        ("{{ messages }}", [], {}, "give a last message"),
        ("{{ messages }}", [{"role": "assistant"}], {}, "content of the last message"),
        ("{{ messages }}", [QUESTION], {"add_generation_prompt": True}, "remove add_generation_prompt"),
        (
            "{{ messages }}",
            [{"role": "assistant", "content": "CONTINUE_FINAL_MESSAGE_TAG"}],
            {},
            "remove it",
        ),
        ("{{ raise_exception('no') }}", [QUESTION], {}, "the chat template failed"),
    ],
)
def test_answers_that_cannot_be_begun(template, messages, options, said, tmp_path):
    ours = Ours(_write(tmp_path / "t", {"chat_template": template}))
    with pytest.raises(DllmError, match=said):
        ours.render_chat(messages, continue_final_message=True, **options)


def _with_bos(tokenizer):
    bos = SPECIAL[0]
    return processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


_AS_TOKEN = {
    "__type": "AddedToken",
    "content": SPECIAL[0],
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
}
BOS = {  # tokenizer_config.json, what tokenizer.json puts in front, and whether a BOS token comes of it
    "told": ({"add_bos_token": True}, None, True),
    "told not": ({"add_bos_token": False}, None, False),
    "not told": ({}, None, False),
    "by the file": ({}, _with_bos, True),
    "by the file alone": ({"add_bos_token": False}, _with_bos, True),
    "told both": ({"add_bos_token": True}, _with_bos, True),
    "without one": ({"add_bos_token": True, "bos_token": None}, None, False),
    "null": ({"add_bos_token": None}, None, False),
    "as a token": ({"add_bos_token": True, "bos_token": _AS_TOKEN}, None, True),
}


@pytest.mark.parametrize("name", BOS)
def test_plain_texts_begin_with_bos_where_transformers_puts_it(name, tmp_path):
    """Of a tokenizer.json transformers asks the file alone; what tokenizer_config.json says counts with slow
    files, as Dream's are."""
    transformers = pytest.importorskip("transformers")
    config, post_processor, has_bos = BOS[name]
    path = _write(tmp_path / "t", {"tokenizer_class": "Qwen2Tokenizer", **config}, post_processor)
    ours = Ours(path)
    if post_processor is None:
        Tokenizer.from_file(str(path / "tokenizer.json")).model.save(str(path))
        (path / "tokenizer.json").unlink()
    theirs = transformers.Qwen2Tokenizer.from_pretrained(path)
    for text in ("Hello world", " x", "a\nb"):
        assert ours.encode(text, add_bos=ours.adds_bos) == theirs(text)["input_ids"]
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.adds_bos == has_bos
    if ours.adds_bos:
        bos = ours.special_id("bos_token")
        assert ours.encode(f"{SPECIAL[0]}x", add_bos=True) == ours.encode(f"{SPECIAL[0]}x") and ours.encode(
            "", add_bos=True
        ) == [bos]


def test_without_a_bos_token_none_can_be_asked_for(tmp_path):
    with pytest.raises(DllmError, match="no BOS token"):
        Ours(_write(tmp_path / "t", {"bos_token": None})).encode("x", add_bos=True)


def test_ids_that_no_tokenizer_has_are_no_text(tmp_path):
    """The vocabulary of a model is padded beyond its tokenizer's, and a temperature draws from all of it
    (DreamLM/Dream#54)."""
    ours = Ours(_write(tmp_path / "t", {}))
    ids = ours.encode("ab")
    unknown = ours.max_id + 1
    assert ours.decode([ids[0], unknown, unknown + 500, ids[1]]) == "ab" and ours.decode([unknown]) == ""
    assert ours.piece(unknown) == ""
