"""Headers of safetensors files that lie: each is refused in one line, and none is believed that safetensors
refuses."""

from __future__ import annotations

import json
import random
import struct

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from export.checkpoint import huggingface as checkpoint
from trt_runtime.errors import DllmError


def _parts(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


BASE = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]},
}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (
            {**BASE, "b": {**BASE["b"], "data_offsets": [28, 36]}},
            "4 bytes between a and b belong to no tensor",
        ),
        ({**BASE, "b": {**BASE["b"], "data_offsets": [20, 28]}}, "overlap"),
        ({"a": BASE["a"]}, "16 bytes between a and the end of the file belong to no tensor"),
        ({**BASE, "b": {**BASE["b"], "shape": [-1, -2]}}, "invalid shape [-1, -2]"),
        ({**BASE, "b": {**BASE["b"], "shape": [2.0]}}, "invalid shape [2.0]"),
        ({**BASE, "b": {**BASE["b"], "shape": ["2"]}}, "invalid shape ['2']"),
        ({**BASE, "b": {**BASE["b"], "shape": [True, 2]}}, "invalid shape [True, 2]"),
        ({**BASE, "b": {**BASE["b"], "shape": [2] + [1] * 500}}, "invalid shape [2, 1, 1"),
        ({**BASE, "b": {**BASE["b"], "shape": [10**400]}}, "invalid shape [1000"),
        ({**BASE, "b": {**BASE["b"], "data_offsets": [24, 10**30]}}, "offsets [24, 1000"),
        ({**BASE, "b": {**BASE["b"], "data_offsets": [1 << 62, (1 << 62) + 8]}}, "cut short"),
        ({**BASE, "b": {**BASE["b"], "data_offsets": [-8, 0]}}, "offsets [-8, 0]"),
        ({**BASE, "b": {**BASE["b"], "data_offsets": [32, 24]}}, "bytes, but its shape"),
        ({**BASE, "b": {**BASE["b"], "data_offsets": [24]}}, "damaged"),
        ({**BASE, "b": {**BASE["b"], "dtype": "F16"}}, "has 8 bytes, but its shape [2] takes 4"),
        ({**BASE, "b": {**BASE["b"], "dtype": ["F32"]}}, "damaged"),
        ({**BASE, "b": {**BASE["b"], "dtype": "F32\nrun this"}}, "is F32\\nrun this, supported are"),
        ({"a": BASE["a"], "b\nerror: none": BASE["b"]}, "a tensor is called"),
        ({**BASE, "b": None}, "damaged"),
        ([BASE], "damaged"),
        ({**BASE, "b": [1]}, "damaged"),
        (
            b'{"a": ' + json.dumps(BASE["a"]).encode() + b', "a": ' + json.dumps(BASE["b"]).encode() + b"}",
            "the key 'a' is repeated",
        ),
        (
            json.dumps(BASE)
            .replace('"dtype": "F32", "shape": [2]', '"dtype": "F32", "dtype": "F32", "shape": [2]')
            .encode(),
            "is repeated",
        ),
        (json.dumps(BASE).encode("utf-16"), "damaged"),
        (b"\xff" + json.dumps(BASE).encode(), "damaged"),
        (b"[" * 100_000, "damaged"),
    ],
)
def test_a_header_that_lies_is_one_clear_line(header, said, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(_join(header, bytes(40)))
    with pytest.raises(DllmError) as error:
        checkpoint._header(file)
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


def _mutated(rng, header, data):
    """A file with one to three random lies."""
    header = json.loads(json.dumps(header))
    numbers = [0, 1, -1, 2, 7, 8, 24, 64, 1 << 31, 1 << 63, 1 << 64, 10**25, 2.5, "4", None, True]
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([n for n in header if isinstance(header[n], dict) and n != "__metadata__"])
        entry, kind = header[name], rng.randrange(8)
        if kind == 0:
            entry["shape"] = [
                rng.choice([*numbers, *(entry.get("shape") or [])]) for _ in range(rng.randint(0, 4))
            ]
        elif kind == 1:
            entry["data_offsets"] = [
                rng.choice([*numbers, len(data)]) for _ in range(rng.choice([1, 2, 2, 2, 3]))
            ]
        elif kind == 2:
            entry["dtype"] = rng.choice(["F16", "F64", "I8", "BF16", "F32", "", 7, None, "f32"])
        elif kind == 3:
            entry.pop(rng.choice(["dtype", "shape", "data_offsets"]), None)
        elif kind == 4:
            header[name + "'"] = rng.choice([dict(entry), None, [], 3])
        elif kind == 5 and len(header) > 2:
            del header[name]
        elif kind == 6:
            data = data[: rng.randrange(len(data))] if rng.random() < 0.5 else data + bytes(rng.randint(1, 9))
        else:
            header[name] = dict(rng.sample(list(entry.items()), len(entry))) | {"more": 1}
    text = bytearray(json.dumps(header).encode() + b" " * rng.randint(0, 9))
    if rng.random() < 0.3:
        text[rng.randrange(len(text))] = rng.randrange(256)
    return _join(bytes(text), data)


def test_no_lie_is_believed_that_safetensors_refuses(tmp_path):
    """1,500 damaged files: one clear line, or the tensors that the safetensors package reads from it too."""
    path, rng = tmp_path / "x.safetensors", random.Random(0)
    good = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(4, np.float16),
        "c": np.ones((1, 2), np.float32),
    }
    save_file(good, path, metadata={"format": "pt"})
    header, data = _parts(path)
    taken = 0
    for _ in range(1500):
        path.write_bytes(_mutated(rng, header, data))
        try:
            held = checkpoint._header(path)
        except DllmError as error:
            assert "\n" not in str(error)
            continue
        taken += 1
        try:
            with safe_open(path, "np") as theirs:
                assert sorted(theirs.keys()) == sorted(held)
                for name, stored in held.items():
                    if stored.size and stored.dtype.name != "bfloat16":
                        assert theirs.get_tensor(name).tobytes() == stored.open().tobytes()
        except SafetensorError as error:
            raise AssertionError(
                f"taken, and refused by safetensors: {error}: {path.read_bytes()[:600]!r}"
            ) from error
    assert 20 < taken < 700
