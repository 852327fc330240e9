"""Attention in engines that TensorRT-RTX built: fused, scaled exactly, its sums in fp32; and what is said
where it is not."""

from __future__ import annotations

import json

import pytest
from places import export_quietly
from tiny import write_checkpoint

from export import families
from export.graph.lowering import modern
from trt_runtime.backends.tensorrt import builder, fused_attention, store
from trt_runtime.backends.tensorrt.fused_attention import FusedKernel
from trt_runtime.backends.tensorrt.store import BuildConfig

pytest.importorskip("tensorrt_rtx_bindings")
SIZES = BuildConfig(
    "tensorrt-rtx", targets=("sm86", "sm89", "sm120"), max_batch=2, max_length=128, block_length=16
)
# two heads of D, and a width that takes them
MODELS = {
    "llada": lambda d: {"d_model": 2 * d, "n_heads": 2, "n_kv_heads": 2},
    "dream": lambda d: {"hidden_size": 2 * d, "num_attention_heads": 2, "num_key_value_heads": 1},
    "sdar": lambda d: {"hidden_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": d},
    "fast_dllm_qwen": lambda d: {"hidden_size": 2 * d, "num_attention_heads": 2, "num_key_value_heads": 1},
}


def built(tmp_path, family: str, head_dim: int, **options):
    """The attention kernels of each engine, as engine.json lists them."""
    checkpoint = write_checkpoint(
        families.find(family), tmp_path / "checkpoint", model=MODELS[family](head_dim)
    )
    artifact = export_quietly(checkpoint, tmp_path / "artifact", **options)
    layout = "shared" if options.get("lowering", "modern") == "modern" else "split"
    said: list[str] = []
    made = store.build(artifact, tmp_path / "engines", store.replace(SIZES, layout=layout), said.append)
    return json.loads((made / "engine.json").read_text())["attention"], said


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", MODELS)
def test_16_bit_attention_is_fused_scaled_exactly_and_sums_in_fp32(tmp_path, family, dtype, head_dim):
    """A scale of 1/16 is all in the kernel (bf16), or half of it is, the other half a power of two before it
    (fp16)."""
    found, said = built(tmp_path, family, head_dim, dtype=dtype)
    (kernel,) = found["shared"]
    assert (kernel["dtype"], kernel["sums"], kernel["scale"]) == (
        dtype,
        "fp32",
        {"bf16": 1 / 16, "fp16": 1 / 4}[dtype],
    )
    assert kernel["count"] >= 3 and said == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", MODELS)
def test_the_legacy_lowering_leaves_no_scale_to_the_kernel(tmp_path, family, dtype):
    found, said = built(tmp_path, family, 128, dtype=dtype, lowering="legacy")
    for kernels in found.values():
        assert [(kernel["sums"], kernel["scale"]) for kernel in kernels] == [("fp32", 1.0)]
    assert set(found) == {"prefix", "refine"} and said == []


@pytest.mark.parametrize(
    ("dtype", "scale", "kernel"),
    [
        ("bf16", 128**-0.5, FusedKernel("bf16", "fp32", float.fromhex("0x1.69p-4"))),
        ("fp16", 1.0, FusedKernel("fp16", "fp16", 1.0)),
    ],
)
def test_what_the_scale_was_is_seen(tmp_path, monkeypatch, dtype, scale, kernel):
    """128^-0.5 is rounded on its way into a bf16 kernel: 0.29 % too low. A scale of 1 makes fp16 attention
    sum in fp16, which is said."""
    monkeypatch.setattr(modern, "scales", lambda head_dim, kind: (None, scale))
    found, said = built(tmp_path, "llada", 128, dtype=dtype)
    assert [FusedKernel(item["dtype"], item["sums"], item["scale"]) for item in found["shared"]] == [kernel]
    assert (
        kernel.scale != 128**-0.5
        and bool(said) == (dtype == "fp16")
        and (not said or "attention sums in 16 bits" in said[0])
    )


def test_attention_without_a_fused_kernel_builds_and_is_said(tmp_path, monkeypatch):
    """One head is a shape that has none: the build must not fail, and the user must hear of it."""
    checkpoint = write_checkpoint(
        families.find("llada"),
        tmp_path / "checkpoint",
        model={"d_model": 48, "n_heads": 1, "n_kv_heads": 1, "n_layers": 1},
    )
    artifact = export_quietly(checkpoint, tmp_path / "artifact", dtype="bf16")
    said: list[str] = []
    monkeypatch.setattr(
        fused_attention,
        "found",
        lambda data, real=fused_attention.found: real(
            bytes(data).replace(b".initialize(", b".x(").replace(b"mha", b"mhx")
        ),
    )
    store.build(artifact, tmp_path / "engines", SIZES, said.append)
    assert said == [
        "shared: the engine has no fused attention kernel: attention is decomposed, which is correct but slow"
    ]


def test_names_of_compiled_kernels_are_found_too():
    """TensorRT's own engines hold names where TensorRT-RTX's hold source."""
    data = b"\0_gemm_mha_v2_myl0_12\0 \0_gemm_mha_v2_myl0_12\0 fmha_v2_flash_attention_bf16_64_128"
    assert fused_attention.found(data) == {FusedKernel(None, None, None): 2}
    assert fused_attention.found(b"nothing of the kind") == {} and fused_attention.found(
        bytearray(b"fmha_x")
    ) == {FusedKernel(None, None, None): 1}
    assert fused_attention.complaint({}, "fp32", "x") == "" != fused_attention.complaint({}, "bf16", "x")


def test_attention_may_be_taken_apart_in_every_dtype():
    """What the builder is told, by package and version."""
    from types import SimpleNamespace

    for package, version in (("tensorrt", "10.16.1"), ("tensorrt", "11.4.0"), ("tensorrt-rtx", "1.7.1")):
        (item,) = (
            w
            for w in builder.workarounds(package, SimpleNamespace(__version__=version))
            if w.apply is builder._decompose_attention
        )
        attention = SimpleNamespace(decomposable=False)
        layer = type("Layer", (), {"type": "input", "attention": attention})()
        trt = SimpleNamespace(
            LayerType=SimpleNamespace(ATTENTION_INPUT="input"), IAttentionInputLayer=type(layer)
        )
        network = SimpleNamespace(num_layers=1, get_layer=lambda i, layer=layer: layer)
        item.apply(trt, network, None, "bf16")
        assert attention.decomposable is True
