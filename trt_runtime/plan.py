"""Forecasts before work: memory by backend and layout, time of a forward at the roofline, disk; and whether it fits.

Shape letters: B batch, S rows of the window, R rows asked for, C capacity, H KV heads, N heads, D head_dim, V vocabulary.

Time: a forward takes its multiplications at the device's dense rate, or reading weights and cache at its bandwidth, whichever is
longer; measured times are longer still. What is not measured yet: everything on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trt_runtime import advice, contract
from trt_runtime import manifest as manifests
from trt_runtime.backends import import_tool
from trt_runtime.devices import DEVICES, GIB, Device, find
from trt_runtime.errors import DllmError, check_counts
from trt_runtime.manifest import ModelFacts


@dataclass(frozen=True)
class Work:
    """What is to be run: rows at a time, the longest canvas in tokens, and the block."""

    batch: int
    length: int
    block_length: int


@dataclass(frozen=True)
class Layout:
    """A backend and how it holds the weights: `copies` of them, and whether of a 16-bit head in float32 too.

    scores: whether attention writes its scores [B, N, S, C] to memory. on_cpu: whether it runs on a CPU. widens: whether it computes
    fp16 in fp32 there, and no bf16.
    """

    name: str
    label: str
    copies: int
    wide_head: bool
    scores: bool
    on_cpu: bool
    widens: bool = False


LAYOUTS = (
    Layout("ort, one session", "ort", 1, wide_head=True, scores=True, on_cpu=True, widens=True),
    Layout("tensorrt, one engine (shared)", "trt shared", 1, wide_head=True, scores=False, on_cpu=False),
    Layout("tensorrt, two engines (split)", "trt split", 2, wide_head=True, scores=False, on_cpu=False),
    Layout("torch (the reference)", "torch", 1, wide_head=False, scores=False, on_cpu=True),
)
FORECAST = "a forecast from published rates; 'make gpu-report' measures a GPU"
# ONNX Runtime computes fp16 on a CPU in fp32, from copies that it makes: bytes a parameter measured for 63 and 126 M parameters
_CPU_16BIT = 4.7


@dataclass(frozen=True)
class Memory:
    """Bytes: weights (with the head's float32 copy), the cache of all rows, the largest activations, logits and statistics."""

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
    return 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * _item(facts) * work.batch * work.length


def runs(facts: ModelFacts, layout: Layout, device: Device) -> bool:
    """Whether a layout exists on a device: on a CPU there is no TensorRT, and ONNX Runtime computes no bf16."""
    return not device.is_cpu or (layout.on_cpu and not (layout.widens and facts.dtype == "bf16"))


def memory(facts: ModelFacts, work: Work, layout: Layout, *, on_cpu: bool = False) -> Memory:
    """Memory at the peak, which is a prefix pass."""
    rows = work.batch * work.length
    # the graph's head multiplies in float32, for which backends keep a converted copy
    head = facts.vocab_size * facts.hidden_size * 4 if layout.wide_head and _item(facts) == 2 else 0
    # the residual stream and its norm; gate, up and their product
    activations = rows * (2 * facts.hidden_size + 3 * facts.intermediate_size) * _item(facts)
    if layout.scores:
        activations += work.batch * facts.num_heads * work.length * work.length * 4
    statistics = 3 * work.batch * min(work.block_length, work.length) * facts.vocab_size * 4  # logits, shifted, exponentials
    weights = layout.copies * (weight_bytes(facts) + head)
    if on_cpu and layout.widens and _item(facts) == 2:
        weights = int(_CPU_16BIT * facts.parameters) + weight_bytes(facts) - 2 * facts.parameters
    return Memory(weights, cache_bytes(facts, work), activations, statistics)


def flops(facts: ModelFacts, rows: int, keys: int, asked: int) -> float:
    """Of one row of the batch: linear layers over `rows`, attention of `rows` to `keys`, and the last layer and head on `asked`."""
    hidden, wide = facts.hidden_size, facts.num_heads * facts.head_dim
    key_value = 2 * hidden * facts.num_kv_heads * facts.head_dim
    pruned = 2 * hidden * wide + 3 * hidden * facts.intermediate_size  # q, o and the MLP
    layers = 2 * rows * facts.num_layers * key_value + 2 * pruned * (rows * (facts.num_layers - 1) + asked)
    attention = 4 * wide * keys * (rows * (facts.num_layers - 1) + asked)
    return float(layers + attention + 2 * asked * hidden * facts.vocab_size)


def seconds(facts: ModelFacts, work: Work, device: Device, *, rows: int) -> float | None:
    """The roofline time of a forward over windows of `rows`; None where the device's rates are not known."""
    rate = device.rate32 if facts.dtype == "fp32" else device.rate16
    if rate is None or device.bandwidth is None:
        return None
    asked = min(work.block_length, rows)
    multiply = work.batch * flops(facts, rows, work.length, asked) / (rate * 1e12)
    head = facts.vocab_size * facts.hidden_size
    linear = facts.parameters - (0 if facts.tied_head else head)  # of the embedding a few rows are read
    wide = (4 - _item(facts)) * head  # the head multiplies in float32
    moved = linear * _item(facts) + wide + cache_bytes(facts, work)
    return max(multiply, moved / (device.bandwidth * 1e9))


def facts_of(path: str, dtype: str | None) -> ModelFacts:
    """The model of an artifact, or of a checkpoint (a directory or hub id, of which config.json suffices). Raises DllmError."""
    if _is_artifact(path):
        facts = manifests.load(Path(path)).model
        if dtype is not None and facts.weight_bytes is not None:
            raise DllmError(f"{path}: is quantised, and has no other dtype than {facts.dtype}: leave --dtype out.")
        return facts if dtype is None else replace(facts, dtype=dtype)
    facts_of_checkpoint = import_tool("export.pipeline", "plan of a checkpoint", advice.tool("export")).facts_of_checkpoint
    checkpoint: ModelFacts = facts_of_checkpoint(path, dtype or "bf16")
    return checkpoint


def verdict(facts: ModelFacts, work: Work, device: Device, layout: Layout) -> str:
    """A sentence: whether it fits, and what to change if it does not."""

    def needed(facts: ModelFacts, work: Work) -> int:
        return memory(facts, work, layout, on_cpu=device.is_cpu).total

    free, all_of_it = device.memory - device.reserved, needed(facts, work)
    what = f"{layout.name} on {device.name}"
    if all_of_it <= free:
        return f"fits: {what} needs {_gib(all_of_it)} of {_gib(free)} GiB."
    short = f"does not fit: {what} needs {_gib(all_of_it)} of {_gib(free)} GiB"
    fitting = next((words for words, model, less in _smaller(facts, work, device) if needed(model, less) <= free), None)
    if fitting:
        return f"{short}; {fitting} would."
    least = needed(facts, replace(work, batch=1, length=min(work.length, _SHORTEST)))
    enough = [d.name for d in sorted(DEVICES.values(), key=lambda d: d.memory)
              if memory(facts, work, layout).total <= d.memory - d.reserved]  # fmt: skip
    other = f"of the table, {', '.join(enough[:3])} would do" if enough else "no device of the table is enough"
    one = ", or one engine instead of two" if layout.copies > 1 else ""
    return f"{short}, and even a canvas of {_SHORTEST} tokens alone needs {_gib(least)} GiB: {other}{one}."


_SHORTEST, _MOST_ROWS = 64, 4096


def _smaller(facts: ModelFacts, work: Work, device: Device) -> Iterator[tuple[str, ModelFacts, Work]]:
    """Changes that a user may make, the mildest first."""
    for batch in range(min(work.batch - 1, _MOST_ROWS), 0, -1):
        yield f"a batch of {batch}", facts, replace(work, batch=batch)
    for length in range(work.length - work.length % _SHORTEST, work.length // 4, -_SHORTEST):
        yield f"a batch of 1 and a canvas of {length} tokens", facts, replace(work, batch=1, length=length)
    if facts.dtype == "fp32" and not device.is_cpu:
        yield "DTYPE=bf16 (--dtype bf16)", replace(facts, dtype="bf16"), work
        yield "DTYPE=bf16 (--dtype bf16) and a batch of 1", replace(facts, dtype="bf16"), replace(work, batch=1)
    length = work.length // 4
    while (length := length // 2) >= _SHORTEST:
        yield f"a batch of 1 and a canvas of {length} tokens", facts, replace(work, batch=1, length=length)


def check(facts: ModelFacts, work: Work) -> None:
    """Raise DllmError for work that the model cannot do."""
    check_counts(work, "batch", "length", "block_length")
    if work.batch > _MOST_ROWS:
        raise DllmError(f"--batch is {str(work.batch)[:20]}, expected up to {_MOST_ROWS}.")
    if work.length > facts.max_length:
        raise DllmError(f"--length is {work.length}, the model's canvas has up to {facts.max_length} tokens: give less.")
    if facts.dtype not in contract.DTYPES:
        raise DllmError(f"dtype is {facts.dtype}, expected one of {', '.join(contract.DTYPES)}.")


def report(facts: ModelFacts, work: Work, names: list[str]) -> dict[str, Any]:
    """Everything as plain data: bytes and seconds, for the devices of these names."""
    devices = [find(name) for name in names]
    weights, only_cpu = weight_bytes(facts), all(device.is_cpu for device in devices)
    return {
        "model": asdict(facts), "work": asdict(work),
        "memory": {layout.name: {**asdict(parts), "total": parts.total}
                   for layout in LAYOUTS if any(runs(facts, layout, device) for device in devices)
                   for parts in [memory(facts, work, layout, on_cpu=only_cpu)]},
        "disk": {"artifact": weights, "artifact, weights linked": None if facts.weight_bytes else weights - facts.parameters * _item(facts),
                 "engines, shared": weights, "engines, split": 2 * weights},
        "build_memory": 3 * weights,
        "devices": {device.name: {
            "memory": device.memory, "prefix_pass_seconds": seconds(facts, work, device, rows=work.length),
            "refine_step_seconds": seconds(facts, work, device, rows=min(work.block_length, work.length)),
            "fits": {layout.label: memory(facts, work, layout, on_cpu=device.is_cpu).total <= device.memory - device.reserved
                     for layout in LAYOUTS if runs(facts, layout, device)},
        } for device in devices},
        "verdicts": [verdict(facts, work, device, layout) for device in devices for layout in LAYOUTS
                     if runs(facts, layout, device)],
    }  # fmt: skip


def describe(facts: ModelFacts, made: dict[str, Any], *, verdicts: bool) -> str:
    """A report as text."""
    work = made["work"]
    lines = [
        f"{facts.family}, {_count(facts.parameters)} parameters, {facts.dtype}; batch {work['batch']}, canvas {work['length']}, "
        f"block {work['block_length']}", "",
        f"{'memory, GiB':32}{'weights':>9}{'cache':>9}{'activations':>13}{'statistics':>12}{'total':>9}",
    ]  # fmt: skip
    for name, parts in made["memory"].items():
        lines.append(f"{name:32}{_gib(parts['weights']):>9}{_gib(parts['cache']):>9}{_gib(parts['activations']):>13}"
                     f"{_gib(parts['statistics']):>12}{_gib(parts['total']):>9}")  # fmt: skip
    disk = made["disk"]
    linked = (
        "quantised"
        if disk["artifact, weights linked"] is None
        else f"{_gib(disk['artifact, weights linked'])} with --weights link"
    )
    lines += ["", f"disk: artifact {_gib(disk['artifact'])} GiB ({linked}), engines "
              f"{_gib(disk['engines, shared'])} (shared) or {_gib(disk['engines, split'])} (split); building an engine takes about three times the weights, "
              f"{_gib(made['build_memory'])} GiB, of memory", "",
              f"{'at the roofline':26}{'memory GiB':>11}{'prefix pass ms':>16}{'refine step ms':>16}  fits"]  # fmt: skip
    for name, row in made["devices"].items():
        fitting = [label for label, fits in row["fits"].items() if fits]
        lines.append(f"{name:26}{_gib(row['memory']):>11}{_ms(row['prefix_pass_seconds']):>16}{_ms(row['refine_step_seconds']):>16}"
                     f"  {', '.join(fitting) or 'nothing'}")  # fmt: skip
    lines += ["", *(made["verdicts"] if verdicts else []), f"({FORECAST})"]
    return "\n".join(lines)


def run(
    path: str, *, device: str | None, batch: int, length: int | None, block_length: int, dtype: str | None, as_json: bool
) -> str:
    """The forecast for a model, as text or JSON; without a device for all of the table. Raises DllmError."""
    facts = facts_of(path, dtype or ("fp32" if device == "cpu" and not _is_artifact(path) else None))
    work = Work(batch, min(DEFAULT_LENGTH, facts.max_length) if length is None else length, block_length)
    check(facts, work)
    made = report(facts, work, [device] if device is not None else ["cpu", *DEVICES])
    return json.dumps(made, indent=1) if as_json else describe(facts, made, verdicts=device is not None)


DEFAULT_LENGTH = 1280


def _is_artifact(path: str) -> bool:
    return (Path(path) / manifests.FILE_NAME).is_file()


def _item(facts: ModelFacts) -> int:
    return contract.ITEM_SIZE[contract.DTYPES[facts.dtype]]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= 0.005 * GIB or not size else f"{size / GIB:.1g}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def _ms(time: float | None) -> str:
    return "-" if time is None else f"{1000 * time:.2f}" if time >= 1e-5 else f"{1000 * time:.1g}"
