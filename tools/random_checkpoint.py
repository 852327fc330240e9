"""Write a checkpoint of random weights in a family's official layout, for benchmarks and size tests.

    python tools/random_checkpoint.py --preset llada-140m checkpoints/llada-140m
    python tools/random_checkpoint.py --preset llada-8b /data/llada-8b-random    # 16 GB of bf16, in shards

The weights have unit gain, so activations and confidences stay in range; the tokens mean nothing. All numbers
are windows of one block of 8 M numbers, each at a different offset, so writing is as fast as the disk and
needs little memory. Runs from a checkout with the `export` extra.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

from model_sizes import PRESETS

from export import families
from export.families.base import ConfigReader, tensor_shapes

_BLOCK, _STRIDE = (
    1 << 23,
    2_999_999,
)  # the stride is prime: no two windows of a model begin at the same number
_SHARD_BYTES = 5_000_000_000  # as transformers splits them
_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "fp32": ("F32", np.dtype(np.float32)),
    "fp16": ("F16", np.dtype(np.float16)),
    "bf16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
Shapes = dict[str, tuple[int, ...]]


def write(
    config: dict[str, Any], path: Path, dtype: str = "fp32", seed: int = 0, shard_bytes: int = _SHARD_BYTES
) -> None:
    """A checkpoint directory: config.json and model.safetensors, or shards with an index if it is larger
    than one shard."""
    _, family = families.of(config)
    shapes = tensor_shapes(family, family.decoder(ConfigReader(config, "config.json")))
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    itemsize, noise = _DTYPES[dtype][1].itemsize, _Noise(dtype, seed)
    shards = list(_shards(shapes, itemsize, shard_bytes))
    weight_map = {}
    for i, shard in enumerate(shards):
        name = (
            "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        )
        weight_map |= dict.fromkeys(shard, name)
        write_safetensors(
            path / name, shard, dtype, (piece for item in shard.items() for piece in noise.values(*item))
        )
    if len(shards) > 1:
        total = sum(itemsize * math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(path: Path, shapes: Shapes, dtype: str, pieces: Iterable[np.ndarray]) -> None:
    """A safetensors file whose data comes in pieces; without pieces it is a sparse file of zeros."""
    kind, numpy = _DTYPES[dtype]
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + numpy.itemsize * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in pieces:
            file.write(piece.view(np.uint8).data)
        file.truncate(8 + len(text) + end)


def _shards(shapes: Shapes, itemsize: int, shard_bytes: int) -> Iterator[Shapes]:
    shard: Shapes = {}
    for name, shape in shapes.items():
        size = sum(itemsize * math.prod(other) for other in shard.values())
        if shard and size + itemsize * math.prod(shape) > shard_bytes:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


class _Noise:
    """Normal numbers in the dtype of the checkpoint, window by window."""

    def __init__(self, dtype: str, seed: int) -> None:
        block = np.random.default_rng(seed).standard_normal(_BLOCK, np.float32)
        self.block, self.dtype, self.used = np.concatenate([block, block]), _DTYPES[dtype][1], 0
        self.scaled: dict[float, np.ndarray] = {}

    def values(self, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """A tensor's numbers: matrices of unit gain, small biases, norms of 1."""
        size = math.prod(shape)
        if len(shape) == 1 and not name.endswith("bias"):
            yield np.ones(size, self.dtype)
            return
        gain = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        if gain not in self.scaled:
            self.scaled[gain] = (self.block * np.float32(gain)).astype(self.dtype)
        for start in range(0, size, _BLOCK):
            self.used += 1
            offset = self.used * _STRIDE % _BLOCK
            yield self.scaled[gain][offset : offset + min(_BLOCK, size - start)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True, help="the model")
    parser.add_argument(
        "--dtype",
        choices=sorted(_DTYPES),
        help="dtype of the weights (default: the preset's own, bf16 for published models)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    parser.add_argument("path", type=Path, help="directory to write")
    args = parser.parse_args()
    config, dtype = PRESETS[args.preset]
    write(config, args.path, args.dtype or dtype, args.seed)


if __name__ == "__main__":
    main()
