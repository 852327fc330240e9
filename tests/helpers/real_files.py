"""The published files under tests/data/real, unpacked where stored compressed. See the README there."""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
from pathlib import Path

from tiny import write_sparse

from export import families
from trt_runtime.artifact.detokenize import _byte_alphabet

REAL = Path(__file__).resolve().parents[1] / "data" / "real"
_SHA256 = {
    "merges.txt": "8831e4f1a044471340f7c0a83d7bd71306a5b867e95fd870f74d0c5308a904d5",
    "vocab.json": "87a257b04b17642a0688c98cd1df89c398bda4fee532d6f88b38a659ecb4ac8d",
}


def dream_vocabulary() -> dict[str, bytes]:
    """vocab.json and merges.txt of Dream, as published."""
    merges = lzma.decompress((REAL / "Dream-v0-Base-7B" / "merges.txt.xz").read_bytes())
    pairs = [line for line in merges.decode().split("\n")[1:] if line]
    letters = sorted(_byte_alphabet(), key=lambda letter: (ord(letter) > 0xFF, ord(letter)))
    tokens = [*letters, *(pair.replace(" ", "") for pair in pairs)]
    vocabulary = (
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False, indent=2, sort_keys=True)
        + "\n"
    )
    files = {"merges.txt": merges, "vocab.json": vocabulary.encode()}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == _SHA256
    return files


def config_of(name: str) -> dict:
    """config.json of a directory, or a file of small-llada-configs."""
    path = REAL / name
    return json.loads((path / "config.json" if path.is_dir() else path).read_text("utf-8"))


def put_tokenizer(name: str, path: Path) -> None:
    """Copy the tokenizer of a directory to `path`, with Dream's vocabulary where it is Dream's."""
    for file in (REAL / name).iterdir():
        if file.name not in (
            "config.json",
            "generation_config.json",
            "model.safetensors.index.json",
            "merges.txt.xz",
        ):
            shutil.copyfile(file, path / file.name)
    if name.lower().startswith("dream"):
        for file, data in dream_vocabulary().items():
            (path / file).write_bytes(data)


SMALL = {
    "llada": {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 1, "mlp_hidden_size": 96},
    "Dream": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 96,
    },
}


def write_small(path, name, tokenizer=None, **change):
    """A checkpoint with a real configuration of a smaller network, and a real tokenizer. All weights are
    zero."""
    config = config_of(name)
    write_sparse(
        families.find(config["model_type"]), path, {**config, **SMALL[config["model_type"]], **change}, "bf16"
    )
    if tokenizer:
        put_tokenizer(tokenizer, path)
    return path
