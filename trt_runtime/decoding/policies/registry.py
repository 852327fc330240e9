"""The policies by name. A policy from outside is an entry point of the group `dllm_trt.policies`, or
`--policy my_module:MyPolicy`."""

from __future__ import annotations

from trt_runtime.decoding.policies import adaptive, confidence, remasking, schedules
from trt_runtime.decoding.policies.base import Policy
from trt_runtime.decoding.policies.options import LOOP_OPTIONS, Option, options_of
from trt_runtime.errors import DllmError
from trt_runtime.registry import Registry, of_classes


def _check(policy: type[Policy]) -> None:
    """Check that an option has the same type and default in every policy that takes it. Raises DllmError."""
    for item in options_of(policy):
        item.check(item.default)
        if item.name in LOOP_OPTIONS:
            raise DllmError(
                f"the policy {policy.__module__}:{policy.__name__} declares {item.name}, which is "
                f"already an option of every generation: rename it."
            )
        known = _OPTIONS.setdefault(item.name, item)
        if (known.kind, known.default, known.off) != (item.kind, item.default, item.off):
            raise DllmError(
                f"the policy {policy.__module__}:{policy.__name__} declares {item.name} with the default "
                f"{item.default!r}, but other policies declare it with {known.default!r}: use the same "
                f"default or another name."
            )


_OPTIONS: dict[str, Option] = {}
POLICIES: Registry[type[Policy]] = Registry(
    "policy",
    "dllm_trt.policies",
    "a class that extends Policy",
    of_classes(Policy),
    (
        confidence.Threshold,
        confidence.Factor,
        schedules.Fixed,
        schedules.Linear,
        schedules.EntropyLinear,
        schedules.Origin,
        schedules.Entropy,
        schedules.MaskgitPlus,
        schedules.TopkMargin,
        remasking.Sequential,
        remasking.LowConfidenceStatic,
        remasking.LowConfidenceDynamic,
        adaptive.EntropyBounded,
        adaptive.EntropyBoundedByConfidence,
        adaptive.Margin,
        adaptive.Dynamic,
        adaptive.LocalLeap,
        adaptive.Hierarchy,
        adaptive.Prophet,
        adaptive.SlowFast,
    ),
    _check,
)


def options() -> dict[str, Option]:
    """Every option of every registered policy, by its name."""
    registered = {item.name for policy in POLICIES.all() for item in options_of(policy)}
    return {name: item for name, item in _OPTIONS.items() if name in registered}


def takers(name: str) -> list[str]:
    """The names of the policies that take an option."""
    return [policy.name for policy in POLICIES.all() if name in {item.name for item in options_of(policy)}]
