"""Recordings of LLaDA2's own loops, 2.0's and 2.1's, which edits committed tokens.

They recompute everything up to the end of the block in each step (`full`); here a step is a window over the
block, and the prefill and the stores are forwards of their own. 2.0's decodes the last block to its end,
behind gen_length, and behind an end token.
"""

from __future__ import annotations

from typing import Any, ClassVar

from trt_runtime.decoding.cache_plan import PREFILL, REFINE_BLOCK, STORE
from trt_runtime.decoding.config import MAX_STEPS
from trt_runtime.errors import DllmError
from trt_runtime.measure.case_fields import AT_END_TOKEN, Case, Field, flag, number, one_of, tokens, whole

from .base import OfficialLoop


class Llada2(OfficialLoop):
    """LLaDA2.0's generate."""

    title = "LLaDA2.0's loop"
    families: ClassVar = {"llada2": ("llada2",), "llada2_moe": ("llada2",)}
    one_row = True
    shared_fields: ClassVar[tuple[Field, ...]] = (
        one_of("mode", "block", required=True),
        whole("gen_length", 1, required=True),
        whole("block_length", 1, required=True),
        number("threshold", required=True),
        flag("eos_early_stop", required=True),
        tokens("eos_token_id"),
    )
    fields: ClassVar[tuple[Field, ...]] = (
        *shared_fields,
        whole("steps", 1, MAX_STEPS, required=True),
        whole("minimal_topk", 1),
    )
    kinds: ClassVar = {"full": REFINE_BLOCK}

    def recorded(self, case: Case) -> bool:
        return "eos_early_stop" in case and "editing_threshold" not in case

    def as_ours(self, case: Case) -> Case:
        topk = case.get("minimal_topk", 1)
        steps = min(case["steps"], case["gen_length"] // topk)
        if steps < 1:
            raise DllmError(
                f"minimal_topk is {topk}, more than gen_length {case['gen_length']}: this loop then takes no "
                f"step."
            )
        ours = self._shared(case) | {"steps_per_block": steps, "stop": case.get("eos_token_id")}
        if "trace" in case:
            return self._with_stores(ours, self._until_final(case))
        # what is decoded behind the answer costs steps that are not made here
        stops = case["eos_early_stop"] and self._has_end(case)
        return ours if "nfe" not in case else self._with_nfe(ours, is_known=not stops)

    def answer(self, case: Case, result: Case) -> Case:
        """Only the passes that the official loop makes."""
        steps = [
            ["full", 0, step[1] + step[2], *step[3:]]
            for step in result["trace"]
            if step[0] not in (PREFILL, STORE)
        ]
        return {**result, "trace": steps, "nfe": len(steps)}

    def _shared(self, case: Case) -> Case:
        return {
            **case,
            "alg": "low_confidence_dynamic",
            "stop_early": case["eos_early_stop"],
            "output_ends": AT_END_TOKEN,
        }

    @staticmethod
    def _has_end(case: Case) -> bool:
        ends = case.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        return any(token in ends for token in case.get("output", [[]])[0])

    def _with_nfe(self, ours: Case, is_known: bool) -> Case:
        """Without a trace: the steps with the prefill and the stores, where they are the same here."""
        length, block = len(ours["prompt"][0]), ours["block_length"]
        done = length + (len(ours["output"][0]) if "output" in ours else ours["gen_length"])
        end = -(-done // block) * block
        if not is_known or "output" not in ours or end > length + ours["gen_length"]:
            return {key: value for key, value in ours.items() if key != "nfe"}
        first = length // block
        return {**ours, "nfe": ours["nfe"] + (1 if first else 0) + end // block - first - 1}

    def _until_final(self, case: Case) -> list[Any]:
        """The steps until everything in the answer is decided: an end token with no mask before it, if the
        case stops early, or all of gen_length."""
        start = len(case["prompt"][0])
        end = start + case["gen_length"]
        ends, left, first_end = case.get("eos_token_id"), set(range(start, end)), end
        ends = ends if isinstance(ends, list) else [ends]
        for number_of_step, step in enumerate(case["trace"]):
            left -= set(step[3])
            inside = [p for p, token in zip(step[3], step[4], strict=True) if token in ends and p < end]
            first_end = min([first_end, *inside])
            is_ended = case["eos_early_stop"] and first_end < end
            if not left or (is_ended and not any(position < first_end for position in left)):
                return list(case["trace"][: number_of_step + 1])
        return list(case["trace"])

    @staticmethod
    def _with_stores(ours: Case, trace: list[Any]) -> Case:
        """Passes over everything up to the end of a block as steps over the block, with the prefill and the
        stores between them."""
        length, block = len(ours["prompt"][0]), ours["block_length"]
        edits: list[Any] = [[], []] if trace and len(trace[0]) == 7 else []
        start = length // block * block
        steps = [[PREFILL, 0, start, [], [], *edits]] if start else []
        end = start + block
        for step in trace:
            if step[1] + step[2] != end:
                steps.append([STORE, end - block, block, [], [], *edits])
                end = step[1] + step[2]
            steps.append([REFINE_BLOCK, end - block, block, *step[3:]])
        return {**ours, "trace": steps, "nfe": len(steps)}


class Llada21(Llada2):
    """LLaDA2.1's generate, which accepts and ignores `steps` and `minimal_topk`."""

    title = "LLaDA2.1's loop"
    families: ClassVar = {"llada21": ("llada2",), **Llada2.families}
    fields: ClassVar[tuple[Field, ...]] = (
        *Llada2.shared_fields,
        number("editing_threshold", 0, required=True),
        whole("max_post_steps", 0, required=True),
        whole("num_to_transfer", 1, required=True),
    )
    unused = ("steps",)
    entries = (7, 8)
    step = "kind, start, length, positions, tokens, edited positions, their new tokens"

    def recorded(self, case: Case) -> bool:
        return "editing_threshold" in case

    def as_ours(self, case: Case) -> Case:
        ours = self._shared(case) | {"at_least": case["num_to_transfer"]}
        if case["eos_early_stop"]:  # otherwise all blocks are decoded
            ours["stop"] = case.get("eos_token_id")
        if "trace" in case:
            return self._with_stores(ours, case["trace"])
        cut = self._has_end(case)
        return ours if "nfe" not in case else self._with_nfe(ours, is_known=not cut)


LLADA2, LLADA21 = Llada2(), Llada21()
