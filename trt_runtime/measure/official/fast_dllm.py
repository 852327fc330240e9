"""Fast-dLLM's v1 code, with LLaDA, Dream and models that decode as they do (iLLaDA, LLaDA-MoE). What earlier
versions of this project recorded has the same form."""

from __future__ import annotations

from typing import ClassVar

from trt_runtime.decoding.cache_plan import PREFIX_PASS, REFINE_BLOCK, REFINE_NEAR, REFINE_SUFFIX
from trt_runtime.measure.case_fields import INPUTS, Field, one_of

from .base import OfficialLoop


class FastDllm(OfficialLoop):
    title = "Fast-dLLM's v1 code"
    families: ClassVar = {"lladamoe": ("llada_moe",)}
    # those of our own cases, which are checked as such
    fields: ClassVar[tuple[Field, ...]] = (
        one_of("mode", "none", "prefix", "dual", required=True),
        *(Field(name, lambda v: True, "") for name in INPUTS if name not in ("mode", "prompt")),
    )
    unused = ("eos_token_id",)  # nothing ends its answers
    # a file that does not say its format may have today's kinds
    kinds: ClassVar = {
        **{kind: kind for kind in (PREFIX_PASS, REFINE_NEAR, REFINE_SUFFIX, REFINE_BLOCK)},
        "full": PREFIX_PASS,
        "near": REFINE_NEAR,
        "prefix": REFINE_SUFFIX,
        "dual": REFINE_BLOCK,
    }


FAST_DLLM = FastDllm()
