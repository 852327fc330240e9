"""Options of policies: each is declared once, in the policy that takes it, with its type, range, default and
help.

The command line, the server's schema, the generated reference and the checks of GenerationConfig all follow
from the declaration:

    @dataclass(frozen=True)
    class Patient(Policy):
        name: ClassVar[str] = "patient"
        patience: int = option(2, low=1, help="forwards that a position must keep its token")
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from trt_runtime.errors import DllmError, shown

Value = int | float | bool | str
_KEY = "option"
# names of GenerationConfig's own, which no policy can use for an option
LOOP_OPTIONS = frozenset(
    {
        "gen_length",
        "block_length",
        "cache",
        "policy",
        "steps",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop_at_eos",
        "infill",
        "speculate",
        "refresh_every",
        "refresh_window",
        "suffix",
        "suffix_decay",
        "hold_back_eos",
        "small_block",
        "fuse_stores",
        "edit_threshold",
        "edit_steps",
        "policy_options",
    }
)


@dataclass(frozen=True)
class Option:
    """An option of a policy: its type (that of its default), range, default, and help. low_is_open: `low`
    itself is outside the range. off: the value at which it does nothing, and which may be given with any
    policy; None if there is none."""

    name: str
    default: Value
    help: str
    low: float = -math.inf
    high: float = math.inf
    low_is_open: bool = False
    off: Value | None = None
    hint: str = ""

    @property
    def kind(self) -> type[Value]:
        return type(self.default)

    def check(self, value: object) -> None:
        """Raise DllmError for a value of another type or outside the range. A whole number is accepted for a
        fraction."""
        kinds = (int, float) if self.kind is float else (self.kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            raise DllmError(f"{self.name} is {shown(value)}, expected {self.kind.__name__}.")
        if isinstance(value, (bool, str)) or (self.off is not None and value == self.off):
            return
        if isinstance(value, int) and abs(value) >= 2**63:
            raise DllmError(f"{self.name} is too large: expected a number below 2^63.")
        if (
            not (self.low < value if self.low_is_open else self.low <= value)
            or not value <= self.high
            or value == math.inf
        ):
            said = f" ({self.hint})" if self.hint else ""
            raise DllmError(f"{self.name} is {value}, expected {self.range}{said}.")

    @property
    def range(self) -> str:
        """The range in words."""
        off = (
            ""
            if self.off is None
            else f"{self.off:g}, or "
            if not isinstance(self.off, str)
            else f"'{self.off}', or "
        )
        least = f"above {self.low:g}" if self.low_is_open else f"from {self.low:g}"
        if self.low == -math.inf:
            return off + ("any number" if self.high == math.inf else f"at most {self.high:g}")
        if self.high == math.inf:
            return off + least
        return off + (
            f"{least} and at most {self.high:g}" if self.low_is_open else f"{self.low:g} to {self.high:g}"
        )


def just_above(threshold: float) -> float:
    """The threshold that exactly the float32 confidences above `threshold` reach."""
    return float(np.nextafter(np.float32(threshold), np.float32(np.inf)))


def option(
    default: Value,
    *,
    help: str,
    low: float = -math.inf,
    high: float = math.inf,
    low_is_open: bool = False,
    off: Value | None = None,
    hint: str = "",
) -> Any:
    """Declare an option as a field of a policy's dataclass (see Option)."""
    declared = Option("", default, help, low, high, low_is_open, off, hint)
    return dataclasses.field(default=default, metadata={_KEY: declared})


def threshold_option(*, hint: str = "") -> Any:
    """The option `threshold`, as several policies declare it."""
    said = "confidence from which a position is committed"
    return option(0.9, low=0, low_is_open=True, high=1, hint=hint, help=said)


def options_of(policy: type[Any]) -> list[Option]:
    """The options that a policy declares, in order."""
    fields = dataclasses.fields(policy) if dataclasses.is_dataclass(policy) else ()
    return [
        dataclasses.replace(item.metadata[_KEY], name=item.name) for item in fields if _KEY in item.metadata
    ]
