"""Recordings of block-causal decoding: SDAR, Fast-dLLM v2, and A2D's samplers (of which one has full
attention). They differ from cases of ours in a few ways, all of which are undone here:

- The official loops store the last block too, which nobody reads: that forward, and the token behind it, are
  left out.
- `gen_length` is rounded by the loop: up to whole blocks (SDAR), or down (Fast-dLLM v2).
- A2D's loop passes over all finished tokens before every block (`prefix`), which is our prefill, and then our
  store of the block before.
- `steps` are those of a block (SDAR), and a case names its end tokens (`stop`, `stop_token`, `eos_token_id`).
"""

from __future__ import annotations

from typing import Any, ClassVar

from trt_runtime.artifact.manifest import BLOCK_CAUSAL, FULL
from trt_runtime.decoding.cache_plan import (
    PREFILL,
    PREFIX_PASS,
    REFINE_BLOCK,
    REFINE_FILL,
    REFINE_SMALL,
    STORE,
)
from trt_runtime.decoding.config import MAX_STEPS
from trt_runtime.errors import DllmError
from trt_runtime.measure.case_fields import (
    AT_END_TOKEN,
    AT_LAST_BLOCK,
    Case,
    Field,
    flag,
    number,
    one_of,
    tokens,
    whole,
)

from .base import OfficialLoop, one_forward_less, with_steps, without_last_store


class Sdar(OfficialLoop):
    """SDAR's block_diffusion_generate."""

    title = "SDAR's loop"
    families: ClassVar = {"sdar": ("sdar", "sdar_moe")}
    one_row = True
    fields: ClassVar[tuple[Field, ...]] = (
        one_of("mode", "block", required=True),
        whole("gen_length", 1, required=True),
        whole("block_length", 1, required=True),
        whole("steps", 1, MAX_STEPS, required=True),
        one_of("alg", "low_confidence_dynamic", "low_confidence_static", "sequential", required=True),
        number("threshold", null=True),
        tokens("stop"),
        flag("opencompass"),
    )
    kinds: ClassVar = {"prefill": PREFILL, "step": REFINE_BLOCK, "store": STORE}

    def recorded(self, case: Case) -> bool:
        return case.get("mode") == "block"

    def as_ours(self, case: Case) -> Case:
        if case["alg"] == "low_confidence_dynamic" and case.get("threshold") is None:
            raise DllmError("threshold is missing: alg low_confidence_dynamic needs one.")
        length, block = len(case["prompt"][0]), case["block_length"]
        gen = -(-(length + case["gen_length"]) // block) * block - length
        if "output" in case and [len(row) for row in case["output"]] != [gen]:
            raise DllmError(
                f"output has {[len(row) for row in case['output']]} tokens, but gen_length "
                f"{case['gen_length']} after {length} tokens in blocks of {block} makes {gen}."
            )
        ours = {key: value for key, value in super().as_ours(case).items() if key != "nfe_nonempty"}
        ours |= {"steps_per_block": case["steps"], "gen_length": gen}
        return without_last_store(ours, length + gen) if "trace" in ours else one_forward_less(ours)


class FastDllmV2(OfficialLoop):
    """Fast-dLLM v2's generate and batch_sample."""

    title = "Fast-dLLM v2's loop"
    families: ClassVar = {"fastdllm_v2": ("fast_dllm_qwen",), "fast_dllm_v2": ("fast_dllm_qwen",)}
    fields: ClassVar[tuple[Field, ...]] = (
        one_of("api", "generate", "batch_sample", required=True),
        one_of("mode", "block", "block_dual", required=True),
        whole("gen_length", 1, required=True),
        whole("block_length", 1, required=True),
        whole("small_block", 1, null=True),
        number("threshold", required=True),
        tokens("stop_token"),
    )
    kinds: ClassVar = {
        "prefill": PREFILL,
        "step": REFINE_BLOCK,
        "fill": REFINE_FILL,
        "sub": REFINE_SMALL,
        "store": STORE,
    }

    def recorded(self, case: Case) -> bool:
        return case.get("api") in ("generate", "batch_sample")

    def as_ours(self, case: Case) -> Case:
        length, block = len(case["prompt"][0]), case["block_length"]
        gen = (length // block + case["gen_length"] // block) * block - length
        if block % (case.get("small_block") or block):
            raise DllmError(
                f"small_block is {case['small_block']}, expected a divisor of block_length {block}."
            )
        if gen < 1:
            raise DllmError(
                f"gen_length is {case['gen_length']}, which this loop rounds down to whole blocks of "
                f"{block}, and nothing is left to generate after {length} tokens."
            )
        ours = {key: value for key, value in super().as_ours(case).items() if key != "nfe_nonempty"}
        ours |= {"gen_length": gen, "stop": case.get("stop_token"), "output_ends": AT_END_TOKEN}
        output = case.get("output")
        if output is not None:
            ours["output"] = [row[:gen] for row in output]
        if "trace" in case:
            return without_last_store(ours, length + gen)
        # the loop goes on to the last store, unless it stops before; of several rows the last one counts
        if output is None or len(output) > 1:
            return {key: value for key, value in ours.items() if key != "nfe"}
        return one_forward_less(ours) if len(output[0]) > gen else ours


class A2D(OfficialLoop):
    """dllm's samplers of A2D's models: mdlm with full attention, bd3lm with block-causal attention."""

    title = "A2D's samplers"
    families: ClassVar = {name: (name,) for name in ("a2d_qwen3", "a2d_qwen2", "a2d_llama")}
    fields: ClassVar[tuple[Field, ...]] = (
        one_of("api", "mdlm", "bd3lm", required=True),
        one_of("mode", "none", "block", required=True),
        whole("gen_length", 1, required=True),
        whole("block_length", 1, required=True),
        whole("steps", 1, MAX_STEPS, required=True),
        Field("threshold", lambda v: v is None, "null: these samplers have a schedule only"),
        tokens("eos_token_id"),
    )
    kinds: ClassVar = {"full": PREFIX_PASS, "prefix": STORE, "step": REFINE_BLOCK}

    def recorded(self, case: Case) -> bool:
        return case.get("api") in ("mdlm", "bd3lm")

    def as_ours(self, case: Case) -> Case:
        is_full = case["api"] == "mdlm"
        wanted = "none" if is_full else "block"
        if case["mode"] != wanted:
            raise DllmError(f"mode is {case['mode']}, expected {wanted}: of the sampler {case['api']}.")
        ours = {**case, "alg": "linear"}
        if is_full:
            return super().as_ours(ours | {"attention": FULL})
        ours |= {
            "attention": BLOCK_CAUSAL,
            "output_ends": AT_LAST_BLOCK,
            "stop": case.get("eos_token_id"),
        }
        ours.pop("nfe_nonempty", None)
        return _from_passes(ours, super().as_ours)

    def answer(self, case: Case, result: Case) -> Case:
        if case["attention"] == BLOCK_CAUSAL:
            result = with_steps(result, _as_pass)
        return super().answer(case, result)


def _from_passes(case: Case, renamed: Any) -> Case:
    """A2D's passes over all finished tokens as our prefill and stores."""
    end = 0

    def converted(step: list[Any]) -> list[Any]:
        nonlocal end
        if step[0] != STORE:
            return step
        start, end = end, step[2]
        return [STORE if start else PREFILL, start, end - start, *step[3:]]

    ours: Case = with_steps(renamed(case), converted)
    return ours


def _as_pass(step: list[Any]) -> list[Any]:
    """The reverse for one step."""
    if step[0] not in (PREFILL, STORE):
        return step
    return [STORE, 0, step[1] + step[2], *step[3:]]


SDAR, FAST_DLLM_V2, A2D_SAMPLERS = Sdar(), FastDllmV2(), A2D()
