"""How to generate: one frozen set of options, validated once at the edge against the facts of the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from trt_runtime.adaptive import ADAPTIVE
from trt_runtime.errors import DllmError, shown, unknown
from trt_runtime.manifest import CATEGORICAL, Manifest
from trt_runtime.policies import DECAYING, SCHEDULES, Factor, Policy, Threshold
from trt_runtime.sampling import Sampler
from trt_runtime.sequence import Refresh, Suffix

CACHES = ("none", "prefix", "dual")
# policy -> the options that are its own
POLICIES: dict[str, tuple[str, ...]] = {
    "threshold": ("threshold",), "factor": ("factor",), **{name: () for name in SCHEDULES},
    **{name: tuple(field.name for field in fields(policy)) for name, policy in ADAPTIVE.items()},  # type: ignore[arg-type]
}  # fmt: skip
DEFAULT_GEN_LENGTH, DEFAULT_BLOCK_LENGTH = 128, 32
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 100.0
MAX_STEPS = 100_000
MAX_SPECULATE = 256  # every one is a row of the cache
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "int | None": (int, type(None)), "float": (float, int), "str": (str,), "bool": (bool,),
}  # fmt: skip


def configured(given: Mapping[str, Any], manifest: Manifest) -> GenerationConfig:
    """What a user gave by name, over what 'dllm-trt tune' noted in the manifest; not yet resolved. Raises DllmError.

    Whoever chooses a policy, or an option of another policy than the tuned one, gets none of the tuned policy's options.
    """
    tuned = dict(manifest.decoding.tuned)
    if strange := sorted(set(tuned) - {item.name for item in fields(GenerationConfig)}):
        raise DllmError(
            f"the manifest's tuned options have '{strange[0]}', which this version does not know: update dllm-trt, or tune again."
        )
    policy, own = tuned.get("policy", "threshold"), {name for options in POLICIES.values() for name in options}
    if given.get("policy", policy) != policy or (own & set(given)) - set(POLICIES.get(policy, ())):
        tuned = {name: value for name, value in tuned.items() if name != "policy" and name not in own}
    if given.get("cache") == "none":
        tuned = {name: value for name, value in tuned.items() if name not in ("refresh_every", "refresh_window")}
    made = {**tuned, **given}
    check_options(given, made.get("policy", "threshold"))
    return GenerationConfig(**made)


def effective_temperature(asked: float) -> float:
    """Of a client or a task: what is above 0 and too small to draw with is a way to ask for the best token, so it counts as 0."""
    return 0.0 if 0 < asked < MIN_TEMPERATURE else asked


def check_options(given: Collection[str], policy: str) -> None:
    """Raise DllmError for an option of another policy than this one. `given`: names of options that the user gave."""
    for name in sorted({name for own in POLICIES.values() for name in own} & set(given)):
        takers = [other for other, own in POLICIES.items() if name in own]
        if policy in POLICIES and policy not in takers:
            raise DllmError(f"{name} goes with policy {' or '.join(takers)}, got policy '{policy}'.")


@dataclass(frozen=True)
class GenerationConfig:
    """Options of a generation. `None` takes the model's default.

    gen_length: tokens to generate; need not be a multiple of block_length (the last block is then shorter).
    block_length: positions that are unmasked before the next block begins. A Dream with cache 'none' has no blocks by default.
    cache: 'none' (a full pass each time), 'prefix' (keys before the block cached) or 'dual' (before and after it).
    policy: 'threshold' or 'factor' (as many as are sure); 'fixed' (LLaDA's schedule) or 'entropy', 'maskgit_plus',
        'topk_margin', 'origin' (Dream's); 'eb', 'margin', 'dynamic', 'localleap', 'hierarchy', 'prophet', 'slowfast' (adaptive.py).
        `threshold` in (0, 1] is inclusive; `factor` > 0; `gamma` >= 0 is of 'eb', `alpha` in [0, 1] of 'dynamic', `low_threshold` in (0, 1] of
        'localleap', 'hierarchy' and 'slowfast'.
    speculate: steps of a block that one call may verify, with the tokens that one step a call would give; for what draws nothing.
    refresh_every, refresh_window: the cache is rebuilt at the start of every n-th block (0: of the first alone); other blocks begin with a refine
        step over the block before, the block and so many positions on either side.
    suffix, suffix_decay: masks behind the block that a forward sees (None: all): the nearest and the last, or at growing distances.
    steps: of a schedule, forwards for the whole generation, the same number for each block (a remainder is left unused);
        None is one token a forward. With 'threshold' a bound: no more than an even share and what earlier steps left over.
    alg_temp: of 'entropy', 'maskgit_plus' and 'topk_margin': above 0, positions are drawn from softmax(score / alg_temp).
    temperature: 0 proposes the best token; above, proposals are drawn (LLaDA: Gumbel noise; Dream: logits / temperature).
    top_p, top_k: keep the most probable tokens up to a sum of top_p, and the top_k best; at temperature 0 they change nothing but a Dream's
        confidences. Drawing and filtering need logits: of an artifact exported with --head logits, or a backend that has them anyway (ort, torch).
    seed: of all that is drawn; rows of a batch draw from seed, seed + 1, ...
    stop_at_eos: end a row once an end-of-sequence token stands and everything before it is committed.
    hold_back_eos: a proposed end token counts as unsure (confidence 0), so it is committed only when no other candidate is left in the block.
    infill: mask tokens in the prompt are gaps to fill; without it they are refused.
    """

    gen_length: int | None = None
    block_length: int | None = None
    cache: str = "dual"
    policy: str = "threshold"
    threshold: float = 0.9
    factor: float = 1.0
    gamma: float = 0.1
    alpha: float = 0.3
    low_threshold: float = 0.6
    steps: int | None = None
    alg_temp: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    stop_at_eos: bool = True
    infill: bool = False
    speculate: int = 1
    refresh_every: int = 1
    refresh_window: int = 0
    suffix: int | None = None
    suffix_decay: bool = False
    hold_back_eos: bool = False

    def resolved(self, manifest: Manifest) -> GenerationConfig:
        """This configuration with the model's defaults filled in, checked. Raises DllmError for a value out of range."""
        self._check_types()
        defaults = manifest.decoding.defaults
        gen = self.gen_length if self.gen_length is not None else defaults.get("gen_length", DEFAULT_GEN_LENGTH)
        block = self.block_length
        if block is None and (self.cache != "none" or manifest.decoding.blocks_without_cache):
            block = defaults.get("block_length", DEFAULT_BLOCK_LENGTH)
        full = replace(self, gen_length=gen, block_length=block)
        if self.cache not in CACHES:
            raise unknown("cache", self.cache, CACHES)
        if self.policy not in POLICIES:
            raise unknown("policy", self.policy, POLICIES)
        if gen < (0 if self.infill else 1):
            raise DllmError(f"gen_length is {gen}, expected a whole number from {0 if self.infill else 1}.")
        if block is not None and block < 1:
            raise DllmError(f"block_length is {block}, expected a whole number from 1.")
        if not 0 < self.threshold <= 1:
            raise DllmError(
                f"threshold is {self.threshold}, expected above 0 and at most 1 (0.9 is usual; 1 commits one token a forward)."
            )
        self._check_policy()
        self._check_refresh()
        full._check_steps()
        full._check_sampling(manifest.decoding.sampling)
        return full

    def _check_policy(self) -> None:
        if not 0 < self.factor < math.inf:
            raise DllmError(f"factor is {self.factor}, expected above 0 (1.0 is usual; larger commits more at once).")
        if not 0 <= self.gamma < math.inf:
            raise DllmError(f"gamma is {self.gamma}, expected from 0 (0.1 is usual; larger commits more at once).")
        if not 0 <= self.alpha <= 1:
            raise DllmError(f"alpha is {self.alpha}, expected 0 (the threshold stays) to 1.")
        if not 0 < self.low_threshold <= 1:
            raise DllmError(f"low_threshold is {self.low_threshold}, expected above 0 and at most 1.")

    def _check_refresh(self) -> None:
        for name in ("refresh_every", "refresh_window", "suffix"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise DllmError(f"{name} is {value}, expected a whole number from 0.")
        if self.cache == "none" and (self.refresh_every != 1 or self.refresh_window):
            raise DllmError("refresh_every and refresh_window go with a cache: use cache 'dual' or 'prefix', or leave them out.")
        if self.refresh_window and self.refresh_every == 1:
            raise DllmError(
                "refresh_window goes with refresh_every 0 or above 1: with 1 every block begins with the whole canvas."
            )
        if self.suffix_decay and self.suffix is None:
            raise DllmError("suffix_decay goes with suffix: say how many masks behind the block are seen.")

    def _check_sampling(self, sampling: str) -> None:
        if not 1 <= self.speculate <= MAX_SPECULATE:
            raise DllmError(f"speculate is {self.speculate}, expected 1 (which verifies nothing) to {MAX_SPECULATE}.")
        filters = sampling == CATEGORICAL and (self.top_p < 1 or self.top_k is not None)
        if self.speculate > 1 and (self.draws or filters):
            raise DllmError(
                "speculate goes with temperature 0, alg_temp 0, and without top_p, top_k and policy 'origin': leave one of them out."
            )
        for name in ("temperature", "alg_temp"):
            value = getattr(self, name)
            if value and not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
                raise DllmError(f"{name} is {value}, expected 0, or {MIN_TEMPERATURE} to {MAX_TEMPERATURE}.")
        if self.alg_temp > 0 and self.policy not in DECAYING:
            raise DllmError(
                f"alg_temp is {self.alg_temp} with policy '{self.policy}': expected 0, or one of {', '.join(DECAYING)}."
            )
        if not 0 < self.top_p <= 1:
            raise DllmError(f"top_p is {self.top_p}, expected above 0 and at most 1 (1 keeps every token).")
        if self.top_k is not None and self.top_k < 1:
            raise DllmError(f"top_k is {self.top_k}, expected a whole number from 1.")
        if self.seed < 0:
            raise DllmError(f"seed is {self.seed}, expected a whole number from 0.")

    @property
    def draws(self) -> bool:
        """Whether an answer depends on the seed."""
        return self.temperature > 0 or self.alg_temp > 0 or self.policy == "origin"

    def _check_types(self) -> None:
        for item in fields(self):
            value, allowed = getattr(self, item.name), _TYPES[str(item.type)]
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise DllmError(f"{item.name} is {shown(value)}, expected {item.type}.")
            if isinstance(value, int) and abs(value) >= 2**63:
                raise DllmError(f"{item.name} has more than 63 bits, expected a smaller number.")

    def _check_steps(self) -> None:
        if self.steps is None:
            return
        if self.steps > MAX_STEPS:
            raise DllmError(f"steps is {self.steps}, expected up to {MAX_STEPS}.")
        if self.policy not in ("threshold", *SCHEDULES) or self.steps < self._num_blocks:
            raise DllmError(
                f"steps is {self.steps} with policy '{self.policy}' and {self._num_blocks} blocks: expected at least one step a "
                f"block, and 'threshold' or a schedule ({', '.join(SCHEDULES)})."
            )

    @property
    def _num_blocks(self) -> int:
        assert self.gen_length is not None
        return 1 if self.block_length is None else max(1, -(-self.gen_length // self.block_length))

    def make_policy(self) -> Policy:
        """The policy of a resolved configuration."""
        steps = None if self.steps is None else self.steps // self._num_blocks
        if self.policy == "factor":
            return Factor(self.factor)
        if self.policy == "threshold":
            return Threshold(self.threshold, steps)
        if self.policy in ADAPTIVE:
            return ADAPTIVE[self.policy](**{name: getattr(self, name) for name in POLICIES[self.policy]})
        return DECAYING[self.policy](steps, self.alg_temp) if self.policy in DECAYING else SCHEDULES[self.policy](steps)

    @property
    def refresh(self) -> Refresh:
        """When the cache is rebuilt."""
        return Refresh(self.refresh_every, self.refresh_window)

    @property
    def seen_suffix(self) -> Suffix:
        """What a forward sees behind the block."""
        return Suffix(self.suffix, self.suffix_decay)

    def make_sampler(self, manifest: Manifest) -> Sampler:
        """How proposals are made, for the model of `manifest`."""
        return Sampler(manifest.decoding.sampling, self.temperature, self.top_p, self.top_k)
