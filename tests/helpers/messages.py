"""What an error on standard error must look like."""

from __future__ import annotations


def is_one_line(error: str) -> bool:
    """Whether this is one error message of one line."""
    return error.startswith("error: ") and error.count("\n") == 1
