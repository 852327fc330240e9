"""What a manifest says: the facts about a model, how it decodes, and the files of its artifact; and the
checks of their values. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from trt_runtime.artifact import check, contract
from trt_runtime.artifact.check import FileFacts
from trt_runtime.errors import DllmError, shown

_AGAIN = check.AGAIN
GUMBEL, CATEGORICAL, MULTINOMIAL = SAMPLINGS = ("gumbel", "categorical", "multinomial")
# what a position attends to: every position, or its own block and all before it
FULL, BLOCK_CAUSAL = ATTENTIONS = contract.ATTENTIONS
# where the blocks of block-causal attention are counted from: position 0, or the end of the prompt (whose
# first block is then the short one)
ABSOLUTE, PROMPT_END = ORIGINS = ("absolute", "prompt_end")
ORT_CPU, TENSORRT = TARGETS = ("ort-cpu", "tensorrt")  # targets of quantised artifacts
_MEASURED = (
    "kl_mean",
    "same_token",
    "same_commit",
    "judged",
    "right",
    "right_before",
)  # of quantization.quality, as readers show it


@dataclass(frozen=True)
class ExpertFacts:
    """The mixture of experts of a network: in `num_layers` of its layers, of `num_experts` SwiGLUs of
    `intermediate_size` each row passes `top_k`, and one of `shared_size` beside them (0: none). is_fused:
    the graph computes the chosen experts only, by ONNX Runtime's operator."""

    num_experts: int
    top_k: int
    intermediate_size: int
    num_layers: int
    shared_size: int = 0
    is_fused: bool = False


@dataclass(frozen=True)
class ModelFacts:
    """What the network is. `dtype` is one of contract.DTYPES; `max_length` is the longest canvas in tokens.

    intermediate_size: of the layers without experts, or of an expert if all have them. experts: None if no
    layer has them. parameters: of the network only. tied_head: whether the head is the embedding.
    weight_bytes: of a quantised model's weights as they are stored; None: `parameters` numbers of `dtype`.
    """

    family: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_length: int
    dtype: str
    parameters: int
    tied_head: bool = False
    weight_bytes: int | None = None
    experts: ExpertFacts | None = None


@dataclass(frozen=True)
class DecodingFacts:
    """How the model decodes. `logit_shift`: the logits of row i - logit_shift predict token i.

    sampling: how proposals are drawn, 'gumbel' (LLaDA), 'categorical' (Dream) or 'multinomial' (SDAR): see
    sampling.py.
    first_commit: with a cache, the block's prefix pass commits only the block's first position, whatever the
    policy (Dream).
    tuned: options of a generation (config.py) that 'dllm-trt tune' found best here; used where the user
    gives none.
    blocks_without_cache: whether cache=none decodes block by block when no block_length is given (Dream: the
    whole canvas).

    attention: one of ATTENTIONS. With block-causal attention:
    block_length: that of the training, used where the user gives none. block_origin: one of ORIGINS.
    next_from_store: the first token of a block comes from the last row of the forward that stores the block
    before it (Fast-dLLM v2). small_block: masks of this many positions of a block are decoded before the
    next (None: all).

    is_threshold_strict: confidences must exceed a threshold (LLaDA2), not only reach it.
    closing_token_id: a token after the answer's last position, which is attended to and never decoded (RND1).
    is_mask_known: False: nothing said which token is the mask, and mask_token_id stands for it. Such an
    artifact replays recorded cases, which name it, and decodes nothing else.
    """

    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    logit_shift: int
    defaults: dict[str, Any] = field(default_factory=dict)
    sampling: str = GUMBEL
    first_commit: bool = False
    blocks_without_cache: bool = True
    tuned: dict[str, Any] = field(default_factory=dict)
    attention: str = FULL
    block_length: int | None = None
    block_origin: str | None = None
    next_from_store: bool = False
    small_block: int | None = None
    is_threshold_strict: bool = False
    closing_token_id: int | None = None
    is_mask_known: bool = True

    @property
    def is_block_causal(self) -> bool:
        return self.attention == BLOCK_CAUSAL

    @property
    def special_token_ids(self) -> set[int]:
        """The tokens that are not part of a text."""
        return {self.mask_token_id, self.pad_token_id, *self.eos_token_ids}


# the facts of block-causal attention, and their values where attention is full
OF_BLOCKS = {"block_length": None, "block_origin": None, "next_from_store": False, "small_block": None}
# what readers of format 1 do not know, and what they take for granted
SINCE_2 = {"attention": FULL, **OF_BLOCKS, "is_threshold_strict": False, "closing_token_id": None,
           "is_mask_known": True}  # fmt: skip


@dataclass(frozen=True)
class Quantization:
    """How linear layers are quantised, and for what: `scheme` is a name of export/quantization, `target` one
    of TARGETS.

    Graphs for 'ort-cpu' contain ONNX Runtime's own operators, which run only on its CPU provider; those for
    'tensorrt' contain QuantizeLinear and DequantizeLinear. calibration: what it was calibrated on. quality:
    what the export's gate measured; None if it was skipped.
    """

    scheme: str
    target: str
    calibration: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None


@dataclass(frozen=True)
class GraphFacts:
    """File of a graph, and its inputs and outputs as [name, dtype, axes] rows: a copy of the contract for
    readers."""

    file: str
    inputs: list[Any]
    outputs: list[Any]


@dataclass(frozen=True)
class Manifest:
    """The whole manifest. `files` is keyed by the path relative to the artifact, with forward slashes.

    weight_maxima: the largest magnitude of each checkpoint tensor that is stored as it is, by the name of its
    initializer.
    """

    producer: dict[str, str]
    source: dict[str, Any]
    model: ModelFacts
    decoding: DecodingFacts
    head: str
    lowering: str
    opset: int
    graphs: dict[str, GraphFacts]
    files: dict[str, FileFacts]
    tokenizer: str | None = None
    verified: dict[str, Any] | None = None
    weight_maxima: dict[str, float] = field(default_factory=dict)
    quantization: Quantization | None = None

    @property
    def is_for_cpu(self) -> bool:
        """Whether the graphs have operators of ONNX Runtime's own, which run on its CPU provider alone."""
        quantised = self.quantization is not None and self.quantization.target == ORT_CPU
        return quantised or (self.model.experts is not None and self.model.experts.is_fused)

    @property
    def dims(self) -> contract.Dims:
        """What determines the inputs and outputs of its graphs."""
        sizes = (self.model.num_layers, self.model.num_kv_heads, self.model.head_dim, self.model.vocab_size)
        return contract.Dims(
            *sizes, contract.DTYPES[self.model.dtype], self.lowering, self.decoding.attention
        )


def check_notes(manifest: Manifest, where: str) -> None:
    """Check what tuning and the gate recorded, as far as readers use it."""
    for key, value in manifest.decoding.tuned.items():
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise DllmError(
                f"{where}: decoding.tuned: {key} is {shown(value)}, expected a number, a string or null: "
                f"tune it again."
            )
    measured = manifest.quantization.quality if manifest.quantization else None
    if measured is not None and (
        lacking := [key for key in _MEASURED if type(measured.get(key)) not in (int, float)]
    ):
        raise DllmError(
            f"{where}: quantization.quality: {lacking[0]} is {measured.get(lacking[0])!r}, expected a "
            f"number: {_AGAIN}."
        )


def check_facts(manifest: Manifest, where: str) -> None:
    model, decoding = manifest.model, manifest.decoding
    if not any(name.endswith(".data") for name in manifest.files):
        raise DllmError(f"{where}: files lists no weights (*.data): {_AGAIN}.")
    for key, value in decoding.defaults.items():
        if type(value) is not int or not 1 <= value < 2**31:
            raise DllmError(
                f"{where}: decoding.defaults: {key} is {value!r}, expected a whole number from 1: {_AGAIN}."
            )
    for item in fields(model):
        value = getattr(model, item.name)
        if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value < 2**48:
            raise DllmError(
                f"{where}: model.{item.name} is {str(value)[:40]}, expected a whole number from 1: {_AGAIN}."
            )
    if manifest.quantization is not None and manifest.quantization.target not in TARGETS:
        raise DllmError(
            f"{where}: quantization.target is {manifest.quantization.target!r}, expected one of "
            f"{list(TARGETS)}: {_AGAIN}."
        )
    if decoding.sampling not in SAMPLINGS:
        raise DllmError(
            f"{where}: decoding.sampling is {decoding.sampling!r}, expected one of {list(SAMPLINGS)}."
        )
    closing = [] if decoding.closing_token_id is None else [decoding.closing_token_id]
    for token in (decoding.mask_token_id, decoding.pad_token_id, *decoding.eos_token_ids, *closing):
        if not 0 <= token < model.vocab_size:
            raise DllmError(
                f"{where}: token id {token} is outside the vocabulary of {model.vocab_size}: {_AGAIN}."
            )
    if decoding.mask_token_id in decoding.eos_token_ids or decoding.logit_shift not in (0, 1):
        raise DllmError(
            f"{where}: mask token {decoding.mask_token_id}, end tokens {list(decoding.eos_token_ids)}, "
            f"logit_shift "
            f"{decoding.logit_shift}: expected a mask token that is not an end token, and a shift of 0 or 1: "
            f"{_AGAIN}."
        )
    # else the row before a refine window would be needed
    if decoding.logit_shift and not (decoding.first_commit or decoding.next_from_store):
        raise DllmError(
            f"{where}: logit_shift is {decoding.logit_shift} without first_commit or next_from_store, which "
            f"is not supported: {_AGAIN}."
        )
    _check_attention(decoding, where)
    _check_experts(model, where)


def _check_experts(model: ModelFacts, where: str) -> None:
    if (experts := model.experts) is None:
        return
    least = 1 <= experts.top_k <= experts.num_experts and 1 <= experts.num_layers <= model.num_layers
    if not least or experts.intermediate_size < 1 or experts.shared_size < 0:
        raise DllmError(f"{where}: model.experts is {shown(experts)}, which cannot be: {_AGAIN}.")


def _check_attention(decoding: DecodingFacts, where: str) -> None:
    if decoding.attention not in ATTENTIONS:
        raise DllmError(
            f"{where}: decoding.attention is {decoding.attention!r}, expected one of {list(ATTENTIONS)}: "
            f"{_AGAIN}."
        )
    if not decoding.is_block_causal:
        named = [name for name, default in OF_BLOCKS.items() if getattr(decoding, name) != default]
        if named:
            raise DllmError(f"{where}: decoding.{named[0]} is given, but attention is '{FULL}': {_AGAIN}.")
        return
    for name in ("first_commit", "closing_token_id"):
        if getattr(decoding, name) not in (False, None):
            raise DllmError(f"{where}: {name} with block-causal attention is not supported: {_AGAIN}.")
    lengths = {"block_length": decoding.block_length, "small_block": decoding.small_block or 1}
    for name, length in lengths.items():
        if length is None or not 1 <= length < 2**31:
            raise DllmError(
                f"{where}: decoding.{name} is {length}, expected a whole number from 1: {_AGAIN}."
            )
    if decoding.block_origin not in ORIGINS:
        raise DllmError(
            f"{where}: decoding.block_origin is {decoding.block_origin!r}, expected one of {list(ORIGINS)}: "
            f"{_AGAIN}."
        )
    if decoding.next_from_store != bool(decoding.logit_shift):
        raise DllmError(
            f"{where}: logit_shift is {decoding.logit_shift} and next_from_store "
            f"{decoding.next_from_store}: with block-causal attention they go together: {_AGAIN}."
        )
