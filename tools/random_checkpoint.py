"""Write a LLaDA checkpoint of random weights in the official layout, for benchmarks and size tests.

    python tools/random_checkpoint.py --preset llada-140m checkpoints/llada-140m

The weights have unit gain, so activations and confidences stay in range; the tokens mean nothing. Needs numpy and safetensors.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.append(str(Path(__file__).resolve().parents[1]))

from export import families
from export.decoder import weight_shapes
from export.families.base import ConfigReader

_LLADA = {
    "model_type": "llada", "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True,
    "rope_full_precision": True, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "weight_tying": False,
    "include_bias": False, "max_sequence_length": 4096,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "llada-140m": _LLADA | {
        "d_model": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "mlp_hidden_size": 2304, "vocab_size": 32000,
        "embedding_size": 32000, "mask_token_id": 31999, "eos_token_id": 31998, "pad_token_id": 31998,
    },
}  # fmt: skip


def write(config: dict[str, Any], path: Path, seed: int = 0) -> None:
    """A checkpoint directory: config.json and model.safetensors (float32)."""
    family, rng = families.find(config["model_type"]), np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, shape in weight_shapes(family.decoder(ConfigReader(config, "config.json"))).items():
        gain = np.float32(1.0 if len(shape) == 1 else shape[-1] ** -0.5)
        values = np.ones(shape, np.float32) if len(shape) == 1 else rng.standard_normal(shape, np.float32) * gain
        tensors[family.tensor_name(name)] = values
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True, help="the size")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    parser.add_argument("path", type=Path, help="directory to write")
    args = parser.parse_args()
    write(PRESETS[args.preset], args.path, args.seed)


if __name__ == "__main__":
    main()
