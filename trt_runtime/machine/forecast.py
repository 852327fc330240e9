"""Forecasts before work: memory by backend and layout, time of a forward at the roofline, disk; and whether
it fits.

Shape letters: B batch, S rows of the window, R rows asked for, C capacity, H KV heads, N heads, D head_dim, V
vocabulary.

Time: a forward takes its multiplications at the device's dense rate, or reading weights and cache at its
bandwidth, whichever is longer; measured times are longer still. A GPU's rates are published ones, this
machine's CPU is measured (devices.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trt_runtime import backends
from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import ORT_CPU, TENSORRT, ModelFacts, Quantization
from trt_runtime.backends.spec import Layout
from trt_runtime.backends.tensorrt.store import PIECE, SCHEME_FROM
from trt_runtime.errors import DllmError, check_counts
from trt_runtime.machine import forecast_text
from trt_runtime.machine.devices import DEVICES, DeviceSpec, find, size_text
from trt_runtime.optional import import_optional
from trt_runtime.system import commands


@dataclass(frozen=True)
class Work:
    """What is to be run: rows at a time, the longest canvas in tokens, and the block."""

    batch: int
    length: int
    block_length: int


MEMORY_LAYOUTS = tuple(layout for name in backends.names() for layout in backends.BACKENDS.find(name).layouts)
# ONNX Runtime computes fp16 on a CPU in fp32, from copies that it makes: bytes a parameter measured for 63
# and 126 M parameters
_CPU_16BIT = 4.7


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes: weights (with the head's float32 copy), the cache of all rows, the largest activations, logits
    and statistics."""

    weights: int
    cache: int
    activations: int
    statistics: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations + self.statistics


def weight_bytes(facts: ModelFacts) -> int:
    """Weights and rotation tables."""
    if facts.weight_bytes is not None:
        return facts.weight_bytes
    tables = 2 * facts.max_length * (facts.head_dim // 2) * 4
    return facts.parameters * _item(facts) + tables


def cache_bytes(facts: ModelFacts, work: Work) -> int:
    """Keys and values of every layer: `length` rows for each of `batch` slots."""
    return (
        2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * _item(facts) * work.batch * work.length
    )


def runs(
    facts: ModelFacts, layout: Layout, device: DeviceSpec, quantised: Quantization | None = None
) -> bool:
    """Whether a layout exists on a device: on a CPU there is no TensorRT, and ONNX Runtime computes no bf16.
    What is quantised runs on what it was quantised for."""
    if quantised is not None:
        has_arithmetic = device.is_cpu or device.compute_capability >= SCHEME_FROM.get(quantised.scheme, 0)
        return has_arithmetic and layout.runs_quantized(quantised, on_cpu=device.is_cpu)
    return not device.is_cpu or (layout.on_cpu and not (layout.widens and facts.dtype == "bf16"))


def memory(facts: ModelFacts, work: Work, layout: Layout, *, on_cpu: bool = False) -> MemoryNeed:
    """Memory at the peak, which is a prefix pass."""
    rows = work.batch * work.length
    # the graph's head multiplies in float32, for which backends keep a converted copy
    head = facts.vocab_size * facts.hidden_size * 4 if layout.wide_head and _item(facts) == 2 else 0
    # the residual stream and its norm; gate, up and their product
    activations = rows * (2 * facts.hidden_size + 3 * facts.intermediate_size) * _item(facts)
    if layout.scores:
        activations += work.batch * facts.num_heads * work.length * work.length * 4
    statistics = (
        3 * work.batch * min(work.block_length, work.length) * facts.vocab_size * 4
    )  # logits, shifted, exponentials
    weights = layout.copies * (weight_bytes(facts) + head)
    if on_cpu and layout.widens and _item(facts) == 2:
        weights = int(_CPU_16BIT * facts.parameters) + weight_bytes(facts) - 2 * facts.parameters
    return MemoryNeed(weights, cache_bytes(facts, work), activations, statistics)


def opening_bytes(facts: ModelFacts, layout: Layout, device: DeviceSpec) -> int:
    """Host memory that opening an engine takes beside its weights on the device, where both are one memory:
    the engine's file, in pieces (from TensorRT 10.7 on) or whole."""
    if not device.shared or not layout.reads_whole:
        return 0
    return memory(facts, Work(1, 1, 1), layout).weights // layout.copies if device.reads_whole else PIECE


def needed_bytes(facts: ModelFacts, work: Work, layout: Layout, device: DeviceSpec) -> int:
    """Memory at the peak on a device: while it opens the model, or in a prefix pass, whichever takes more."""
    parts = memory(facts, work, layout, on_cpu=device.is_cpu)
    return max(parts.total, parts.weights + opening_bytes(facts, layout, device))


def flops(facts: ModelFacts, rows: int, keys: int, asked: int) -> float:
    """Of one row of the batch: linear layers over `rows`, attention of `rows` to `keys`, and the last layer
    and head on `asked`."""
    hidden, wide = facts.hidden_size, facts.num_heads * facts.head_dim
    key_value = 2 * hidden * facts.num_kv_heads * facts.head_dim
    pruned = 2 * hidden * wide + 3 * hidden * facts.intermediate_size  # q, o and the MLP
    layers = 2 * rows * facts.num_layers * key_value + 2 * pruned * (rows * (facts.num_layers - 1) + asked)
    attention = 4 * wide * keys * (rows * (facts.num_layers - 1) + asked)
    return float(layers + attention + 2 * asked * hidden * facts.vocab_size)


def seconds(
    facts: ModelFacts, work: Work, device: DeviceSpec, *, rows: int, quantised: Quantization | None = None
) -> float | None:
    """The roofline time of a forward over windows of `rows`; None where the device's rates are not known.

    On a CPU fp16 is computed in fp32, and 8-bit products (of 4-bit weights as well) at a rate of their own;
    attention stays in fp32. On a GPU quantised weights are read as they are stored and, cautiously,
    multiplied at the 16-bit rate.
    """
    in_fp32 = facts.dtype == "fp32" or (device.is_cpu and facts.dtype == "fp16")
    rate = device.rate32 if in_fp32 else device.rate16
    of_layers = device.rate8 if quantised is not None and device.is_cpu else rate
    if rate is None or of_layers is None or device.bandwidth is None:
        return None
    asked = min(work.block_length, rows)
    layers = flops(facts, rows, 0, asked)
    attention = flops(facts, rows, work.length, asked) - layers
    multiply = work.batch * (layers / of_layers + attention / rate) / 1e12
    return max(
        multiply,
        (_read_bytes(facts, 4 if in_fp32 else _item(facts)) + cache_bytes(facts, work))
        / (device.bandwidth * 1e9),
    )


def _read_bytes(facts: ModelFacts, item: int) -> int:
    """Weights that a forward reads, `item` bytes each where they are not quantised: of the embedding a few
    rows alone."""
    head = facts.vocab_size * facts.hidden_size
    if (
        facts.weight_bytes is not None
        # a tied head is stored beside the embedding, whose numbers have 16 bits (or 32, then this is too
        # much)
    ):
        return facts.weight_bytes - 2 * head
    return (facts.parameters - (0 if facts.tied_head else head)) * item + (
        4 - item
    ) * head  # the head multiplies in float32


@dataclass(frozen=True)
class ForecastModel:
    """What is forecast: the network, and how it is quantised, if it is."""

    facts: ModelFacts
    quantised: Quantization | None = None


def model_of(
    path: str, dtype: str | None, quantize: str | None = None, device: str | None = None
) -> ForecastModel:
    """The model of an artifact, or of a checkpoint (a directory or hub id, of which config.json suffices), as
    an export quantises it. Raises DllmError."""
    if _is_artifact(path):
        manifest = manifests.load(Path(path))
        if quantize is not None:
            source = manifest.source.get("checkpoint", "the checkpoint")
            raise DllmError(
                f"{path}: --quantize forecasts the export of a checkpoint, this is an artifact: give "
                f"{source}."
            )
        if dtype is not None and manifest.quantization is not None:
            raise DllmError(
                f"{path}: is quantised, and has no other dtype than {manifest.model.dtype}: leave --dtype "
                f"out."
            )
        return ForecastModel(
            manifest.model if dtype is None else replace(manifest.model, dtype=dtype), manifest.quantization
        )
    mend = commands.install("export")
    if quantize is None:
        facts_of = import_optional("export.pipeline", "plan of a checkpoint", mend).facts_of_checkpoint
        return ForecastModel(facts_of(path, dtype or ("fp32" if device == "cpu" else "bf16")))
    forecast = import_optional("export.quantize.forecast", "plan of a checkpoint", mend)
    of_device = None if device is None else ORT_CPU if device == "cpu" else TENSORRT
    names = forecast.schemes.names_for(of_device)
    if quantize in forecast.schemes.NAMES and quantize not in names:
        raise DllmError(
            f"--quantize {quantize} does not run on {device}: quantise with {' or '.join(names)}, or leave "
            f"--device out."
        )
    return ForecastModel(*forecast.quantised(path, dtype, quantize, of_device if quantize in names else None))


def verdict(facts: ModelFacts, work: Work, device: DeviceSpec, layout: Layout) -> str:
    """A sentence: whether it fits, and what to change if it does not."""

    def needed(facts: ModelFacts, work: Work) -> int:
        return needed_bytes(facts, work, layout, device)

    free, all_of_it = device.memory - device.reserved, needed(facts, work)
    opening = opening_bytes(facts, layout, device)
    why = (
        ""
        if opening <= PIECE
        else f" (opening it: this TensorRT holds the engine's file whole beside its weights, "
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
    other = (
        f"of the table, {', '.join(enough[:3])} would do" if enough else "no device of the table is enough"
    )
    one = ", or one engine instead of two" if layout.copies > 1 else ""
    return f"{short}, and even a canvas of {_SHORTEST} tokens alone needs {size_text(least)}: {other}{one}."


_SHORTEST, _MOST_ROWS = 64, 4096


def _smaller(facts: ModelFacts, work: Work, device: DeviceSpec) -> Iterator[tuple[str, ModelFacts, Work]]:
    """Changes that a user may make, the mildest first."""
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
        raise DllmError(f"--batch is {str(work.batch)[:20]}, expected up to {_MOST_ROWS}.")
    if work.length > facts.max_length:
        raise DllmError(
            f"--length is {work.length}, the model's canvas has up to {facts.max_length} tokens: give less."
        )
    if facts.dtype not in contract.DTYPES:
        raise DllmError(f"dtype is {facts.dtype}, expected one of {', '.join(contract.DTYPES)}.")


def report(
    facts: ModelFacts, work: Work, names: list[str], quantised: Quantization | None = None
) -> dict[str, Any]:
    """Everything as plain data: bytes, seconds and rates (GB/s, TFLOPS), for the devices of these names."""
    devices = [find(name) for name in names]
    weights, only_cpu = weight_bytes(facts), all(device.is_cpu for device in devices)
    layouts = {
        device.name: [layout for layout in MEMORY_LAYOUTS if runs(facts, layout, device, quantised)]
        for device in devices
    }
    used = [layout for layout in MEMORY_LAYOUTS if any(layout in held for held in layouts.values())]
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
        "verdicts": [
            verdict(facts, work, device, layout) for device in devices for layout in layouts[device.name]
        ],
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
    """The forecast for a model, as text or JSON, and as data; without a device for all of the table that it
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
    made = report(facts, work, names, quantised)
    if quantised is not None and device is not None and not made["memory"]:
        raise DllmError(
            f"{quantised.scheme} for {quantised.target} does not run on {find(device).name}: "
            f"{_other(quantised)}."
        )
    return json.dumps(made, indent=1) if as_json else forecast_text.describe(
        facts, made, verdicts=device is not None
    ), made


def _other(quantised: Quantization) -> str:
    """Where what is quantised runs."""
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


def _item(facts: ModelFacts) -> int:
    return contract.ITEM_SIZE[contract.DTYPES[facts.dtype]]
