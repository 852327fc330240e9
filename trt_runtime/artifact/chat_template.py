"""Chat templates: Jinja text that came with a checkpoint, rendered in a sandbox as transformers does.

A template is untrusted: it sees plain strings, lists and dicts, and cannot change anything outside itself.
jinja2 below 3.1.6 has known ways out of its sandbox.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from trt_runtime.errors import DllmError

_END = "CONTINUE_FINAL_MESSAGE_TAG "  # of a message that is continued, as transformers marks it


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    special: Mapping[str, str],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
) -> str:
    """The text of a conversation of {'role', 'content'} messages. `special`: texts of the special tokens, by
    name.

    With continue_final_message the text ends right after the last message's content, as the template wrote
    it, without the end of that message: the model continues it. A template that trims contents also trims
    the spaces at its end. Raises DllmError for an invalid message, and for whatever the template raises.
    """
    plain = []
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(item, str) for pair in message.items() for item in pair
        ):
            raise DllmError(
                f"a message is {message!r}, expected a dict of texts like {{'role': 'user', 'content': "
                f"'...'}}."
            )
        plain.append({str(key): str(value) for key, value in message.items()})
    if not continue_final_message:
        return _rendered(template, plain, special, add_generation_prompt)
    if add_generation_prompt or not plain or "content" not in plain[-1]:
        raise DllmError(
            "continue_final_message continues the content of the last message: give a last message with "
            "content, and remove add_generation_prompt."
        )
    content = plain[-1]["content"]
    if _END.strip() in "".join(message.get("content", "") for message in plain):
        raise DllmError(
            f"a message contains {_END.strip()!r}, which is reserved for continue_final_message: remove it."
        )
    plain[-1]["content"] = content + _END
    text = _rendered(template, plain, special, add_generation_prompt)
    begun, tag, _ = text.rpartition(_END.strip())
    if not tag or content.strip() not in begun:
        raise DllmError(
            "the chat template drops or changes the last message, so the model cannot continue it: remove "
            "continue_final_message."
        )
    return (
        begun if text.startswith(begun + _END) else begun.rstrip()
    )  # what was trimmed is not part of the text


def _rendered(
    template: str, messages: list[dict[str, str]], special: Mapping[str, str], add_generation_prompt: bool
) -> str:
    try:
        return str(
            _compiled(template).render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special,
            )
        )
    except Exception as error:  # a template can raise anything
        raise DllmError(f"the chat template failed ({error}): check the roles of the messages.") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    import jinja2.ext
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = _tojson  # Jinja's own version escapes HTML
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _generation_tag() -> Any:
    """`{% generation %}`, which marks an answer for training; here its body is rendered as it is."""
    import jinja2.ext

    class Generation(jinja2.ext.Extension):  # type: ignore[misc]
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    return Generation


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
