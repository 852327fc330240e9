"""The graph contract: names, dtypes and axes of both graphs. The one place where they are written down.

Shape letters: B batch, S rows of the window, R rows asked for, C capacity of the cache, H KV heads, D
head_dim, V vocabulary.

| input | type, shape | meaning |
|---|---|---|
| `input_ids` | int64 [B, S] | tokens of the window |
| `position_ids` | int64 [B, S] | absolute positions |
| `write_index` | int64 [B] | cache row where the window's keys and values are written (refine only; prefix writes at 0) |
| `kv_len` (full attention) | int64 [B] | valid rows of the cache for each sequence; keys beyond are masked (prefix: rows of the window from kv_len on, which are padding) |
| `row_len` (block-causal attention, in place of `kv_len`) | int64 [B, S] | rows of the cache that each row of the window sees: those below it (prefix: rows of the window). Blocks are finished from left to right, so the visible rows are always the first ones; 1 or more, also for padding |
| `logit_rows` | int64 [B, R] | rows of the window whose statistics are wanted |
| `cache_key.{i}`, `cache_value.{i}` | model dtype [B, H, C, D] | keys after RoPE, and values (legacy: not in the prefix graph) |

| output | type, shape | meaning |
|---|---|---|
| `token` | int64 [B, R] | argmax of the logits, the mask token excluded; the lowest id on a tie |
| `confidence`, `runner_up` | float32 [B, R] | softmax probability of `token`, and of the next best token that is not the mask |
| `entropy` | float32 [B, R] | entropy of the softmax in nats |
| `logits` | float32 [B, R, V] | only with `--head logits` |
| `updated_key.{i}`, `updated_value.{i}` | model dtype [B, H, C, D] | the input caches with the window's rows written: bind both to one buffer |
| `new_key.{i}`, `new_value.{i}` | model dtype [B, H, S, D] | legacy lowering, in place of these: the window's rows, which the runtime writes at write_index |
"""

from __future__ import annotations

from dataclasses import dataclass

SPARE_ROWS = 64  # rows of a cache beyond the longest canvas, which a scheduler uses for idle and padded rows
ROLES = ("prefix", "refine")
MODERN, LEGACY = LOWERINGS = ("modern", "legacy")
FULL, BLOCK_CAUSAL = ATTENTIONS = ("full", "block_causal")
HEADS = ("statistics", "logits")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
ITEM_SIZE = {"int64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
STATISTICS = ("token", "confidence", "runner_up", "entropy")
LOGITS = "logits"


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type (a NumPy or ml_dtypes name) and axes (a letter for a dynamic size) of an input or
    output."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]


@dataclass(frozen=True)
class Dims:
    """What determines a model's inputs and outputs: sizes, the element type `dtype` of the caches, the
    lowering, and the attention."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: str
    lowering: str = MODERN
    attention: str = FULL

    @property
    def writes_caches(self) -> bool:
        """Whether a graph writes the caches itself, in place; otherwise it returns the window's rows."""
        return self.lowering == MODERN


def cache_names(side: str, dims: Dims) -> list[str]:
    """Names of the caches in layer order, key before value; `side` is 'cache' (inputs), 'updated' or 'new'
    (outputs)."""
    return [f"{side}_{what}.{i}" for i in range(dims.num_layers) for what in ("key", "value")]


def returned_names(dims: Dims) -> list[str]:
    """Names of the outputs with keys and values."""
    return cache_names("updated" if dims.writes_caches else "new", dims)


def _caches(side: str, dims: Dims) -> list[TensorSpec]:
    axes = ("B", dims.num_kv_heads, "S" if side == "new" else "C", dims.head_dim)
    return [TensorSpec(name, dims.dtype, axes) for name in cache_names(side, dims)]


def inputs(role: str, dims: Dims) -> list[TensorSpec]:
    """The inputs of a graph, in order."""
    specs = [TensorSpec("input_ids", "int64", ("B", "S")), TensorSpec("position_ids", "int64", ("B", "S"))]
    if role == "refine":
        specs.append(TensorSpec("write_index", "int64", ("B",)))
    valid = TensorSpec("kv_len", "int64", ("B",))
    if dims.attention == BLOCK_CAUSAL:
        valid = TensorSpec("row_len", "int64", ("B", "S"))
    specs += [valid, TensorSpec("logit_rows", "int64", ("B", "R"))]
    return specs + (_caches("cache", dims) if role == "refine" or dims.writes_caches else [])


def outputs(role: str, dims: Dims, head: str) -> list[TensorSpec]:
    """The outputs of a graph, in order."""
    specs = [TensorSpec(name, "int64" if name == "token" else "float32", ("B", "R")) for name in STATISTICS]
    if head == "logits":
        specs.append(TensorSpec(LOGITS, "float32", ("B", "R", dims.vocab_size)))
    return specs + _caches("updated" if dims.writes_caches else "new", dims)
