"""A forecast (forecast.py) as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trt_runtime.artifact.manifest import ExpertFacts, ModelFacts
from trt_runtime.machine.devices import size_text

FORECAST = (
    "times are lower bounds from the devices' rates: published rates for GPUs ('make gpu-report' measures "
    "a GPU)"
)


def describe(facts: ModelFacts, forecast: dict[str, Any], *, verdicts: bool) -> str:
    """A forecast as text."""
    work, disk, how = forecast["work"], forecast["disk"], forecast["quantised"]
    kind = f", {how['scheme']} for {how['target']}" if how else ""
    lines = [
        f"{facts.family}, {_count(facts.parameters)} parameters, {facts.dtype}{kind}; "
        f"batch {work['batch']}, canvas {work['length']}, block {work['block_length']}",
        "",
        f"{'memory':30}{'weights':>12}{'cache':>12}{'activations':>13}{'statistics':>12}{'total':>12}",
    ]
    for name, parts in forecast["memory"].items():
        lines.append(
            f"{name:30}{size_text(parts['weights']):>12}{size_text(parts['cache']):>12}"
            f"{size_text(parts['activations']):>13}"
            f"{size_text(parts['statistics']):>12}{size_text(parts['total']):>12}"
        )
    linked = disk["artifact, weights linked"]
    lines += [
        "",
        f"disk: artifact {size_text(disk['artifact'])} "
        f"({'quantised' if linked is None else f'{size_text(linked)} with --weights link'})",
    ]
    if forecast["build_memory"] is not None:
        lines[-1] += (
            f", engines {size_text(disk['engines, shared'])} (shared) or "
            f"{size_text(disk['engines, split'])} (split); building an engine takes "
            f"about three times the weights, {size_text(forecast['build_memory'])}, of memory"
        )
    lines += [
        "",
        f"{'forecast, at the roofline':26}{'memory':>12}{'prefix pass ms':>16}{'refine step ms':>16}  fits",
    ]
    for name, row in forecast["devices"].items():
        fitting = [label for label, fits in row["fits"].items() if fits]
        lines.append(
            f"{name:26}{size_text(row['memory']):>12}{_ms(row['prefix_pass_seconds']):>16}"
            f"{_ms(row['refine_step_seconds']):>16}"
            f"  {', '.join(fitting) or 'nothing'}"
        )
    if verdicts and len(forecast["devices"]) == 1:
        lines += _parts(*next(iter(forecast["devices"].items())))
    if forecast["experts"] is not None and facts.experts is not None:
        lines += ["", *_experts(facts.experts, forecast["experts"], work)]
    lines += ["", *(forecast["verdicts"] if verdicts else []), f"({FORECAST}{_measured(forecast)})"]
    return "\n".join(lines)


def _parts(name: str, row: dict[str, Any]) -> Iterator[str]:
    """Where the time of a refine step is likely to go, and what would take it away."""
    if (estimate := row["estimate"]) is None:
        return
    whole = estimate["refine_step_seconds"]
    yield ""
    yield (
        f"estimate for {name} with TensorRT, which is slower than the roofline: a prefix pass "
        f"{_ms(estimate['prefix_pass_seconds'])} ms, a refine step {_ms(whole)} ms:"
    )
    for cost in estimate["refine_step"]:
        line = f"  {cost['name']:40}{_ms(cost['seconds']):>7} ms {100 * cost['seconds'] / whole:>4.0f} %"
        if cost["mend"]:
            line += f"   {cost['mend']} would leave {_ms(cost['after'])} ms"
        yield line


def _experts(experts: ExpertFacts, costs: dict[str, Any], work: dict[str, int]) -> Iterator[str]:
    """What a mixture of experts costs, in words."""
    yield (
        f"experts: {experts.top_k} of {experts.num_experts} for each row; a row passes "
        f"{_count(costs['active_parameters'])} parameters"
    )
    for number, kind in enumerate(("refine step", "prefix pass")):
        read, chosen = costs["read_bytes"][number], costs["read_bytes_of_the_chosen"][number]
        ratio = costs["flops"][number] / costs["flops_of_the_chosen"][number]
        if experts.is_fused:
            yield f"  a {kind} of {costs['rows'][number]} rows reads {size_text(chosen)} of weights"
            continue
        yield (
            f"  a {kind} of {costs['rows'][number]} rows reads {size_text(read)} of weights (the chosen "
            f"experts alone: {size_text(chosen)}) and multiplies {ratio:.1f} times as much as they need"
        )
    if experts.is_fused:
        return
    fine = {name: rows for name, rows in costs["dense_rows"].items() if rows is not None}
    ordered = [f"{rows} on {name}" for name, rows in sorted(fine.items(), key=lambda item: item[1])]
    limits = ", ".join(ordered) if len(ordered) < 4 else f"{ordered[0]} to {ordered[-1]}"
    if limits:
        yield (
            f"  the dense graph is fine up to this many rows of a forward, where its arithmetic takes as "
            f"long as reading the weights: {limits}"
        )
    if any(costs["rows"][1] > rows for rows in fine.values()) and work["length"] > 1:
        yield (
            "  longer passes cost more than the chosen experts would; on a CPU export with --target ort-cpu, "
            "with TensorRT build with --experts-plugin"
        )


def _measured(forecast: dict[str, Any]) -> str:
    """What the forecast for this machine's CPU is based on."""
    rates = next(
        (
            row["rates"]
            for row in forecast["devices"].values()
            if row["rates"]["measured"] and row["rates"]["fp32"]
        ),
        None,
    )
    if rates is None:
        return ""
    eight = (
        f", 8-bit products estimated at {rates['8 bit'] / rates['fp32']:.1f} times that"
        if forecast["quantised"]
        else ""
    )
    return (
        f"; for this CPU, measured just now: copies at {rates['bandwidth']:.0f} GB/s, products at "
        f"{1000 * rates['fp32']:.0f} GFLOP/s in fp32{eight} ('dllm-trt bench' measures an artifact)"
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def _ms(time: float | None) -> str:
    return "-" if time is None else f"{1000 * time:.2f}" if time >= 1e-5 else f"{1000 * time:.1g}"
