"""What a quantised export of a checkpoint will contain, from its config.json: the same plan of weights as an
export makes, without any weights."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trt_runtime.artifact.manifest import ModelFacts, Quantization
from trt_runtime.errors import DllmError

from .. import pipeline, schemes
from ..checkpoint import huggingface as checkpoints
from ..checkpoint.huggingface import Checkpoint, StoredTensor
from ..families.base import Family, tensor_shapes
from ..graph.decoder import EMBEDDING, DecoderConfig
from ..schemes.base import Array, Calibration
from ..weights import plan as weights
from ..weights.sources import NUMPY_DTYPES

_CONFIG_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def quantised(
    name: str, dtype: str | None, scheme: str, target: str | None
) -> tuple[ModelFacts, Quantization]:
    """The facts of a checkpoint (a directory or hub id) as `scheme` stores it, with `weight_bytes` of
    weights.data, and the scheme. dtype: of everything else; None takes the one that an export would take.
    Raises DllmError."""
    kind = schemes.find(scheme, target)
    config, generation_config, where = checkpoints.config_of(name)
    dtype = dtype or ("fp32" if kind.dtypes[0] == "fp32" else "bf16")
    if dtype not in kind.dtypes:
        raise DllmError(
            f"--quantize {kind.name} for {kind.target} keeps everything else in {' or '.join(kind.dtypes)}, "
            f"but --dtype is {dtype}: remove --dtype, or give {kind.dtypes[0]}."
        )
    family, _, decoder = pipeline.understood(config, where)
    stored = _stored(Path(name), config, family, decoder)
    nothing = defaultdict[str, Array](
        lambda: np.ones(1, np.float32)
    )  # sizes do not depend on the calibration
    scheme_of = kind(dtype, Calibration(nothing, nothing) if kind.is_calibrated else None)
    planned = weights.plan(decoder, family, stored, dtype, scheme=scheme_of)
    facts = pipeline.checked_facts(config, generation_config, where, dtype)
    return replace(facts, weight_bytes=planned[-1].offset + planned[-1].size), Quantization(
        kind.name, kind.target
    )


def _stored(path: Path, config: dict[str, Any], family: Family, decoder: DecoderConfig) -> Checkpoint:
    """A checkpoint of the right shapes without data, in the dtype of the real one."""
    kind = NUMPY_DTYPES[_dtype(path, config, family.pieces(EMBEDDING)[0].tensor)]
    return Checkpoint(path, config, {}, _empty(path, kind, family, decoder))


def _empty(
    path: Path, kind: np.dtype[Any], family: Family, decoder: DecoderConfig
) -> dict[str, StoredTensor]:
    """Tensors of the shapes that the family's weights need."""
    return {
        name: StoredTensor(path, kind, shape, 0, math.prod(shape) * kind.itemsize)
        for name, shape in tensor_shapes(family, decoder).items()
    }


def _dtype(path: Path, config: dict[str, Any], embedding: str) -> str:
    """The dtype of the embedding, which a CPU artifact keeps: from its file if it is here, else from
    config.json."""
    if path.is_dir() and any(path.glob("*.safetensors")):
        try:
            stored: np.dtype[Any] = checkpoints.load(path).tensors[embedding].dtype
            return next(name for name, known in NUMPY_DTYPES.items() if known == stored)
        except (DllmError, KeyError):  # an export would report it; a forecast needs config.json only
            pass
    said = config.get("torch_dtype", config.get("dtype"))
    return _CONFIG_DTYPES.get(said if isinstance(said, str) else "", "bf16")
