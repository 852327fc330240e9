"""Silence what lm-evaluation-harness and its libraries write to standard error themselves."""

from __future__ import annotations

import logging
import os

_OTHERS = "can be passed to `--metadata`"  # an option of lm-eval's own command


def prepare(*, quiet: bool) -> None:
    """Hide lm-eval's progress bars (the harness shows its own) and its advice about options that `dllm-trt
    eval` does not have; with `quiet` also its warnings. Call it before lm-eval is imported, because tqdm
    reads its setting then. A TQDM_DISABLE set by the user stays."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR if quiet else logging.NOTSET)
    logging.getLogger("lm_eval.api.task").addFilter(_is_about_this_command)


def _is_about_this_command(record: logging.LogRecord) -> bool:
    return _OTHERS not in str(record.msg)
