"""The peak memory of a generation, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from trt_runtime.backends import REFERENCE, open_backend
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.errors import DllmError
from trt_runtime.model import Model


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def peak_memory(
    model: Model,
    label: str,
    config: GenerationConfig,
    *,
    prompt_length: int,
    threads: int | None,
    checkpoint: str | None,
) -> float:
    """Peak resident memory (MiB) of a fresh process that opens the artifact and generates once with both
    roles. Raises DllmError."""
    dtype = label.partition(" ")[2] if model.backend.name == REFERENCE else ""
    job = {
        "artifact": str(model.path),
        "backend": model.backend.name,
        "prompt_length": prompt_length,
        "threads": threads,
        "checkpoint": checkpoint,
        "dtype": dtype,
        "gen_length": config.gen_length,
        "block_length": config.block_length,
    }
    command = [sys.executable, "-m", "trt_runtime.measure.peak_memory", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DllmError(
            f"the memory measurement failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
        )
    return float(done.stdout)


def _child() -> None:
    job = json.loads(sys.argv[1])
    extra = {"checkpoint": job["checkpoint"]} if job["checkpoint"] and job["backend"] == REFERENCE else {}
    extra |= {"dtype": job["dtype"]} if job["dtype"] else {}
    backend = open_backend(job["backend"], Path(job["artifact"]), threads=job["threads"], **extra)
    model = Model(Path(job["artifact"]), backend)
    room = model.manifest.model.max_length - job["gen_length"]
    token = 0 if model.manifest.decoding.mask_token_id else 1
    config = GenerationConfig(
        gen_length=job["gen_length"], block_length=job["block_length"], stop_at_eos=False
    )
    model.generate([[token] * max(1, min(room, job["prompt_length"]))], config)
    # not getrusage: its peak survives fork and exec, so it would be that of the parent process
    peak = next(line for line in _lines("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)


if __name__ == "__main__":
    _child()
