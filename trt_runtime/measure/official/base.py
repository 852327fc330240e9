"""The form in which the cases of an official decoding loop are recorded: its fields, how such a case is read
as one of ours, and how a result is answered in its form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from trt_runtime.decoding.cache_plan import STORE
from trt_runtime.errors import DllmError
from trt_runtime.measure.case_fields import INPUTS, RESULTS, Case, Field, check_fields, rows, tokens, trace

# of every recording: what it is called, and how its tokens were chosen. Drawn tokens cannot be compared.
_COMMON = (
    Field("id", lambda v: isinstance(v, (str, int)), "a name"),
    Field("family", lambda v: isinstance(v, str), "a model family's name"),
    tokens("mask_token_id", null=False, several=False),
    tokens("pad_token_id"),
    Field("torch_seed", lambda v: v is None, "none: tokens that PyTorch drew at random cannot be compared"),
    Field("temperature", lambda v: v in (None, 0), "0: tokens that were drawn cannot be compared"),
)


class OfficialLoop:
    """A loop whose cases are recorded. title: in messages. families: ours whose cases it decodes, by the name
    that recordings have. fields: what its cases say, beside `prompt` and `trace`. unused: fields that its
    code accepts and ignores. kinds: of steps, and what they are called here. one_row: whether it decodes one
    prompt at a time. entries: the numbers of entries that a step may have; step: these, in words."""

    title: str
    families: ClassVar[Mapping[str, tuple[str, ...]]]
    fields: ClassVar[tuple[Field, ...]] = ()
    unused: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[Mapping[str, str]]
    one_row = False
    entries: ClassVar[tuple[int, ...]] = (5, 6)
    step = "kind, start, length, positions, tokens"

    def recorded(self, case: Case) -> bool:
        """Whether the fields of a case that names no family are this loop's."""
        return False

    def read(self, case: Case) -> Case:
        """The case as one of ours. Raises DllmError for a field that is missing, not valid or not of this
        loop; the message does not name the case."""
        own = {field.name for field in (*_COMMON, *self.fields)}
        for name in (*INPUTS, *_INPUTS_OF_LOOPS):
            if case.get(name) is not None and name not in own | {"prompt"} | set(self.unused):
                raise DllmError(
                    f"{name} is {str(case[name])[:60]}, but a recording of {self.title} has no such field: "
                    f"remove it, or correct the case's family."
                )
        check_fields(case, (*_COMMON, *self.fields, rows("prompt", self.one_row, required=True), *RESULTS))
        check_fields(case, [trace(len(case["prompt"]), self.entries, self.step)])
        self._check_trace(case)
        return self.as_ours(case)

    def _check_trace(self, case: Case) -> None:
        """The kinds of the steps, and whether `nfe` counts them."""
        if "trace" not in case:
            return
        for step in case["trace"]:
            if step[0] not in self.kinds:
                known = ", ".join(self.kinds)
                raise DllmError(f"trace has a step '{step[0][:60]}', expected one of {known}.")
        if case.get("nfe", len(case["trace"])) != len(case["trace"]):
            raise DllmError(f"nfe is {case['nfe']}, but its trace has {len(case['trace'])} steps.")

    def as_ours(self, case: Case) -> Case:
        """A case whose fields are valid, as one of ours."""
        return with_steps(case, lambda step: [self.kinds[step[0]], *step[1:]])

    def answer(self, case: Case, result: Case) -> Case:
        """A result of ours in the form of this loop's recordings."""
        words = {new: old for old, new in self.kinds.items()}
        return with_steps(result, lambda step: [words.get(step[0], step[0]), *step[1:]])


# what says how cases are decoded, in the words of any of the loops
_INPUTS_OF_LOOPS = (
    "add_eos_at_end",
    "api",
    "eb_gamma",
    "eos_early_stop",
    "eos_token_id",
    "minimal_topk",
    "num_to_transfer",
    "seq_len",
    "stop_token",
    "suffix",
)
# beside these and the results: what recordings say that changes nothing
NOTES = (
    "calls",
    "canvas",
    "checkpoint",
    "hidden_noise_1e5_ok",
    "left_pad",
    "logit_noise_1e-4_ok",
    "logit_noise_ok",
    "block_cache",
    "prompt_seed",
    "prompt_text",
    "quotas",
    "router_gap_min",
    "router_noise_ok",
    "row_equals_single",
    "tags",
)
_NOTES_BEGIN = ("n_", "opencompass", "sane_", "single_")


def unread(case: Case) -> list[str]:
    """The fields of a case that nothing here knows."""
    checked = (field.name for field in (*_COMMON, *RESULTS))
    known = {*INPUTS, *_INPUTS_OF_LOOPS, *checked, "trace", *NOTES}
    return [name for name in case if name not in known and not name.startswith(_NOTES_BEGIN)]


def with_steps(case: Case, converted: Callable[[list[Any]], list[Any]]) -> Case:
    """The case with the steps of its trace converted."""
    if "trace" not in case:
        return case
    return {**case, "trace": [converted(step) for step in case["trace"]]}


def without_last_store(case: Case, end: int) -> Case:
    """The case without a store that nobody reads: the last forward, if it wrote nothing before `end`."""
    last = case["trace"][-1] if case.get("trace") else None
    if last is None or last[0] != STORE or any(position < end for position in last[3]):
        return case
    return one_forward_less({**case, "trace": case["trace"][:-1]})


def one_forward_less(case: Case) -> Case:
    """The case with one forward less expected."""
    return {**case, "nfe": case["nfe"] - 1} if "nfe" in case else case
