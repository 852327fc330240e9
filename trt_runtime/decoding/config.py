"""The options of a generation: one frozen set, validated once against the facts of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from trt_runtime.artifact.manifest import CATEGORICAL, DecodingFacts, Manifest
from trt_runtime.decoding.attention_options import check_attention, may_fuse_stores
from trt_runtime.decoding.cache_plan import CachePlan, DualCache, Refresh, Suffix
from trt_runtime.decoding.editing import Editing
from trt_runtime.decoding.plans import PLANS, BlockCache
from trt_runtime.decoding.policies import registry
from trt_runtime.decoding.policies.base import Policy
from trt_runtime.decoding.policies.options import Value, just_above, options_of
from trt_runtime.decoding.policies.registry import POLICIES
from trt_runtime.decoding.policies.schedules import MAX_TEMPERATURE, MIN_TEMPERATURE
from trt_runtime.decoding.sampling import Sampler
from trt_runtime.errors import DllmError, shown

DEFAULT_GEN_LENGTH, DEFAULT_BLOCK_LENGTH = 128, 32
MAX_STEPS = 100_000
MAX_SPECULATE = 256  # each occupies a row of the cache
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "int | None": (int, type(None)), "float": (float, int), "str": (str,), "bool": (bool,),
    "float | None": (float, int, type(None)), "str | None": (str, type(None)),
    "bool | None": (bool, type(None)),
}  # fmt: skip


def option_names() -> list[str]:
    """Every option of a generation by name, including those of the registered policies."""
    return [
        *(item.name for item in fields(GenerationConfig) if item.name != "policy_options"),
        *registry.options(),
    ]


def configured(given: Mapping[str, Any], manifest: Manifest) -> GenerationConfig:
    """The options that a user gave by name, over those that 'dllm-trt tune' recorded in the manifest; not yet
    resolved. Raises DllmError. If the user chooses a policy, or an option of another policy than the tuned
    one, the tuned policy's options do not apply."""
    tuned = dict(manifest.decoding.tuned)
    if isinstance(given.get("policy"), str):
        POLICIES.find(given["policy"])  # a policy in a module of the user's brings its options with it
    if strange := sorted(set(tuned) - set(option_names())):
        raise DllmError(
            f"the manifest's tuned options contain '{strange[0]}', which this version does not support: "
            f"update dllm-trt, or tune again."
        )
    policy, of_policies = tuned.get("policy", "threshold"), set(registry.options())
    own = {item.name for item in options_of(POLICIES.installed(policy))}
    if given.get("policy", policy) != policy or (_active(given) & of_policies) - own:
        tuned = {name: value for name, value in tuned.items() if name != "policy" and name not in of_policies}
    if isinstance(given.get("cache"), str) and not PLANS.find(given["cache"]).keeps_cache:
        tuned = {
            name: value for name, value in tuned.items() if name not in ("refresh_every", "refresh_window")
        }
    options = {**tuned, **given}
    check_options(given, options.get("policy", "threshold"))
    return GenerationConfig(**options)


def effective_temperature(asked: float) -> float:
    """The temperature that a client or a task asked for; a value above 0 that is too small to sample with
    becomes 0."""
    return 0.0 if 0 < asked < MIN_TEMPERATURE else asked


def check_options(given: Mapping[str, Any], policy: str) -> None:
    """Raise DllmError for an option of another policy than this one. given: the options that the user
    gave."""
    for name in sorted(_active(given) & set(registry.options())):
        takers = registry.takers(name)
        if name not in {item.name for item in options_of(POLICIES.find(policy))}:
            raise DllmError(f"{name} needs policy {' or '.join(takers)}, got policy '{policy}'.")


def _active(given: Mapping[str, Any]) -> set[str]:
    """The given options that have an effect: alg_temp 0, for example, has none."""
    known = registry.options()
    return {
        name
        for name, value in given.items()
        if name not in known or known[name].off is None or known[name].off != value
    }


@dataclass(frozen=True, init=False)
class GenerationConfig:
    """Options of a generation. `None` takes the model's default.

    gen_length: tokens to generate; need not be a multiple of block_length (the last block is then shorter).
    block_length: positions that are unmasked before the next block begins. A Dream with cache 'none' has no
        blocks by default. With block-causal attention it is also what a position sees: the default is the
        training's.
    cache: with full attention 'none' (a full pass each time), 'prefix' (keys before the block are cached) or
        'dual' (keys before and after it; the default); with block-causal attention 'none', 'block' (exact;
        the default) or 'block_dual' (steps compute only the small block).
    policy: which masked positions a forward commits, by the name of a policy (policies/registry.py), or
        'module:Class'. Its own options are keyword arguments too (`threshold=0.8`); the policy declares them.
    speculate: steps of a block that one call may verify; the tokens are the same as with one step per call.
        Not with random draws.
    refresh_every, refresh_window: the cache is rebuilt at the start of every n-th block (0: only of the
        first); other blocks begin with a refine step over the previous block, the block, and refresh_window
        positions before and after the two.
    suffix, suffix_decay: how many masks after the block a forward sees (None: all): the nearest and the last,
        or with suffix_decay those at growing distances.
    steps: forwards of a schedule for the whole generation, the same number for each block (a remainder is
        unused); None is one token per forward. With 'threshold' it is a bound: a step commits at most an even
        share plus what earlier steps left over.
    temperature: 0 proposes the best token; above, proposals are drawn (LLaDA: Gumbel noise; Dream: logits /
    temperature).
    top_p, top_k: keep the most probable tokens up to a sum of top_p, and the top_k best; at temperature 0
        they change only the confidences of a Dream. Sampling and filtering need logits: from an artifact
        exported with --head logits, or from a backend that always returns them (ort, torch).
    seed: of all random draws; the rows of a batch use seed, seed + 1, ...
    stop_at_eos: end a row once an end-of-sequence token and everything before it are committed.
    hold_back_eos: a proposed end token counts as uncertain (confidence 0), so it is committed only when the
        block has no other candidate left.
    infill: mask tokens in the prompt are gaps to fill; without it they are refused. Not with block-causal
        attention, where a gap would not see what is right of its block.
    small_block: of block-causal attention: positions of a block that are decoded first (None: the model's).
    fuse_stores: of block-causal attention with cache 'block': whether a finished block is stored by the first
        step of the next, one forward fewer for each block. Exact. None: wherever the model allows it; models
        whose next block begins with a token of the store do not.
    edit_threshold, edit_steps: of block-causal attention with exact caches: above which confidence of another
        token a committed one of the running block is replaced (None: never), and how many forwards of a
        block may only look for edits (editing.py).
    """

    gen_length: int | None
    block_length: int | None
    cache: str | None
    policy: str
    steps: int | None
    temperature: float
    top_p: float
    top_k: int | None
    seed: int
    stop_at_eos: bool
    infill: bool
    speculate: int
    refresh_every: int
    refresh_window: int
    suffix: int | None
    suffix_decay: bool
    hold_back_eos: bool
    small_block: int | None
    fuse_stores: bool | None
    edit_threshold: float | None
    edit_steps: int
    policy_options: Mapping[str, Value] = field(hash=False)

    def __init__(  # noqa: PLR0913 # the one place with the defaults
        self,
        gen_length: int | None = None,
        block_length: int | None = None,
        cache: str | None = None,
        policy: str = "threshold",
        *,
        steps: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        stop_at_eos: bool = True,
        infill: bool = False,
        speculate: int = 1,
        refresh_every: int = 1,
        refresh_window: int = 0,
        suffix: int | None = None,
        suffix_decay: bool = False,
        hold_back_eos: bool = False,
        small_block: int | None = None,
        fuse_stores: bool | None = None,
        edit_threshold: float | None = None,
        edit_steps: int = 16,
        policy_options: Mapping[str, Value] | None = None,
        **options_by_name: Value,
    ) -> None:
        """options_by_name: options of policies, such as `threshold=0.8`. Raises TypeError for a name that no
        policy declares."""
        if isinstance(policy, str) and ":" in policy:
            POLICIES.find(policy)  # so that its options are known
        known, of_policies = registry.options(), {**(policy_options or {}), **options_by_name}
        if strange := sorted(set(of_policies) - set(known)):
            raise TypeError(f"GenerationConfig has no option '{strange[0]}', nor has any policy.")
        # default values are dropped, so configurations that decode alike are equal
        own = {
            name: value
            for name, value in of_policies.items()
            if type(value) is bool or value != known[name].default
        }
        values = {**locals(), "policy_options": own}
        for item in fields(self):
            object.__setattr__(self, item.name, values[item.name])

    def __getattr__(self, name: str) -> Value:
        """An option of a policy, such as `config.threshold`: the given value, or its default."""
        known = {} if name.startswith("_") else registry.options()
        if name not in known:
            raise AttributeError(f"GenerationConfig has no option '{name}'")
        return self.policy_options.get(name, known[name].default)

    def resolved(self, manifest: Manifest) -> GenerationConfig:
        """This configuration with the model's defaults filled in, checked. Raises DllmError for a value out
        of range."""
        self._check_types()
        facts, defaults = manifest.decoding, manifest.decoding.defaults
        if not facts.is_mask_known:
            raise DllmError(
                "nothing said which token is the mask when this artifact was exported, so it can only replay "
                "recorded cases: export it again with MASK_TOKEN=id (--mask-token)."
            )
        cache = self.cache or (BlockCache if facts.is_block_causal else DualCache).name
        plan = PLANS.find(cache)
        gen = (
            self.gen_length if self.gen_length is not None else defaults.get("gen_length", DEFAULT_GEN_LENGTH)
        )
        block = self.block_length
        if block is None and (plan.keeps_cache or facts.blocks_without_cache):
            block = defaults.get("block_length", facts.block_length or DEFAULT_BLOCK_LENGTH)
        full = replace(self, gen_length=gen, block_length=block, cache=cache)
        check_attention(full, facts, plan)
        self._check_policy()
        if gen < (0 if self.infill else 1):
            raise DllmError(f"gen_length is {gen}, expected a whole number from {0 if self.infill else 1}.")
        if block is not None and block < 1:
            raise DllmError(f"block_length is {block}, expected a whole number from 1.")
        full._check_refresh(plan)
        full._check_steps()
        full._check_sampling(manifest.decoding.sampling)
        return full

    def _check_policy(self) -> None:
        policy = POLICIES.find(self.policy)
        known = registry.options()
        for name, value in self.policy_options.items():
            known[name].check(value)
        for item in options_of(policy):
            item.check(
                getattr(self, item.name)
            )  # its range may differ from that of another policy's option of the same name
        for name, value in self.policy_options.items():
            off = known[name].off
            if off is not None and value != off and name not in {item.name for item in options_of(policy)}:
                raise DllmError(
                    f"{name} is {value} with policy '{self.policy}': expected {off:g}, or one of "
                    f"{', '.join(registry.takers(name))}."
                )

    def _check_refresh(self, plan: type[CachePlan]) -> None:
        for name in ("refresh_every", "refresh_window", "suffix"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise DllmError(f"{name} is {value}, expected a whole number from 0.")
        if not plan.keeps_cache and (self.refresh_every != 1 or self.refresh_window):
            raise DllmError(
                "refresh_every and refresh_window need a cache: use cache 'dual' or 'prefix', or remove them."
            )
        if self.refresh_window and self.refresh_every == 1:
            raise DllmError(
                "refresh_window needs refresh_every 0 or above 1: with 1, every block begins with a pass "
                "over the whole canvas."
            )
        if self.suffix_decay and self.suffix is None:
            raise DllmError(
                "suffix_decay needs suffix, the number of masks after the block that a forward sees."
            )

    def _check_sampling(self, sampling: str) -> None:
        if not 1 <= self.speculate <= MAX_SPECULATE:
            raise DllmError(f"speculate is {self.speculate}, expected 1 (no speculation) to {MAX_SPECULATE}.")
        filters = sampling == CATEGORICAL and (self.top_p < 1 or self.top_k is not None)
        if self.speculate > 1 and (self.draws or filters):
            raise DllmError(
                "speculate needs temperature 0 and alg_temp 0, and cannot be combined with top_p, top_k or "
                "policy 'origin': remove speculate or these options."
            )
        if self.temperature and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise DllmError(
                f"temperature is {self.temperature}, expected 0, or {MIN_TEMPERATURE} to {MAX_TEMPERATURE}."
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
        return self.temperature > 0 or POLICIES.find(self.policy).made(self.policy_options).draws

    def _check_types(self) -> None:
        for item in fields(self):
            if item.name == "policy_options":
                continue
            value, allowed = getattr(self, item.name), _TYPES[str(item.type)]
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise DllmError(f"{item.name} is {shown(value)}, expected {item.type}.")
            if isinstance(value, int) and abs(value) >= 2**63:
                raise DllmError(f"{item.name} is too large: expected a number below 2^63.")

    def _check_steps(self) -> None:
        if self.steps is None:
            return
        if self.steps > MAX_STEPS:
            raise DllmError(f"steps is {self.steps}, expected up to {MAX_STEPS}.")
        if not POLICIES.find(self.policy).takes_steps() or self.steps < self._num_blocks:
            takers = [policy.name for policy in POLICIES.all() if policy.takes_steps()]
            raise DllmError(
                f"steps is {self.steps} with policy '{self.policy}' and {self._num_blocks} blocks: expected "
                f"at least one step per block, and one of {', '.join(takers)}."
            )

    @property
    def _num_blocks(self) -> int:
        assert self.gen_length is not None
        return 1 if self.block_length is None else max(1, -(-self.gen_length // self.block_length))

    def make_policy(self, *, is_threshold_strict: bool = False) -> Policy:
        """The policy of a resolved configuration."""
        policy, options = POLICIES.find(self.policy), self.policy_options
        steps = None if self.steps is None else policy.steps_of_block(self.steps, self._num_blocks)
        if is_threshold_strict:
            options = {**options, "threshold": just_above(float(self.threshold))}
        return policy.made(options, steps)

    def make_editing(self) -> Editing | None:
        """Whether and how committed tokens are edited."""
        return None if self.edit_threshold is None else Editing(self.edit_threshold, self.edit_steps)

    def make_plan(self, facts: DecodingFacts) -> CachePlan:
        """The cache plan of a resolved configuration, for a model with these facts."""
        assert self.cache is not None
        plan = PLANS.find(self.cache)
        fuses = may_fuse_stores(plan, facts) if self.fuse_stores is None else self.fuse_stores
        refresh, suffix = (
            Refresh(self.refresh_every, self.refresh_window),
            Suffix(self.suffix, self.suffix_decay),
        )
        return plan(refresh, suffix, fuses)

    def make_sampler(self, manifest: Manifest) -> Sampler:
        """The sampler that makes proposals, for the model of `manifest`."""
        return Sampler(manifest.decoding.sampling, self.temperature, self.top_p, self.top_k)
