"""Run by report.py with the packed Python 3.11: a legacy fp16 artifact on TensorRT 8.6, compared with ONNX
Runtime.

    run python3 benchmarks/gpu/tensorrt86.py ARTIFACT CANVAS BLOCK    # prints one line of JSON

ARTIFACT/../legacy.npz holds the outputs of ONNX Runtime.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2]))

from windows import windows

from trt_runtime.backends.tensorrt import store
from trt_runtime.backends.tensorrt.backend import TensorRTBackend
from trt_runtime.backends.tensorrt.store import BuildConfig


def main(artifact: Path, canvas: int, block: int) -> None:
    engines, begin = artifact.parent / "engines86", time.perf_counter()
    store.build(artifact, engines, BuildConfig(max_length=canvas, block_length=block, max_rows=block))
    report: dict[str, object] = {"build_seconds": round(time.perf_counter() - begin, 1)}
    backend = TensorRTBackend(artifact, engines=engines)
    full, step = windows(backend.manifest, 1, canvas, block)
    cache, expected = backend.new_cache(1, canvas), np.load(artifact.parent / "legacy.npz")
    for role, call, window in (("prefix", backend.prefix, full), ("refine", backend.refine, step)):
        stats, taken = call(cache, slice(0, 1), window), []
        for _ in range(20):
            begin = time.perf_counter()
            call(cache, slice(0, 1), window)
            taken.append(1000 * (time.perf_counter() - begin))
        report[role] = {
            "ms": statistics.median(taken),
            "tokens_as_onnxruntime": float((stats.token == expected[f"{role} token"]).mean()),
            "confidence_apart": float(np.abs(stats.confidence - expected[f"{role} confidence"]).max()),
        }
    print(json.dumps(report | {"versions": {"tensorrt": backend._trt.__version__}}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
