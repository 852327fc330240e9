"""What lm-evaluation-harness and its libraries write on standard error by themselves, kept to what this
program's commands promise."""

from __future__ import annotations

import logging
import os

_OTHERS = "can be passed to `--metadata`"  # an option of lm-eval's own command


def prepare(*, quiet: bool) -> None:
    """No progress bars of theirs (the harness shows its own), no advice on options that `dllm-trt eval` has
    not; with `quiet` no warnings either.

    To be called before lm-eval is imported: tqdm reads its setting then. A TQDM_DISABLE of the user's stays.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR if quiet else logging.NOTSET)
    logging.getLogger("lm_eval.api.task").addFilter(_is_about_this_command)


def _is_about_this_command(record: logging.LogRecord) -> bool:
    return _OTHERS not in str(record.msg)
