"""`dllm-trt plan`: memory by backend and layout, time of a forward, disk, and whether a model fits on a
device. What a forward takes: roofline.py; the text: forecast_text.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import ORT_CPU, TENSORRT, ModelFacts, Quantization
from trt_runtime.backends.spec import Layout
from trt_runtime.backends.tensorrt.store import PIECE, SCHEME_FROM
from trt_runtime.errors import DllmError, check_counts
from trt_runtime.machine import forecast_text, step_costs
from trt_runtime.machine.devices import DEVICES, DeviceSpec, find, size_text
from trt_runtime.machine.roofline import (
    MEMORY_LAYOUTS,
    Work,
    _item,
    active_parameters,
    dense_rows,
    flops,
    memory,
    needed_bytes,
    opening_bytes,
    read_bytes,
    runs,
    seconds,
    weight_bytes,
)
from trt_runtime.optional import import_optional
from trt_runtime.system import commands


@dataclass(frozen=True)
class ForecastModel:
    """The model to forecast: its network, and its quantisation, if any."""

    facts: ModelFacts
    quantised: Quantization | None = None


def model_of(
    path: str, dtype: str | None, quantize: str | None = None, device: str | None = None
) -> ForecastModel:
    """The model of an artifact, or of a checkpoint (a directory or hub id; config.json suffices) as an export
    with --quantize would make it. Raises DllmError."""
    if _is_artifact(path):
        manifest = manifests.load(Path(path))
        if quantize is not None:
            source = manifest.source.get("checkpoint", "the checkpoint")
            raise DllmError(
                f"{path}: is an artifact, and --quantize forecasts the export of a checkpoint: give {source}."
            )
        if dtype is not None and manifest.quantization is not None:
            raise DllmError(
                f"{path}: is quantised, so its dtype {manifest.model.dtype} is fixed: remove --dtype."
            )
        return ForecastModel(
            manifest.model if dtype is None else replace(manifest.model, dtype=dtype), manifest.quantization
        )
    install = commands.install("export")
    if quantize is None:
        facts_of = import_optional("export.pipeline", "plan of a checkpoint", install).facts_of_checkpoint
        return ForecastModel(facts_of(path, dtype or ("fp32" if device == "cpu" else "bf16")))
    forecast = import_optional("export.quantize.forecast", "plan of a checkpoint", install)
    of_device = None if device is None else ORT_CPU if device == "cpu" else TENSORRT
    names = forecast.schemes.names_for(of_device)
    if quantize in forecast.schemes.NAMES and quantize not in names:
        raise DllmError(
            f"--quantize {quantize} does not run on {device}: quantise with {' or '.join(names)}, or leave "
            f"--device out."
        )
    return ForecastModel(*forecast.quantised(path, dtype, quantize, of_device if quantize in names else None))


def verdict(facts: ModelFacts, work: Work, device: DeviceSpec, layout: Layout) -> str:
    """A sentence: whether the model fits, and what to change if it does not."""

    def needed(facts: ModelFacts, work: Work) -> int:
        return needed_bytes(facts, work, layout, device)

    free, all_of_it = device.memory - device.reserved, needed(facts, work)
    opening = opening_bytes(facts, layout, device)
    why = (
        ""
        if opening <= PIECE
        else f" (while opening, this TensorRT keeps the engine's whole file in memory besides its weights: "
        f"{size_text(opening)} more)"
    )
    what = f"{layout.name} on {device.name}{why}"
    room = f"{size_text(free)}" + (
        f" (its {size_text(device.memory)} less {size_text(device.reserved)} for driver and system)"
        if device.reserved
        else ""
    )
    if all_of_it <= free:
        return f"fits: {what} needs {size_text(all_of_it)} of {room}."
    short = f"does not fit: {what} needs {size_text(all_of_it)} of {room}"
    fitting = next(
        (words for words, model, less in _smaller(facts, work, device) if needed(model, less) <= free), None
    )
    if fitting:
        return f"{short}; {fitting} would."
    least = needed(facts, replace(work, batch=1, length=min(work.length, _SHORTEST)))
    enough = [
        d.name
        for d in sorted(DEVICES.values(), key=lambda d: d.memory)
        if needed_bytes(facts, work, layout, d) <= d.memory - d.reserved
    ]
    other = f"{', '.join(enough[:3])} would fit it" if enough else "no known device fits it"
    one = ", or one engine instead of two" if layout.copies > 1 else ""
    return f"{short}, and even a canvas of {_SHORTEST} tokens alone needs {size_text(least)}: {other}{one}."


_SHORTEST, _MOST_ROWS = 64, 4096


def _smaller(facts: ModelFacts, work: Work, device: DeviceSpec) -> Iterator[tuple[str, ModelFacts, Work]]:
    """Changes that a user can make, the smallest first."""
    for batch in range(min(work.batch - 1, _MOST_ROWS), 0, -1):
        yield f"a batch of {batch}", facts, replace(work, batch=batch)
    for length in range(work.length - work.length % _SHORTEST, work.length // 4, -_SHORTEST):
        yield f"a batch of 1 and a canvas of {length} tokens", facts, replace(work, batch=1, length=length)
    if facts.dtype == "fp32" and facts.weight_bytes is None and not device.is_cpu:
        yield "DTYPE=bf16 (--dtype bf16)", replace(facts, dtype="bf16"), work
        yield (
            "DTYPE=bf16 (--dtype bf16) and a batch of 1",
            replace(facts, dtype="bf16"),
            replace(work, batch=1),
        )
    length = work.length // 4
    while (length := length // 2) >= _SHORTEST:
        yield f"a batch of 1 and a canvas of {length} tokens", facts, replace(work, batch=1, length=length)


def check(facts: ModelFacts, work: Work) -> None:
    """Raise DllmError for work that the model cannot do."""
    check_counts(work, "batch", "length", "block_length")
    if work.batch > _MOST_ROWS:
        raise DllmError(f"--batch is {str(work.batch)[:20]}, expected at most {_MOST_ROWS}.")
    if work.length > facts.max_length:
        raise DllmError(
            f"--length is {work.length}, but the model's canvas has at most {facts.max_length} tokens."
        )
    if facts.dtype not in contract.DTYPES:
        raise DllmError(f"dtype is {facts.dtype}, expected one of {', '.join(contract.DTYPES)}.")


def report(
    facts: ModelFacts, work: Work, names: list[str], quantised: Quantization | None = None
) -> dict[str, Any]:
    """The forecast as plain data: bytes, seconds and rates (GB/s, TFLOPS) for the named devices."""
    devices = [find(name) for name in names]
    weights, only_cpu = weight_bytes(facts), all(device.is_cpu for device in devices)
    layouts = {d.name: [item for item in MEMORY_LAYOUTS if runs(facts, item, d, quantised)] for d in devices}
    used = [layout for layout in MEMORY_LAYOUTS if any(layout in those for those in layouts.values())]
    engines = None if quantised is not None and quantised.target == ORT_CPU else weights

    def time_of(device: DeviceSpec, rows: int) -> float | None:
        return seconds(facts, work, device, rows=rows, quantised=quantised) if layouts[device.name] else None

    return {
        "model": asdict(facts),
        "work": asdict(work),
        "quantised": None if quantised is None else {"scheme": quantised.scheme, "target": quantised.target},
        "memory": {
            layout.name: {**asdict(parts), "total": parts.total}
            for layout in used
            for parts in [memory(facts, work, layout, on_cpu=only_cpu)]
        },
        "disk": {
            "artifact": weights,
            "artifact, weights linked": None
            if facts.weight_bytes
            else weights - facts.parameters * _item(facts),
            "engines, shared": engines,
            "engines, split": engines and 2 * engines,
        },
        "build_memory": engines and 3 * engines,
        "devices": {
            device.name: {
                "memory": device.memory,
                "prefix_pass_seconds": time_of(device, work.length),
                "refine_step_seconds": time_of(device, min(work.block_length, work.length)),
                "fits": {
                    layout.label: needed_bytes(facts, work, layout, device) <= device.memory - device.reserved
                    for layout in layouts[device.name]
                },
                "opening": {
                    layout.label: opening_bytes(facts, layout, device) for layout in layouts[device.name]
                },
                "estimate": _estimate(facts, work, device) if quantised is None else None,
                "rates": {
                    "measured": device.is_cpu,
                    "bandwidth": device.bandwidth,
                    "fp32": device.rate32,
                    "16 bit": device.rate16,
                    "8 bit": device.rate8,
                },
            }
            for device in devices
        },
        "experts": _experts(facts, work, devices),
        "verdicts": [
            verdict(facts, work, device, layout) for device in devices for layout in layouts[device.name]
        ],
    }


def _estimate(facts: ModelFacts, work: Work, device: DeviceSpec) -> dict[str, Any] | None:
    """What is likely to be measured with TensorRT, above the roofline: a refine step by its parts, and a
    prefix pass."""
    costs = step_costs.refine_step(facts, work, device)
    if costs is None:
        return None
    return {
        "refine_step_seconds": sum(cost.seconds for cost in costs),
        "prefix_pass_seconds": step_costs.prefix_pass(facts, work, device),
        "refine_step": [asdict(cost) for cost in costs],
    }


def _experts(facts: ModelFacts, work: Work, devices: list[DeviceSpec]) -> dict[str, Any] | None:
    """What a mixture of experts costs: parameters that a row passes, bytes that a forward reads by its rows,
    and up to how many rows a dense forward costs no more than reading the weights."""
    if (experts := facts.experts) is None:
        return None
    rows = work.batch * min(work.block_length, work.length), work.batch * work.length
    chosen = replace(facts, experts=replace(experts, is_fused=True))
    return {
        "active_parameters": active_parameters(facts),
        "rows": list(rows),
        "read_bytes": [read_bytes(facts, count) for count in rows],
        "read_bytes_of_the_chosen": [read_bytes(chosen, count) for count in rows],
        "flops": [flops(facts, count, 0, count) for count in rows],
        "flops_of_the_chosen": [flops(chosen, count, 0, count) for count in rows],
        "dense_rows": {device.name: dense_rows(facts, device) for device in devices},
    }


def run(
    path: str,
    *,
    device: str | None,
    batch: int,
    length: int | None,
    block_length: int,
    dtype: str | None,
    as_json: bool,
    quantize: str | None = None,
) -> tuple[str, dict[str, Any]]:
    """The forecast for a model, as text or JSON and as data; without a device, for all known devices that it
    can run on. Raises DllmError."""
    if device is not None:
        find(device)
    model = model_of(path, dtype, quantize, device)
    facts, quantised = model.facts, model.quantised
    work = Work(batch, min(DEFAULT_LENGTH, facts.max_length) if length is None else length, block_length)
    check(facts, work)
    names = [device] if device is not None else ["cpu", *DEVICES]
    if quantised is not None and device is None:
        names = ["cpu"] if quantised.target == ORT_CPU else list(DEVICES)
    is_fused = facts.experts is not None and facts.experts.is_fused
    if is_fused and device is None:
        names = ["cpu"]
    forecast = report(facts, work, names, quantised)
    if is_fused and quantised is None and not forecast["memory"]:
        raise DllmError(
            f"{path}: computes its experts by ONNX Runtime's own operator, which does not run on "
            f"{find(names[0]).name}: give --device cpu, or an artifact exported without --target ort-cpu."
        )
    if quantised is not None and device is not None and not forecast["memory"]:
        raise DllmError(
            f"{quantised.scheme} for {quantised.target} does not run on {find(device).name}: "
            f"{_other(quantised)}."
        )
    if as_json:
        return json.dumps(forecast, indent=1), forecast
    return forecast_text.describe(facts, forecast, verdicts=device is not None), forecast


def _other(quantised: Quantization) -> str:
    """What to give instead, for a quantised model that does not run on a device."""
    if quantised.target == ORT_CPU:
        return "give --device cpu"
    able = [
        name
        for name, device in DEVICES.items()
        if device.compute_capability >= SCHEME_FROM.get(quantised.scheme, 0)
    ]
    return f"give --device {', '.join(able)}, or another scheme"


DEFAULT_LENGTH = 1280


def _is_artifact(path: str) -> bool:
    return (Path(path) / manifests.FILE_NAME).is_file()
