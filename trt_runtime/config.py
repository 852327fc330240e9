"""How to generate: one frozen set of options, validated once at the edge against the facts of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from trt_runtime.errors import DllmError, unknown
from trt_runtime.manifest import Manifest
from trt_runtime.policies import Factor, Fixed, Policy, Threshold

CACHES = ("none", "prefix", "dual")
POLICIES = ("factor", "fixed", "threshold")
DEFAULT_GEN_LENGTH, DEFAULT_BLOCK_LENGTH = 128, 32
MAX_TEMPERATURE = 100.0
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "int | None": (int, type(None)), "float": (float, int), "str": (str,), "bool": (bool,),
}  # fmt: skip


@dataclass(frozen=True)
class GenerationConfig:
    """Options of a generation. `None` takes the model's default.

    gen_length: tokens to generate; need not be a multiple of block_length (the last block is then shorter).
    block_length: positions that are unmasked before the next block begins.
    cache: 'none' (a full pass each time), 'prefix' (keys before the block cached) or 'dual' (before and after it).
    policy: 'threshold', 'factor' or 'fixed'. `threshold` in (0, 1] is inclusive; `factor` > 0.
    steps: with 'fixed', forwards for the whole generation, the same number for each block (a remainder is left unused);
        None is one token a forward.
    temperature: 0 proposes the argmax; above, Gumbel noise is added to the logits (needs an artifact with --head logits).
    seed: of that noise; rows of a batch draw from seed, seed + 1, ...
    stop_at_eos: end a row once an end-of-sequence token stands and everything before it is committed.
    infill: mask tokens in the prompt are gaps to fill; without it they are refused.
    """

    gen_length: int | None = None
    block_length: int | None = None
    cache: str = "dual"
    policy: str = "threshold"
    threshold: float = 0.9
    factor: float = 1.0
    steps: int | None = None
    temperature: float = 0.0
    seed: int = 0
    stop_at_eos: bool = True
    infill: bool = False

    def resolved(self, manifest: Manifest) -> GenerationConfig:
        """This configuration with the model's defaults filled in, checked. Raises DllmError for a value out of range."""
        self._check_types()
        defaults = manifest.decoding.defaults
        gen = self.gen_length if self.gen_length is not None else defaults.get("gen_length", DEFAULT_GEN_LENGTH)
        block = self.block_length if self.block_length is not None else defaults.get("block_length", DEFAULT_BLOCK_LENGTH)
        full = replace(self, gen_length=gen, block_length=block)
        if self.cache not in CACHES:
            raise unknown("cache", self.cache, CACHES)
        if self.policy not in POLICIES:
            raise unknown("policy", self.policy, POLICIES)
        if gen < (0 if self.infill else 1):
            raise DllmError(f"gen_length is {gen}, expected a whole number from {0 if self.infill else 1}.")
        if block < 1:
            raise DllmError(f"block_length is {block}, expected a whole number from 1.")
        if not 0 < self.threshold <= 1:
            raise DllmError(
                f"threshold is {self.threshold}, expected above 0 and at most 1 (0.9 is usual; 1 commits one token a forward)."
            )
        if not 0 < self.factor < math.inf:
            raise DllmError(f"factor is {self.factor}, expected above 0 (1.0 is usual; larger commits more at once).")
        full._check_steps()
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise DllmError(f"temperature is {self.temperature}, expected 0 to {MAX_TEMPERATURE}.")
        if self.seed < 0:
            raise DllmError(f"seed is {self.seed}, expected a whole number from 0.")
        if self.temperature > 0 and manifest.head != "logits":
            raise DllmError(
                f"temperature is {self.temperature}, but this artifact returns statistics only: use temperature 0, "
                "or export it again with HEAD=logits (--head logits)."
            )
        return full

    def _check_types(self) -> None:
        for item in fields(self):
            value, allowed = getattr(self, item.name), _TYPES[str(item.type)]
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise DllmError(f"{item.name} is {value!r}, expected {item.type}.")

    def _check_steps(self) -> None:
        if self.steps is None:
            return
        if self.policy != "fixed" or self.steps < self._num_blocks:
            raise DllmError(
                f"steps is {self.steps} with policy '{self.policy}' and {self._num_blocks} blocks: expected policy 'fixed' and "
                "at least one step a block."
            )

    @property
    def _num_blocks(self) -> int:
        assert self.gen_length is not None and self.block_length is not None
        return max(1, -(-self.gen_length // self.block_length))

    def make_policy(self) -> Policy:
        """The policy of a resolved configuration."""
        if self.policy == "fixed":
            assert self.block_length is not None
            return Fixed(self.block_length if self.steps is None else self.steps // self._num_blocks)
        return Factor(self.factor) if self.policy == "factor" else Threshold(self.threshold)
