"""Other programs beside the artifact: GGUF files of checkpoints, and llama.cpp and the official code through
stand-ins that decode with the same weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap

import gguf
import numpy as np
import pytest
from places import GOLDENS, ROOT, export_quietly
from safetensors.numpy import load_file
from tiny import write_checkpoint

from export import families
from export import source as sources
from trt_runtime.errors import DllmError

sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "cpu"), str(ROOT / "tools")]
import gguf_from_checkpoint
import others
from reports import system as render_system
from reports import system_parts


def _read(path):
    """The tensors of a GGUF file as float32 [out, in], and its facts."""
    file = gguf.GGUFReader(path)
    tensors = {each.name: gguf.dequantize(each.data, each.tensor_type) for each in file.tensors}
    return tensors, {name: field.contents() for name, field in file.fields.items()}


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("name", ["llada", "dream", "llada_moe", "rnd1"])
def test_a_gguf_file_holds_the_checkpoint(tmp_path, name, kind):
    """Every weight, under llama.cpp's name, in the order that its RoPE wants; experts [E, out, in]."""
    wide = {"expert_intermediate_size": 32} if name == "llada_moe" else {}
    wide |= {"moe_intermediate_size": 32} if name == "rnd1" else {}
    wide |= {"hidden_size": 64} if name != "llada" else {}
    path = write_checkpoint(families.find(name), tmp_path / "checkpoint", model=wide)
    gguf_from_checkpoint.write(str(path), tmp_path / "x.gguf", kind)
    tensors, facts = _read(tmp_path / "x.gguf")
    source = sources.read(str(path))
    raw = load_file(path / "model.safetensors")
    network, part = source.decoder, source.decoder.feed_forward
    architecture = facts["general.architecture"]
    assert facts[f"{architecture}.block_count"] == network.num_layers
    assert facts[f"{architecture}.attention.head_count_kv"] == network.attention.num_kv_heads
    assert facts["tokenizer.ggml.mask_token_id"] == source.decoding.mask_token_id
    assert facts["diffusion.shift_logits"] == bool(source.decoding.logit_shift)
    assert facts["tokenizer.ggml.tokens"][17] == "<17>"
    error = {"f32": 0, "f16": 1e-3, "q8_0": 2e-2}[kind]

    def same(mine, theirs):
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=error * max(1e-9, np.abs(theirs).max()))

    def stored(weight):
        return raw[source.family.tensor_name(weight)]

    same(tensors["token_embd.weight"], stored("embedding"))
    same(tensors["output.weight"], stored("head"))
    for layer in range(network.num_layers):
        size, heads = network.attention.head_dim, network.attention.num_heads
        queries = stored(f"layers.{layer}.q_proj")
        if name == "llada":  # row 2 i of a head is of its first half, row 2 i + 1 of its second
            queries = queries.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(queries.shape)
        same(tensors[f"blk.{layer}.attn_q.weight"], queries)
        same(tensors[f"blk.{layer}.attn_v.weight"], stored(f"layers.{layer}.v_proj"))
        if name == "dream":
            same(tensors[f"blk.{layer}.attn_k.bias"], stored(f"layers.{layer}.k_proj.bias"))
        if f"blk.{layer}.ffn_down_exps.weight" in tensors:
            at = f"model.layers.{layer}.mlp.experts"
            same(tensors[f"blk.{layer}.ffn_down_exps.weight"][3], raw[f"{at}.3.down_proj.weight"])
            same(tensors[f"blk.{layer}.ffn_up_exps.weight"][5], raw[f"{at}.5.up_proj.weight"])
            assert len(tensors[f"blk.{layer}.ffn_gate_exps.weight"]) == part.num_experts
        else:
            same(tensors[f"blk.{layer}.ffn_down.weight"], stored(f"layers.{layer}.down_proj"))


def test_what_llama_cpp_does_not_have_is_refused(tmp_path):
    path = write_checkpoint(families.find("sdar"), tmp_path / "checkpoint")
    with pytest.raises(DllmError, match="has no network of SDAR"):
        gguf_from_checkpoint.write(str(path), tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_text("mine")
    with pytest.raises(DllmError, match="exists"):
        gguf_from_checkpoint.write(str(path), tmp_path / "x.gguf")


# what both stand-ins decode: the artifact's own loop, without a cache
DECODE = """
import json, sys
sys.path.insert(0, {root!r})
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.model import load
def decode(prompt, gen, block, steps, cache="none", policy="fixed"):
    lengths = {{"gen_length": gen, "block_length": block, "steps": steps}}
    config = GenerationConfig(**lengths, cache=cache, policy=policy, stop_at_eos=False)
    (result,) = load({artifact!r}, threads=1).generate([prompt], config)
    return [int(token) for token in result.canvas]
"""
LLAMA = """
import re
words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1]
prompt, canvas = [int(t) for t in re.findall(r"<(\\d+)>", value("-p"))], int(value("-ub"))
block = int(value("--diffusion-block-length"))
steps = int(value("--diffusion-steps"))
assert canvas % block == 0 and steps % (canvas // block) == 0, "an assertion of llama.cpp fails"
gen = canvas - len(prompt)
each = steps // (canvas // block)
answer = decode(prompt, gen, block, each * gen // block, policy="sequential")
forwards = each * gen // block + canvas // block - gen // block
print("diffusion step: 1/2 [===]", file=sys.stderr)
print(f"\\ntotal time: {{10.0 * forwards:.2f}}ms, time per step: 1.00ms", file=sys.stderr)
print("".join(f"<{{token}}>" for token in answer[len(prompt):]), file=sys.stderr)
"""
OFFICIAL = """
import torch
class LLaDAModelLM:
    @classmethod
    def from_pretrained(cls, path, torch_dtype):
        return cls()
    def eval(self):
        return self
def _with(cache):
    def generate(model, prompt, steps, gen_length, block_length, temperature, mask_id):
        return torch.tensor([decode(prompt[0].tolist(), gen_length, block_length, steps, cache)]), steps
    return generate
generate, generate_with_dual_cache = _with("none"), _with("dual")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, its artifact, and the two programs."""
    folder = tmp_path_factory.mktemp("others")
    shutil.copytree(GOLDENS / "llada_tiny", folder / "checkpoint")
    artifact = export_quietly(folder / "checkpoint", folder / "fp32")
    decode = textwrap.dedent(DECODE).format(root=str(ROOT), artifact=str(artifact))
    binary = folder / "llama-diffusion-cli"
    binary.write_text(f"#!{sys.executable}\n{decode}{LLAMA.format()}")
    binary.chmod(0o755)
    (folder / "code" / "llada").mkdir(parents=True)
    (folder / "code" / "llada" / "generate.py").write_text(decode + OFFICIAL)
    return folder


def _options(place, **changed) -> list[str]:
    options = {
        "checkpoint": str(place / "checkpoint"),
        "scratch": str(place),
        "fp32": str(place / "fp32"),
        "w8a8": str(place / "fp32"),
        "threads": 1,
        "repeats": 1,
        "llama": str(place / "llama-diffusion-cli"),
        "official": str(place / "code"),
        "output": str(place / "system-others-1.json"),
    }
    return [sys.executable, others.__file__, json.dumps(options | changed)]


def test_other_programs_answer_the_same_prompt_in_turn(place, monkeypatch):
    """Their tokens are compared with ours; llama.cpp's forwards behind the canvas are taken away."""
    subprocess.run(_options(place), check=True, capture_output=True)
    report = json.loads((place / "system-others-1.json").read_text())
    rows = {(row["system"], row["cache"]): row for row in report["rows"]}
    official = "Fast-dLLM, eager PyTorch fp32"
    assert list(rows)[:2] == [("ONNX Runtime fp32", "none"), ("ONNX Runtime fp32", "dual")]
    for key in (
        ("llama.cpp f32", "none"),
        (official, "none"),
        (official, "dual"),
        ("PyTorch fp32, eager", "dual"),
    ):
        assert (rows[key]["same_tokens"], rows[key]["of"]) == (128, 128), key
    # 72 forwards of 10 ms were made, 64 of which are the schedule's
    assert rows["llama.cpp q8_0", "none"]["tokens_per_second"] == pytest.approx(128 / 0.64)
    text = system_parts.others(system_parts.programs(place))
    assert (
        "against Fast-dLLM | against PyTorch fp32 | against llama.cpp q8_0" in text
        and "| 128 of 128 |" in text
    )
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    render_system.plot_programs(system_parts.programs(place), place / "plot")
    assert (place / "plot.png").stat().st_size > 10_000


def test_a_llama_cpp_that_fails_is_one_clear_line(place, tmp_path, text="total time: 1.00ms\\n<1><2>"):
    binary = tmp_path / "llama-diffusion-cli"
    binary.write_text(f"#!/bin/sh\nprintf '{text}' >&2\n")
    binary.chmod(0o755)
    command = _options(place, llama=str(binary), official="")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "reported no time or not 128 tokens" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkout_without_the_code_is_named(place, tmp_path):
    command = _options(place, llama="", official=str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "has no llada/generate.py" in done.stderr
