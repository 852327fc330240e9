"""The PyTorch reference: the family's network from code that is not ours, as a backend of the same runtime.

Its weights are read from the checkpoint itself, not from the artifact, and none of the network's code is
ours: if an artifact agrees with it, it was exported correctly. It is also the eager PyTorch baseline of the
benchmarks.

Shape letters: B rows of the call, S rows of the window, R rows with outputs, C capacity, H KV heads, D
head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trt_runtime.artifact import contract
from trt_runtime.artifact import manifest as manifests
from trt_runtime.decoding.backend import Backend, Cache, Stats, Window
from trt_runtime.errors import DllmError

from .. import pipeline
from ..checkpoint.huggingface import StoredTensor
from ..families.base import Reference
from ..graph import decoder as decoders
from ..graph.feed_forward import EXPERTS_BESIDE
from ..weights.sources import FromCheckpoint

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class _Writer:
    """Replaces a transformers cache: writes a window's keys and values, and returns those that the layer
    attends to."""

    buffers: list[tuple[torch.Tensor, torch.Tensor]]  # [B, H, C, D] per layer
    # [B], on the host: reading it from a GPU in every layer would synchronise each time
    write_index: list[int]
    own_rows_only: bool

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = key.shape[2]
        first = self.write_index[0]
        for buffer, new in zip(self.buffers[layer_idx], (key, value), strict=True):
            if self.write_index == [first] * len(self.write_index):
                buffer[:, :, first : first + rows] = new
                continue
            for b, start in enumerate(self.write_index):
                buffer[b, :, start : start + rows] = new[b]
        return (key, value) if self.own_rows_only else self.buffers[layer_idx]


class TorchBackend(Backend):
    """The checkpoint behind an artifact, in eager PyTorch on a CPU or GPU. checkpoint: its directory or hub
    id; None takes the one in the manifest. dtype: None takes the artifact's."""

    name = "torch"

    def __init__(
        self,
        artifact: Path,
        *,
        checkpoint: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        device: str = "cpu",
    ) -> None:
        facts = manifests.load(artifact)
        source = source_of(facts, checkpoint, artifact)
        # the checkpoint also determines how to decode; only end tokens and defaults are the artifact's, which
        # has the tokenizer
        decoding = replace(
            source.decoding, eos_token_ids=facts.decoding.eos_token_ids, defaults=facts.decoding.defaults
        )
        self.artifact, self.manifest, self.source = artifact, replace(facts, decoding=decoding), source
        self.device, self.dtype = torch.device(device), TORCH_DTYPES[dtype or facts.model.dtype]
        if threads is not None:
            torch.set_num_threads(threads)
        self.network = _load(source, self.dtype)
        self.network.module.to(self.device)

    @property
    def gives_logits(self) -> bool:
        return True

    def new_cache(self, batch: int, capacity: int) -> Cache:
        model = self.manifest.model
        shape = (batch, model.num_kv_heads, capacity, model.head_dim)
        zeros = [
            torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2 * model.num_layers)
        ]
        return Cache(batch, capacity, list(zip(zeros[::2], zeros[1::2], strict=True)))

    def read_cache(self, cache: Cache, slots: slice) -> dict[str, np.ndarray[Any, Any]]:
        tensors = [tensor for pair in cache.buffers for tensor in pair]
        names = contract.cache_names("cache", self.manifest.dims)
        return {
            name: tensor[slots].float().cpu().numpy().copy()
            for name, tensor in zip(names, tensors, strict=True)
        }

    def write_cache(self, cache: Cache, slots: slice, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        tensors = [tensor for pair in cache.buffers for tensor in pair]
        for name, tensor in zip(contract.cache_names("cache", self.manifest.dims), tensors, strict=True):
            tensor[slots] = torch.from_numpy(np.ascontiguousarray(arrays[name], np.float32)).to(tensor)

    def close(self) -> None:
        del self.network

    @torch.inference_mode()
    def _forward(self, role: str, cache: Cache, slots: slice, window: Window, want_logits: bool) -> Stats:
        logits = self.logits(cache, slots, window, own_rows_only=role == "prefix")
        allowed = logits.clone()
        allowed[..., self.manifest.decoding.mask_token_id] = -torch.inf
        token = allowed.argmax(-1, keepdim=True)
        proposed = allowed.gather(-1, token)
        runner_up = allowed.scatter(-1, token, -torch.inf).amax(-1, keepdim=True)
        log_total = logits.logsumexp(-1, keepdim=True)
        probability = (logits - log_total).exp()
        entropy = log_total[..., 0] - (probability * logits).sum(-1)
        arrays = [
            token[..., 0],
            (proposed - log_total).exp()[..., 0],
            (runner_up - log_total).exp()[..., 0],
            entropy,
        ]
        numpy = [array.cpu().numpy() for array in arrays]
        return Stats(numpy[0], numpy[1], numpy[2], numpy[3], logits.cpu().numpy() if want_logits else None)

    def logits(self, cache: Cache, slots: slice, window: Window, *, own_rows_only: bool) -> torch.Tensor:
        """float32 logits [B, R, V] of the requested rows; the caches of `slots` are updated."""
        tensors = {
            name: torch.from_numpy(getattr(window, name)).to(self.device)
            for name in ("input_ids", "position_ids", "kv_len", "logit_rows")
        }
        keys = window.input_ids.shape[1] if own_rows_only else cache.capacity
        limit = tensors["kv_len"] if window.row_len is None else torch.from_numpy(window.row_len)
        limit = limit.to(self.device).reshape(len(window.input_ids), -1, 1)  # [B, 1 or S, 1]
        valid = torch.arange(keys, device=self.device) < limit
        mask = torch.zeros(valid.shape, dtype=self.dtype, device=self.device).masked_fill(~valid, -30000.0)
        mask = mask[:, None].expand(-1, 1, window.input_ids.shape[1], -1)
        buffers = [(key[slots], value[slots]) for key, value in cache.buffers]
        writer = _Writer(buffers, window.write_index.tolist(), own_rows_only)
        hidden = self.network.hidden_states(tensors["input_ids"], tensors["position_ids"], mask, writer)
        wanted = tensors["logit_rows"][..., None].expand(-1, -1, hidden.shape[-1])
        logits: torch.Tensor = self.network.logits(hidden.gather(1, wanted))
        return logits


@dataclass(frozen=True)
class Provenance:
    """The checkpoint behind an artifact, and what its export was told: config keys to ignore, the mask token,
    the attention, the block length."""

    checkpoint: str
    ignored_keys: tuple[str, ...]
    mask_token: str | None
    attention: str | None
    block_length: int | None


def origin(manifest: manifests.Manifest, checkpoint: str | None) -> Provenance:
    """Where an artifact comes from. checkpoint: replaces the manifest's own. Raises DllmError."""
    name = checkpoint or manifest.source.get("checkpoint")
    if not isinstance(name, str):
        raise DllmError("the manifest names no checkpoint: give it with --checkpoint.")
    ignored = manifest.source.get("ignored_keys", [])
    if not isinstance(ignored, list) or not all(isinstance(key, str) for key in ignored):
        raise DllmError(
            f"the manifest's source.ignored_keys is {ignored!r}, expected a list of names: export it again."
        )
    mask = manifest.source.get("mask_token")
    if mask is not None and (type(mask) is not int or mask < 0):
        raise DllmError(
            f"the manifest's source.mask_token is {mask!r}, expected a token id: export it again."
        )
    attention = manifest.source.get("attention")
    if attention not in (None, *manifests.ATTENTIONS):
        raise DllmError(
            f"the manifest's source.attention is {attention!r}, expected one of "
            f"{', '.join(manifests.ATTENTIONS)}: export it again."
        )
    length = manifest.source.get("block_length")
    if length is not None and (type(length) is not int or length < 1):
        raise DllmError(
            f"the manifest's source.block_length is {length!r}, expected a whole number from 1: export it "
            f"again."
        )
    return Provenance(name, tuple(ignored), None if mask is None else str(mask), attention, length)


def source_of(manifest: manifests.Manifest, checkpoint: str | None, artifact: Path) -> pipeline.Source:
    """The checkpoint behind an artifact, read. Raises DllmError if it is a different one."""
    told = origin(manifest, checkpoint)
    source = pipeline.read(
        told.checkpoint,
        ignored_keys=told.ignored_keys,
        mask_token=told.mask_token,
        attention=told.attention,
        block_length=told.block_length,
    )
    expected, got = (
        manifest.source.get("config_sha256"),
        manifests.sha256_of(source.checkpoint.path / "config.json"),
    )
    if expected != got:
        raise DllmError(
            f"{told.checkpoint}: its config.json differs from the one that {artifact} was exported "
            "from: give the original checkpoint."
        )
    return source


def _load(source: pipeline.Source, dtype: torch.dtype) -> Reference:
    """The family's reference with the checkpoint's weights. Raises DllmError."""
    reference = source.family.reference(source.decoder)
    state = {}
    for weight, shape in decoders.weight_shapes(source.decoder).items():
        as_stored = source.family.stored_as(weight, source.decoder)
        pieces = [_tensor(stored) for stored in FromCheckpoint.of(source.checkpoint, as_stored).stored]
        axis = 1 if as_stored.join == EXPERTS_BESIDE else 0
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)
        state[weight] = whole.reshape(shape).to(dtype)
    try:
        reference.load(state, dtype)
    except DllmError as error:
        raise DllmError(f"{source.checkpoint.path}: {error}") from error
    return reference


def _tensor(stored: StoredTensor) -> torch.Tensor:
    flat = np.array(stored.open())
    if flat.dtype.name == "bfloat16":
        return torch.from_numpy(flat.view(np.int16)).view(torch.bfloat16).reshape(stored.shape)
    return torch.from_numpy(flat).reshape(stored.shape)
