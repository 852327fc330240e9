"""Where the time of a refine step goes on a GPU with TensorRT: an estimate by parts, and what would take each
part away. The roofline (roofline.py) is its first part at the device's full rates.

The shares and latencies below are assumptions: from an audit of the compiled engines (the layer lists and
kernels that TensorRT-RTX 1.7 builds for sm86, sm89 and sm120, read without running them), and from the
measured host loop (docs/benchmarks.md). `make gpu-report` measures the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from trt_runtime.artifact.manifest import ModelFacts
from trt_runtime.machine.devices import DeviceSpec
from trt_runtime.machine.roofline import Work, _item, cache_bytes, flops, read_bytes

READ_SHARE = 0.85  # of the bandwidth that matrix products reach while they read weights
COMPUTE_SHARE = 0.6  # of the dense rate that they reach where arithmetic is the limit
COPY_SHARE = 0.9  # of the bandwidth that a copy reaches
ATTENTION_SHARE = 0.5  # of the bandwidth: a window of one block gives a GPU too few blocks of threads
LAYER_SECONDS = 14e-6  # norms, rotation, activation, cache writes: about seven short kernels a layer
STATISTICS_SECONDS = 60e-6
CALL_SECONDS = 70e-6  # copies in and out, and the launch of a recorded graph
HOST_SECONDS = 200e-6  # choosing the window, checks, policy and canvas between two steps
HOST_ROW_SECONDS = 40e-6  # for each row more


@dataclass(frozen=True)
class Cost:
    """A part of a step. mend: what takes it away, in words; after: what is left of it then, in seconds."""

    name: str
    seconds: float
    mend: str = ""
    after: float | None = None


def refine_step(facts: ModelFacts, work: Work, device: DeviceSpec) -> list[Cost] | None:
    """The parts of a refine step over one block of every row, in the order of their work; None for a CPU, for
    float32, and where a device's rates are unknown."""
    if device.is_cpu or facts.dtype == "fp32" or device.bandwidth is None or device.rate16 is None:
        return None
    bandwidth, rows = device.bandwidth * 1e9, min(work.block_length, work.length)
    head = 4 * facts.vocab_size * facts.hidden_size
    read = read_bytes(facts, work.batch * rows, _item(facts)) - head
    multiply = work.batch * flops(facts, rows, 0, rows) / (COMPUTE_SHARE * device.rate16 * 1e12)
    layers = max(read / (READ_SHARE * bandwidth), multiply)
    heads, cache = head / (READ_SHARE * bandwidth), cache_bytes(facts, work)
    host = HOST_SECONDS + HOST_ROW_SECONDS * (work.batch - 1)
    attend, copy = cache / (ATTENTION_SHARE * bandwidth), 2 * cache / (COPY_SHARE * bandwidth)
    return [
        Cost("matrix products of the layers", layers, "8-bit weights (--quantize fp8)", layers / 2),
        Cost("the head, which multiplies in float32", heads, "a head with 16-bit weights", heads / 2),
        Cost("attention", attend, "attention with split keys", cache / (READ_SHARE * bandwidth)),
        Cost("copies of the caches", copy, "attention over the cache in place", 0.0),
        Cost("short kernels", LAYER_SECONDS * facts.num_layers),
        Cost("statistics", STATISTICS_SECONDS),
        Cost("inputs, outputs and launch", CALL_SECONDS),
        Cost("the host between steps", host, "--steps-per-sync 4", host / 4),
    ]


def prefix_pass(facts: ModelFacts, work: Work, device: DeviceSpec) -> float | None:
    """The estimated seconds of a prefix pass; None as for a step."""
    step = refine_step(facts, work, device)
    if step is None or device.rate16 is None or device.bandwidth is None:
        return None
    asked = min(work.block_length, work.length)
    multiply = work.batch * flops(facts, work.length, work.length, asked)
    read = read_bytes(facts, work.batch * work.length, _item(facts)) + cache_bytes(facts, work)
    busy = max(
        multiply / (COMPUTE_SHARE * device.rate16 * 1e12), read / (READ_SHARE * device.bandwidth * 1e9)
    )
    return busy + sum(cost.seconds for cost in step[4:])
