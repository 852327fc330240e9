"""Error responses in OpenAI's form: the library's messages in terms of a request's fields, with long values
clipped."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

RETRY_SECONDS = 1
# characters of a message, and how many of a longer one are kept at its beginning and end
_MOST, _HEAD, _TAIL = 320, 160, 120
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# words of the library's messages for Python and the command line -> the fields of a request
_WORDS = (
    (re.compile(r"\s*\([^()]*--[^()]*\)"), ""),
    (re.compile(r"\bgen_length\b"), "max_tokens"),
    (re.compile(r"\bsuffix\b(?! text)"), "suffix_masks"),
)


class Failure(Exception):
    """An error response with the HTTP status `status`."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def clipped(text: str, most: int = _MOST) -> str:
    """A text of about `most` characters at most: of a longer one, its beginning and end. Unpaired surrogates
    are escaped."""
    text = (
        text
        if len(text) <= most
        else f"{text[: most * _HEAD // _MOST]} [...] {text[-(most * _TAIL // _MOST) :]}"
    )
    return text.encode("utf-8", "backslashreplace").decode()


def spoken(error: Exception) -> str:
    """The library's message in terms of a request's fields, without command-line options."""
    text = str(error)
    for pattern, instead in _WORDS:
        text = pattern.sub(instead, text)
    return text


def body_of(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error as a JSON object."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    said = None if param is None else clipped(param, 120)
    return {"error": {"message": clipped(message), "type": kind, "param": said, "code": code}}


def encoded(status: int, message: str, code: str | None = None) -> bytes:
    """The error as a response body."""
    return json.dumps(body_of(status, message, code=code)).encode()


def headers_of(status: int) -> Mapping[str, str]:
    return {"retry-after": str(RETRY_SECONDS)} if status in (429, 503) else {}


def is_fault(error: BaseException) -> bool:
    """Whether an exception is a failure of the called code. Rust code raises panics as BaseException;
    exceptions that end a task or the process are not failures."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
