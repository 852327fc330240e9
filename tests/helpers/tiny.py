"""Small checkpoints in a family's official layout, for tests: random weights, optionally
edited."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from export import families
from export.families.base import ConfigReader, Family, tensor_shapes
from export.graph.decoder import weight_shapes
from export.graph.feed_forward import EXPERTS_BESIDE

Tensors = dict[str, np.ndarray]
# the families whose tiny checkpoints run through every test of the exporter: the others differ from them in
# parts that tests/export/test_official_families.py and test_block_causal_families.py cover
_OTHERS = {"illada", "a2d_qwen3", "a2d_qwen2", "a2d_llama", "sdar", "fast_dllm_qwen", "coda", "qwen2",
           "llada_moe", "llada2", "rnd1", "sdar_moe"}  # fmt: skip
WHOLE_FAMILIES = sorted(set(families.names()) - _OTHERS)


def random_tensors(family: Family, config: dict[str, Any], seed: int = 0) -> Tensors:
    """Weights of unit gain, so that logits spread and confidences differ."""
    rng = np.random.default_rng(seed)
    decoder = family.decoder(ConfigReader(config, "config.json"))
    stored: Tensors = {
        tensor: np.zeros(shape, np.float32) for tensor, shape in tensor_shapes(family, decoder).items()
    }
    for name, shape in weight_shapes(decoder).items():
        spread = 2.0 / shape[-1] ** 0.5 if len(shape) > 1 else 0.1
        weight = (rng.standard_normal(shape) * spread + (1.0 if "norm" in name else 0.0)).astype(np.float32)
        made = family.stored_as(name, decoder)
        parts = np.split(weight, len(made.pieces), 1 if made.join == EXPERTS_BESIDE else 0)
        for piece, part in zip(made.pieces, parts, strict=True):
            stored[piece.tensor][slice(*(piece.rows or (None,)))] = part
    return stored


ABSENT = object()


def write_checkpoint(
    family: Family,
    path: Path,
    *,
    config: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    change: Callable[[Tensors], object] | None = None,
    shards: int = 1,
) -> Path:
    """A checkpoint directory. `model` changes the model, `config` only config.json, which lacks keys that are
    ABSENT; `change` may edit the tensors; `shards` > 1 writes an index."""
    path.mkdir(parents=True)
    real = {**family.tiny_config(), **(model or {})}
    written = {key: value for key, value in {**real, **(config or {})}.items() if value is not ABSENT}
    (path / "config.json").write_text(json.dumps(written))
    tensors = random_tensors(family, real)
    if change:
        change(tensors)
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        shard = names[i::shards]
        save_file({name: tensors[name] for name in shard}, path / file)
        weight_map |= dict.fromkeys(shard, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def write_sparse(family: Family, path: Path, config: dict[str, Any], dtype: str = "fp32") -> Path:
    """A checkpoint of any size that takes no disk space: every weight is zero."""
    from random_checkpoint import write_safetensors

    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(family, family.decoder(ConfigReader(config, "config.json")))
    write_safetensors(path / "model.safetensors", shapes, dtype, ())
    return path
