"""The official loops whose recorded cases can be replayed."""

from __future__ import annotations

from trt_runtime.errors import DllmError
from trt_runtime.measure.case_fields import Case

from .base import OfficialLoop
from .block_causal import A2D_SAMPLERS, FAST_DLLM_V2, SDAR
from .fast_dllm import FAST_DLLM
from .llada2 import LLADA2, LLADA21
from .rnd1 import RND1

_LOOPS = (LLADA2, LLADA21, RND1, FAST_DLLM_V2, A2D_SAMPLERS, SDAR, FAST_DLLM)


def loop_of(case: Case) -> OfficialLoop:
    """The loop that recorded a case: one of its family's, or of all if it names none. A loop is told by the
    fields of the case."""
    family = case.get("family")
    own = [loop for loop in _LOOPS if family is None or family in loop.families]
    recorded = [loop for loop in own if loop.recorded(case)]
    return (recorded or ([] if family is None else own) or [FAST_DLLM])[0]


def families_of(case: Case) -> tuple[str, ...]:
    """The families of ours that a case may be of; none if it does not say, and its fields do not either: then
    it may be of any. Raises DllmError."""
    name = case.get("family")
    if name is None:
        loop = loop_of(case)
        return () if loop is FAST_DLLM else tuple({own for names in loop.families.values() for own in names})
    if not isinstance(name, str):
        raise DllmError(f"family is {str(name)[:60]}, expected a model family's name.")
    return next((loop.families[name] for loop in _LOOPS if name in loop.families), (name,))
