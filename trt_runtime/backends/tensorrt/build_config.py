"""What to build: sizes, the engines and profiles of a layout, and which versions and GPUs can build it.

Layouts: `shared` is one engine of the refine graph with a profile for prefix passes and one for refine steps,
so that the weights are stored once; `split` is an engine for each graph. An engine has a fixed capacity of
the cache (TensorRT's cache update requires it).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trt_runtime.artifact import contract
from trt_runtime.artifact.contract import MODERN
from trt_runtime.artifact.manifest import DecodingFacts, Manifest
from trt_runtime.backends.tensorrt.builder import Profile, version_of
from trt_runtime.decoding.attention_options import may_fuse_stores
from trt_runtime.decoding.config import DEFAULT_BLOCK_LENGTH
from trt_runtime.decoding.plans import BlockCache
from trt_runtime.errors import DllmError, check_counts, unknown

BACKENDS = ("tensorrt", "tensorrt-rtx")
_REPLACED = ("experts", "head", "attention")  # parts of a network that have a kernel and an option
ENGINE_LAYOUTS = SHARED, SPLIT = ("shared", "split")
# compute capabilities that TensorRT-RTX builds for
SM_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
CAPACITY_STEP = (
    # the rows of a cache are rounded up to a multiple of this, so that slots begin at addresses that TensorRT
    # accepts
    64
)
# the first version of each that imports opset 24's Attention, RotaryEmbedding, RMSNormalization and
# TensorScatter
_MODERN_FROM = {"tensorrt": (10, 16), "tensorrt-rtx": (1, 7)}
_SINCE = {"strip": (10, 0), "plugins": (10, 16)}  # the first TensorRT version with an option
DENSE_ROWS = 128  # most rows of a pass for which dense experts are as fast as those of a kernel
SCHEME_FROM = {"fp8": 89}  # the first compute capability with the arithmetic of a scheme
_LEAST = {"tensorrt": (8, 6), "tensorrt-rtx": (1, 7)}


@dataclass(frozen=True)
class BuildConfig:
    """What to build. Sizes: rows per call, tokens of the longest canvas (the cache's capacity, rounded up),
    tokens of a block (None: 32, or the model's own block length if that is more).

    max_rows: positions whose statistics one forward may request; None is block_length (a Dream without blocks
    requests the whole canvas).
    targets: only for TensorRT-RTX. optimization_level: 0 to 5; None is the builder's own. strip: build
    without the weights, which are loaded from the artifact when the engine is opened. plugins: replace layers
    by the kernels of plugins/. experts_plugin: and also the experts of engines whose passes have more than
    DENSE_ROWS rows. head_plugin: and also the head, with the statistics. attention_plugin: and also the
    attention of refine steps in an engine of their own. inspect: also write what the builder made of each
    layer.
    """

    backend: str = "tensorrt"
    layout: str = SHARED
    targets: tuple[str, ...] = ()
    max_batch: int = 1
    max_length: int = 2048
    block_length: int | None = None
    max_rows: int | None = None
    optimization_level: int | None = None
    strip: bool = False
    plugins: bool = False
    inspect: bool = False
    experts_plugin: bool = False
    head_plugin: bool = False
    attention_plugin: bool = False

    @property
    def capacity(self) -> int:
        return -(-self.max_length // CAPACITY_STEP) * CAPACITY_STEP

    def replaces_attention(self, plan: EnginePlan) -> bool:
        """Whether the attention of an engine is a kernel of plugins/ (the layout is then split)."""
        return self.attention_plugin and plan.role == "refine"

    def checked(self, manifest: Manifest) -> BuildConfig:
        """This configuration, with the canvas limited to the model's. Raises DllmError."""
        for name, value, known in (
            ("backend", self.backend, BACKENDS),
            ("layout", self.layout, ENGINE_LAYOUTS),
        ):
            if value not in known:
                raise unknown(name, value, known)
        for target in self.targets:
            if target not in SM_TARGETS:
                raise unknown("target", target, SM_TARGETS)
        if self.targets and self.backend != "tensorrt-rtx":
            raise DllmError(
                f"--target {','.join(self.targets)} needs --backend tensorrt-rtx: TensorRT builds only for "
                f"this machine's GPU."
            )
        check_counts(self, "max_batch", "max_length", "block_length", "max_rows")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise DllmError(f"--optimization-level is {self.optimization_level}, expected 0 to 5.")
        for name in ("strip", "inspect"):
            if getattr(self, name) and self.backend != "tensorrt":
                raise DllmError(f"--{name} needs --backend tensorrt: TensorRT-RTX does not support it.")
        kernels = [name for name in _REPLACED if getattr(self, f"{name}_plugin")]
        for name in kernels:
            _check_plugin(self, manifest, name)
        # a scheduler's slots have spare rows beyond the longest canvas
        length = min(self.max_length, manifest.model.max_length + contract.SPARE_ROWS)
        most = max(DEFAULT_BLOCK_LENGTH, manifest.decoding.block_length or 0)
        block = min(self.block_length or most, length)
        return replace(
            self,
            max_length=length,
            block_length=block,
            max_rows=min(self.max_rows or block, length),
            plugins=self.plugins or bool(kernels),
        )


@dataclass(frozen=True)
class EnginePlan:
    """An engine to build: its name, its graph's role, and its profiles in order."""

    name: str
    role: str
    profiles: tuple[Profile, ...]

    @property
    def rows(self) -> int:
        """Rows of the usual pass of its largest profile."""
        return max(profile.batch[1] * profile.rows[1] for profile in self.profiles)


def _check_attention(config: BuildConfig, manifest: Manifest) -> None:
    """Raise DllmError if the kernel of attention cannot be used."""
    for has, what, mend in (
        (config.layout == SPLIT, f"the layout is {config.layout}", "add --layout split"),
        (
            manifest.lowering == MODERN,
            f"the lowering is {manifest.lowering}",
            "export with --lowering modern",
        ),
        (not manifest.decoding.is_block_causal, "the model has block-causal attention", "remove it"),
    ):
        if not has:
            raise DllmError(
                f"--attention-plugin is for refine steps in an engine of their own, over the cache up to one "
                f"length for each row, and {what}: {mend}."
            )


def _check_plugin(config: BuildConfig, manifest: Manifest, name: str) -> None:
    """Raise DllmError if the kernel of the experts or the head cannot be used. name: which."""
    if config.backend != "tensorrt":
        raise DllmError(f"--{name}-plugin needs --backend tensorrt: TensorRT-RTX supports no such plugins.")
    if name == "experts" and manifest.model.experts is None:
        raise DllmError(f"--experts-plugin: the model ({manifest.model.family}) has no experts: remove it.")
    if name == "head" and manifest.head == contract.LOGITS:
        raise DllmError(
            "--head-plugin: the artifact returns logits, which the kernel does not write: remove it, or "
            "export with --head statistics."
        )
    if name == "attention":
        _check_attention(config, manifest)
    elif manifest.quantization is not None:
        raise DllmError(
            f"--{name}-plugin: the kernel takes fp32, fp16 and bf16 weights, these are quantised "
            f"({manifest.quantization.scheme}): remove it, or export without --quantize."
        )


def plans(config: BuildConfig, facts: DecodingFacts) -> list[EnginePlan]:
    """The engines of a layout. A refine step takes up to a block, or two where a block's store is fused with
    the first step of the next."""
    batch, block = (1, 1, config.max_batch), config.block_length or DEFAULT_BLOCK_LENGTH
    rows = config.max_rows or block
    whole = Profile("prefix", batch, (1, config.max_length, config.max_length), (1, min(block, rows), rows))
    most = min(2 * block, config.max_length) if may_fuse_stores(BlockCache, facts) else block
    window = Profile("refine", batch, (1, block, most), (1, min(block, rows), min(block, rows)))
    if config.layout == SHARED:
        return [EnginePlan(SHARED, "refine", (whole, window))]
    return [
        EnginePlan("prefix", "prefix", (whole,)),
        EnginePlan("refine", "refine", (window, replace(whole, name="suffix"))),
    ]


def check_version(manifest: Manifest, config: BuildConfig, trt: Any) -> None:
    version, least = version_of(trt), _MODERN_FROM[config.backend]
    if version < _LEAST[config.backend]:
        oldest = ".".join(map(str, _LEAST[config.backend]))
        raise DllmError(
            f"{config.backend} {trt.__version__} is too old, expected {oldest} or newer: update it."
        )
    for name, since in _SINCE.items():
        if getattr(config, name) and config.backend == "tensorrt" and version < since:
            raise DllmError(
                f"--{name} needs TensorRT {'.'.join(map(str, since))} or newer, got {trt.__version__}: "
                f"remove it, or update TensorRT."
            )
    if manifest.lowering == MODERN and version < least:
        raise DllmError(
            f"the artifact uses the modern lowering, which needs {config.backend} "
            f"{'.'.join(map(str, least))} or newer, got {trt.__version__}: update it, or export with "
            f"--lowering legacy."
        )


def check_scheme(manifest: Manifest, capabilities: list[int]) -> None:
    scheme = manifest.quantization.scheme if manifest.quantization else ""
    least = SCHEME_FROM.get(scheme, 0)
    if older := [capability for capability in capabilities if capability < least]:
        raise DllmError(
            f"the artifact is quantised with {scheme}, which needs a GPU of SM{least} or newer, got "
            f"SM{older[0]}: export it with --quantize int8-sq or int4 --target tensorrt."
        )
