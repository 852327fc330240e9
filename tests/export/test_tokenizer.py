"""Tokenizers and chat templates of the published layouts, token by token against transformers."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from places import DEMO, export_quietly
from tiny import write_checkpoint
from trained_tokenizers import DREAM_SPECIAL, decoder_entries, trained

from export import cli, families
from export.checkpoint import tokenizer as tokenizer_files
from trt_runtime import load
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.tokenizer import Tokenizer as Ours
from trt_runtime.errors import DllmError

# the conversation formats of the two families, written out: headers and <|eot_id|>, a begin token first;
# ChatML with a system text
LLADA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set "
    "content = bos_token + "
    "content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|start_header_id|>assistant<|end_header_id|>"
    "\n\n' }}{% endif %}"
)
DREAM_TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ('user', 'system') or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLADA_SPECIAL = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|mdm_mask|>",
]
CONVERSATIONS = [
    [{"role": "user", "content": "What is 2+2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Hello,\n\tworld!  "}],
    [
        {"role": "user", "content": "Grüße, 世界 🙂"},
        {"role": "assistant", "content": "Ok <|endoftext|> fine."},
        {"role": "user", "content": "def f(x):\n    return x ** 2 # it's 100%\r\n"},
    ],
]


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    """A LLaDA-Instruct as it is published: tokenizer.json, tokenizer_config.json with a chat template,
    special_tokens_map.json."""
    tokenizer = trained(LLADA_SPECIAL, tokenizer_files._QWEN2)
    size, ids = tokenizer.get_vocab_size(), {text: tokenizer.token_to_id(text) for text in LLADA_SPECIAL}
    path = write_checkpoint(
        families.find("llada"),
        tmp_path_factory.mktemp("llada") / "checkpoint",
        model={
            "vocab_size": size,
            "embedding_size": size,
            "mask_token_id": ids["<|mdm_mask|>"],
            "eos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
    )
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"})
    )
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "chat_template": LLADA_TEMPLATE,
                "added_tokens_decoder": decoder_entries(tokenizer),
            }
        )
    )
    return path


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    """A Dream-Instruct as it is published: the slow tokenizer's vocab.json and merges.txt, beside a class of
    its own."""
    tokenizer = trained(DREAM_SPECIAL, tokenizer_files._QWEN2)
    size, ids = tokenizer.get_vocab_size(), {text: tokenizer.token_to_id(text) for text in DREAM_SPECIAL}
    path = write_checkpoint(
        families.find("dream"),
        tmp_path_factory.mktemp("dream") / "checkpoint",
        model={
            "vocab_size": size + 8,
            "mask_token_id": ids["<|mask|>"],
            "eos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "bos_token_id": ids["<|endoftext|>"],
        },
    )
    tokenizer.model.save(str(path))
    (path / "tokenization_dream.py").write_text("raise SystemExit('code of a checkpoint was run')")
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "DreamTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
                "bos_token": "<|beginoftext|>",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "mask_token": "<|mask|>",
                "unk_token": "<|endoftext|>",
                "chat_template": DREAM_TEMPLATE,
                "added_tokens_decoder": decoder_entries(tokenizer),
            }
        )
    )
    return path


@pytest.fixture(params=["llada", "dream"])
def published(request):
    """(checkpoint, the transformers class that reads its tokenizer, the special tokens)"""
    names = {"llada": ("PreTrainedTokenizerFast", LLADA_SPECIAL), "dream": ("Qwen2Tokenizer", DREAM_SPECIAL)}
    return request.getfixturevalue(request.param), *names[request.param]


def _theirs(path, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    plain = shutil.copytree(path, tmp_path / "plain")
    config = json.loads((plain / "tokenizer_config.json").read_text())
    (plain / "tokenizer_config.json").write_text(
        json.dumps({**config, "tokenizer_class": name} | {"auto_map": None})
    )
    return getattr(transformers, name).from_pretrained(plain)


def test_conversations_and_texts_are_those_of_transformers_token_by_token(published, tmp_path):
    path, name, special = published
    artifact = export_quietly(path, tmp_path / "artifact")
    ours, theirs = Ours(artifact / "tokenizer"), _theirs(path, name, tmp_path)
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.render_chat(messages, add_generation_prompt=prompt) == text
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    rng = random.Random(0)
    pieces = [
        *special,
        "the ",
        "Apache",
        " license",
        "\n\n",
        "  ",
        "it's",
        "100",
        "ß",
        "e\u0301",
        "世界",
        "🙂",
        "\t",
        "!?",
        "x_y",
    ]
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_the_end_of_a_turn_ends_a_generation(published, tmp_path):
    """<|eot_id|> and <|im_end|> stand in no config.json: the chat template tells them."""
    path, _, special = published
    manifest = manifests.load(export_quietly(path, tmp_path / "artifact"))
    tokenizer = Ours(tmp_path / "artifact" / "tokenizer")
    ends = [
        tokenizer.encode(text)[0]
        for text in ("<|endoftext|>", "<|eot_id|>" if "<|eot_id|>" in special else "<|im_end|>")
    ]
    assert manifest.decoding.eos_token_ids == tuple(ends)
    model = load(tmp_path / "artifact", threads=1)
    assert model.encode("What is 2+2?") == tokenizer.encode(tokenizer.render_chat(CONVERSATIONS[0]))


def test_several_end_tokens_of_generation_config_and_several_templates(llada, tmp_path):
    path = shutil.copytree(llada, tmp_path / "checkpoint")
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": LLADA_TEMPLATE},
    ]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    tokenizer = Ours(path)
    end = tokenizer.encode("<|eot_id|>")[0]
    assert manifests.load(export_quietly(path, tmp_path / "a")).decoding.eos_token_ids == (3, 4, end)
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert Ours(path).render_chat([{"role": "user", "content": "x"}]) == "x"
    assert manifests.load(export_quietly(path, tmp_path / "b")).decoding.eos_token_ids == (3, 4)


def test_a_template_sees_plain_texts_and_what_transformers_gives_it(llada):
    tokenizer = Ours(llada)
    for template, said in (
        ("{{ {'a': '<b>'} | tojson }}", '{"a": "<b>"}'),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("{% for m in messages %}{% break %}{% endfor %}{{ bos_token }}", "<|startoftext|>"),
        ("{{ strftime_now('%%') }}", "%"),
    ):
        tokenizer._template = template
        assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == said
    for attack in (
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}{{ messages.__class__.__init__.__globals__ }}",
        "{% include 'x' %}",
    ):
        tokenizer._template = attack
        with pytest.raises(DllmError, match="the chat template failed"):
            tokenizer.render_chat([{"role": "user", "content": "x"}])
    with pytest.raises(DllmError, match="a message is"):
        tokenizer.render_chat([{"role": "user", "content": object()}])


def _refused(path, tmp_path, said):
    with pytest.raises(DllmError, match=said):
        export_quietly(path, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_tokenizers_that_do_not_fit_are_refused(dream, llada, tmp_path):
    path = shutil.copytree(dream, tmp_path / "checkpoint")
    config = json.loads((path / "tokenizer_config.json").read_text())

    def with_config(**change):
        (path / "tokenizer_config.json").write_text(json.dumps({**config, **change}))

    with_config(tokenizer_class="GPTSomething")
    _refused(path, tmp_path, "tokenizer class 'GPTSomething' is unsupported")
    with_config(mask_token="<|im_end|>")
    _refused(path, tmp_path, "its mask token is .*, config.json says")
    with_config(added_tokens_decoder={"9999": {"content": "<|far|>", "special": True}})
    _refused(path, tmp_path, "'<|far|>' gets id .* says 9999")
    with_config(added_tokens_decoder={})
    (path / "added_tokens.json").write_text(
        json.dumps({e["content"]: int(i) for i, e in config["added_tokens_decoder"].items()})
    )
    assert Ours(export_quietly(path, tmp_path / "older") / "tokenizer").encode("<|mask|>") == Ours(
        export_quietly(dream, tmp_path / "newer") / "tokenizer"
    ).encode("<|mask|>")
    (path / "merges.txt").write_text("a b c d\n")
    _refused(path, tmp_path, "vocab.json and merges.txt are not readable")
    small = shutil.copytree(DEMO, tmp_path / "demo")
    shutil.copyfile(llada / "tokenizer.json", small / "tokenizer.json")
    _refused(small, tmp_path, "has token id .*vocabulary has 192 tokens")


def test_a_checkpoint_without_a_tokenizer_says_so(dream, tmp_path, capsys):
    path = shutil.copytree(dream, tmp_path / "checkpoint")
    (path / "vocab.json").unlink()
    (path / "tokenizer.model").write_bytes(b"")
    for said in (
        "tokenizer.model is a SentencePiece model",
        "has no tokenizer.json: prompts must be token ids",
    ):
        assert (
            cli.main(
                ["--checkpoint", str(path), "--out", str(tmp_path / "a"), "--verify", "no", "--overwrite"]
            )
            == 0
        )
        assert said in capsys.readouterr().err
        (path / "tokenizer.model").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "listed",
    [
        [1],
        5,
        "x",
        {"abc": {"content": "a"}},
        {"900": {}},
        {"900": {"content": 5}},
        {"900": "x"},
        {"900": {"content": "\ud800"}},
        {"900": {"content": "a", "lstrip": "yes"}},
    ],
)
def test_added_tokens_of_the_wrong_kind_are_one_clear_line(dream, tmp_path, listed):
    path = shutil.copytree(dream, tmp_path / "checkpoint")
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": listed}))
    _refused(path, tmp_path, "the added token")


def test_files_of_a_tokenizer_that_the_manifest_does_not_list_are_refused(llada, tmp_path):
    artifact = export_quietly(llada, tmp_path / "a")
    (artifact / "tokenizer" / "chat_template.jinja").write_text("{{ 'another prompt' }}")
    with pytest.raises(DllmError, match="the manifest does not list it"):
        manifests.load(artifact)
