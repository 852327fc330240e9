"""The exceptions that users see, and helpers for their messages."""

from __future__ import annotations

TYPE_CHECKING = False  # imports nothing, so that the command line starts at once
if TYPE_CHECKING:
    from collections.abc import Iterable


class DllmError(Exception):
    """An error that the user can fix. The message says what is wrong, what was given, what was expected and
    what to do."""


class BackendError(DllmError):
    """A backend or its device failed at correct work: not the user's error, although the message may say what
    to do."""


def check_counts(options: object, *names: str) -> None:
    """Raise DllmError for one of these options that is given and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise DllmError(f"--{name.replace('_', '-')} is {value}, expected a whole number from 1.")


def shown(value: object, most: int = 60) -> str:
    """A value for a message, cut if it is long."""
    try:
        text = repr(value)
    except ValueError:  # of thousands of digits
        text = f"a number of type {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "..."


def unknown(kind: str, name: str, known: Iterable[str], advice: str = "") -> DllmError:
    """The error for an unknown name: the nearest known name, all known names, and how to go on."""
    import difflib

    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" did you mean '{near[0]}'?" if near else ""
    return DllmError(
        f"unknown {kind} '{name}':{hint} known: {', '.join(names)}.{' ' + advice if advice else ''}"
    )
