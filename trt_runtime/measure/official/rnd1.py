"""Recordings of RND1's own loop, whose canvas is given as a whole: here its answer is a gap of the prompt."""

from __future__ import annotations

from typing import ClassVar

from trt_runtime.decoding.cache_plan import PREFIX_PASS
from trt_runtime.decoding.config import MAX_STEPS
from trt_runtime.errors import DllmError
from trt_runtime.measure.case_fields import Case, Field, are_rows, flag, number, one_of, tokens, whole

from .base import OfficialLoop


class Rnd1(OfficialLoop):
    """RND1's diffusion_sample."""

    title = "RND1's loop"
    families: ClassVar = {"rnd1": ("rnd1",)}
    one_row = True
    fields: ClassVar[tuple[Field, ...]] = (
        one_of("mode", "none"),
        whole("seq_len", 2, required=True),
        whole("steps", 1, MAX_STEPS, required=True),
        number("eb_gamma", 0, null=True),
        flag("add_eos_at_end"),
        tokens("mask_token_id", null=False, several=False, required=True),
        tokens("eos_token_id", null=False, several=False, required=True),
        tokens("pad_token_id", null=False, several=False, required=True),
        Field(
            "suffix",
            lambda v: v is None or are_rows([v]) or (are_rows(v) and len(v) == 1),
            "a row of token ids, or null",
        ),
    )
    kinds: ClassVar = {"full": PREFIX_PASS}

    def recorded(self, case: Case) -> bool:
        return "seq_len" in case

    def as_ours(self, case: Case) -> Case:
        prompt, mask, length = case["prompt"][0], case["mask_token_id"], case["seq_len"]
        suffix = case.get("suffix") or []
        given = suffix[0] if suffix and isinstance(suffix[0], list) else suffix
        gap = length - len(prompt) - len(given) - 1
        if gap < 1:
            raise DllmError(
                f"seq_len is {length}, expected room for {len(prompt)} tokens of the prompt, {len(given)} of "
                f"the suffix, one that is generated and the last one."
            )
        last = case["eos_token_id" if case.get("add_eos_at_end") else "pad_token_id"]
        kept = {key: value for key, value in case.items() if key not in ("nfe", "nfe_nonempty")}
        ours = super().as_ours(kept) | {
            "mode": "none",
            "gen_length": 0,
            "alg": "entropy_linear",
            "prompt_length": len(prompt),
            "prompt": [[*prompt, *[mask] * gap, *given, last]],
        }
        if case.get("eb_gamma") is not None:
            ours |= {"alg": "eb_confidence", "gamma": case["eb_gamma"]}
        if "output" in case:
            ours |= {"full_output": [[*prompt, *row] for row in case["output"]], "output": [[]]}
        nfe = case.get("nfe_nonempty")
        if "trace" in ours:  # forwards that wrote nothing are left out
            ours["trace"] = [step for step in ours["trace"] if step[3]]
            nfe = len(ours["trace"])
        return ours if nfe is None else {**ours, "nfe": nfe}

    def answer(self, case: Case, result: Case) -> Case:
        whole_rows = result["full_output"]
        output = [row[case["prompt_length"] :] for row in whole_rows]
        return {**super().answer(case, result), "output": output}


RND1 = Rnd1()
