"""Memory and time of a forward: bytes at the peak by layout, and seconds at the roofline of a device.

Shape letters: B batch, S rows of the window, R rows with outputs, C capacity, H KV heads, N heads, D
head_dim, V vocabulary.

Experts: a dense graph computes all of them for every row, and reads all their weights; ONNX Runtime's own
operator computes the chosen ones, and reads those that any row has chosen.

Time: a forward takes as long as its multiplications at the device's dense rate, or as reading weights and
cache at its bandwidth, whichever is longer; measured times are longer still. A GPU's rates are published
ones, the rates of this machine's CPU are measured (devices.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from trt_runtime import backends
from trt_runtime.artifact import contract
from trt_runtime.artifact.manifest import ORT_CPU, ExpertFacts, ModelFacts, Quantization
from trt_runtime.backends.spec import Layout
from trt_runtime.backends.tensorrt.store import PIECE, SCHEME_FROM
from trt_runtime.machine.devices import DeviceSpec


@dataclass(frozen=True)
class Work:
    """What to run: rows decoded together, tokens of the longest canvas, tokens per block."""

    batch: int
    length: int
    block_length: int


MEMORY_LAYOUTS = tuple(layout for name in backends.names() for layout in backends.BACKENDS.find(name).layouts)
# ONNX Runtime computes fp16 on a CPU in fp32, from copies that it makes: bytes per parameter, measured with
# 63 M and 126 M parameters
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
    """Whether a layout exists on a device: a CPU has no TensorRT, and its ONNX Runtime computes no bf16. A
    quantised model runs on the target it was quantised for, and ONNX Runtime's operator for experts on a
    CPU."""
    if quantised is None and facts.experts is not None and facts.experts.is_fused:
        return device.is_cpu and layout.quantized_for == ORT_CPU
    if quantised is not None:
        has_arithmetic = device.is_cpu or device.compute_capability >= SCHEME_FROM.get(quantised.scheme, 0)
        return has_arithmetic and layout.runs_quantized(quantised, on_cpu=device.is_cpu)
    return not device.is_cpu or (layout.on_cpu and not (layout.widens and facts.dtype == "bf16"))


def memory(facts: ModelFacts, work: Work, layout: Layout, *, on_cpu: bool = False) -> MemoryNeed:
    """Memory at the peak, a prefix pass."""
    rows = work.batch * work.length
    # the graph's head multiplies in float32: backends keep a converted copy of its weights
    head = facts.vocab_size * facts.hidden_size * 4 if layout.wide_head and _item(facts) == 2 else 0
    # the residual stream and its norm; gate, up and their product
    activations = rows * (2 * facts.hidden_size + 3 * max(_widths(facts))) * _item(facts)
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
    """Memory that opening an engine takes in addition to its weights, on devices that share memory with the
    host: the engine's file, in pieces (from TensorRT 10.7) or whole."""
    if not device.shared or not layout.reads_whole:
        return 0
    return memory(facts, Work(1, 1, 1), layout).weights // layout.copies if device.reads_whole else PIECE


def needed_bytes(facts: ModelFacts, work: Work, layout: Layout, device: DeviceSpec) -> int:
    """Memory at the peak on a device: opening the model, or a prefix pass, whichever takes more."""
    parts = memory(facts, work, layout, on_cpu=device.is_cpu)
    return max(parts.total, parts.weights + opening_bytes(facts, layout, device))


def flops(facts: ModelFacts, rows: int, keys: int, asked: int) -> float:
    """Operations for one row of the batch: linear layers over `rows` positions, their attention to `keys`,
    and the last layer and head on `asked` positions."""
    hidden, wide = facts.hidden_size, facts.num_heads * facts.head_dim
    key_value = 2 * hidden * facts.num_kv_heads * facts.head_dim
    mlp = [3 * hidden * width for width in _widths(facts)]  # of each layer
    query = 2 * hidden * wide  # q and o
    of_rows = rows * sum(mlp[:-1]) + asked * mlp[-1] + query * (rows * (facts.num_layers - 1) + asked)
    layers = 2 * rows * facts.num_layers * key_value + 2 * of_rows
    attention = 4 * wide * keys * (rows * (facts.num_layers - 1) + asked)
    return float(layers + attention + 2 * asked * hidden * facts.vocab_size)


def seconds(
    facts: ModelFacts, work: Work, device: DeviceSpec, *, rows: int, quantised: Quantization | None = None
) -> float | None:
    """The roofline time of a forward over windows of `rows` positions; None if the device's rates are
    unknown.

    On a CPU, fp16 is computed in fp32, 8-bit products (also of 4-bit weights) have a rate of their own, and
    attention stays in fp32. On a GPU, quantised weights are read as they are stored and assumed to multiply
    at the 16-bit rate.
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
    read = read_bytes(facts, work.batch * rows, 4 if in_fp32 else _item(facts))
    return max(multiply, (read + cache_bytes(facts, work)) / (device.bandwidth * 1e9))


def read_bytes(facts: ModelFacts, rows: int, item: int | None = None) -> int:
    """Bytes of weights that a forward of `rows` rows reads, `item` per number unless they are quantised; only
    a few rows of the embedding."""
    head, item = facts.vocab_size * facts.hidden_size, item or _item(facts)
    # the head multiplies in float32; a tied head is stored next to the embedding, which has 16 bits per
    # number in a quantised model (with 32 this is too much)
    whole = (facts.parameters - (0 if facts.tied_head else head)) * item + (4 - item) * head
    total = whole if facts.weight_bytes is None else facts.weight_bytes - 2 * head
    if (experts := facts.experts) is None or not experts.is_fused:
        return total
    share = total / whole  # of the bytes of a quantised model
    return total - int(share * item * expert_parameters(facts) * (1 - experts_hit(experts, rows)))


def expert_parameters(facts: ModelFacts) -> int:
    """The parameters of all experts that rows choose among."""
    if (experts := facts.experts) is None:
        return 0
    return 3 * facts.hidden_size * experts.intermediate_size * experts.num_experts * experts.num_layers


def active_parameters(facts: ModelFacts) -> int:
    """The parameters that a row passes."""
    if (experts := facts.experts) is None:
        return facts.parameters
    left = expert_parameters(facts) * (1 - experts.top_k / experts.num_experts)
    return facts.parameters - int(left)


def experts_hit(experts: ExpertFacts, rows: int) -> float:
    """The share of a layer's experts that `rows` rows choose, if they choose independently (masks choose
    alike, so fewer in practice)."""
    return float(1 - (1 - experts.top_k / experts.num_experts) ** rows)


def dense_rows(facts: ModelFacts, device: DeviceSpec) -> int | None:
    """Up to how many rows the arithmetic of a dense forward takes no longer than reading its weights; None if
    the device's rates are unknown."""
    rate = device.rate32 if facts.dtype == "fp32" or device.is_cpu else device.rate16
    if rate is None or device.bandwidth is None:
        return None
    reading = read_bytes(facts, 1) / (device.bandwidth * 1e9)
    return max(1, int(reading * rate * 1e12 / flops(facts, 1, 0, 1)))


def _widths(facts: ModelFacts) -> list[int]:
    """How wide the feed-forward of each layer is in what the graph computes, the layers without experts
    first."""
    experts = facts.experts
    if experts is None:
        return [facts.intermediate_size] * facts.num_layers
    count = experts.top_k if experts.is_fused else experts.num_experts
    mixed = count * experts.intermediate_size + experts.shared_size
    dense = facts.num_layers - experts.num_layers
    return [facts.intermediate_size] * dense + [mixed] * experts.num_layers


def _item(facts: ModelFacts) -> int:
    return contract.ITEM_SIZE[contract.DTYPES[facts.dtype]]
