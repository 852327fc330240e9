"""The exceptions of lm-evaluation-harness, its data sets and the code of tasks, as one sentence each that
says what to do."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trt_runtime.errors import DllmError
from trt_runtime.system import commands
from trt_runtime.system.program import chain_of

_log = logging.getLogger(__name__)
# exceptions of datasets, huggingface_hub, requests and httpx, by the name of the class or a base class
_NOT_REACHED = {
    "ConnectionError",
    "RequestException",
    "HTTPError",
    "HfHubHTTPError",
    "TransportError",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "DatasetNotFoundError",
    "DataFilesNotFoundError",
    "gaierror",
}
_NOT_CACHED = ("Couldn't find cache for", "Hugging Face Hub", "Couldn't reach", "offline mode")
_MATH = ("antlr4", "math_verify", "sympy", "latex2sympy2", "lm-eval[math]", "lm_eval[math]")
_LONGEST = 300
_UNSAFE = "the task runs code that the model writes, which can do anything on this machine: "


@contextmanager
def in_one_line(*, run_unsafe_code: bool) -> Iterator[None]:
    """Turn whatever is raised inside into a DllmError. The traceback is logged at level DEBUG and kept as the
    cause."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a task's functions can raise anything
        _log.debug("the evaluation failed", exc_info=True)
        raise _told(error, run_unsafe_code) from error


def _told(error: BaseException, run_unsafe_code: bool) -> DllmError:
    chain = list(chain_of(error))
    if own := next((link for link in chain if isinstance(link, DllmError)), None):
        return own
    texts = [str(link) for link in chain]
    if any("marked as unsafe" in text or "HF_ALLOW_CODE_EVAL" in text for text in texts):
        return DllmError(_UNSAFE + "set HF_ALLOW_CODE_EVAL=1 as well.") if run_unsafe_code else unsafe()
    return next((told for link in chain if (told := _known(link))), None) or DllmError(
        f"lm-eval failed ({type(error).__name__}: {_short(texts[0])}{_where(error)}): fix the task, or "
        f"remove it from --tasks."
    )


def _where(error: BaseException) -> str:
    """The file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"; {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""


def unsafe() -> DllmError:
    """The error for a task that runs the model's code, which the user did not allow."""
    return DllmError(
        f"{_UNSAFE}give --confirm-run-unsafe-code (it also sets HF_ALLOW_CODE_EVAL=1, which the metric "
        f"needs), or remove the task."
    )


def _known(error: BaseException) -> DllmError | None:
    """The meaning of an exception that has a remedy of its own."""
    text = str(error)
    if isinstance(error, (ImportError, AssertionError)) and any(name in text for name in _MATH):
        return DllmError(
            f"the task needs packages that are missing ({_short(text)}): {commands.install('eval')}."
        )
    if isinstance(error, ModuleNotFoundError):
        return DllmError(
            f"the task needs a package that is missing ({_short(text)}): install it, or remove the task."
        )
    if isinstance(error, MemoryError):
        return DllmError(
            f"out of memory ({_short(text)}): use a smaller --batch, --max-length or --gen-length."
        )
    if {cls.__name__ for cls in type(error).__mro__} & _NOT_REACHED or any(
        said in text for said in _NOT_CACHED
    ):
        return DllmError(
            f"the task's data cannot be downloaded ({_short(text)}): check its name, the network and "
            "HF_HUB_OFFLINE, or use a task with local data (--include-path)."
        )
    return None


def _short(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
