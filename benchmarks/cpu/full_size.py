"""Benchmark: export of a full-size checkpoint compared with a plain copy of the same files, and
parity of a full-width model of two layers.

    python benchmarks/cpu/full_size.py --model llada --output benchmarks/results

Writes a random checkpoint of the published layout (LLaDA-8B, Dream-7B, SDAR-8B, ...; bf16, up to 16 GB), then
in turn copies its files (cp) and exports it (--weights copy and link), each followed by a sync that is part
of its time. Memory is the peak of the process. With --parity the same width with two layers is exported in
fp32 and verified against PyTorch. With --quantized it is exported in 8 and in 4 bits for the CPU instead, and
each artifact decodes one block after a prompt of 128 tokens in a process of its own. Needs 50 GB of disk, and
20 GB of memory for the parity and the quantised ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from trt_runtime.artifact import manifest as manifests
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.measure.bench import Timed, machine
from trt_runtime.model import Model, load

ROOT = Path(__file__).resolve().parents[2]
PRESETS = {
    "llada": "llada-8b",
    "dream": "dream-7b",
    "sdar": "sdar-8b",
    "fast-dllm-v2": "fast-dllm-v2-7b",
    "a2d": "a2d-qwen3-0.6b",
    "llada-moe": "llada-moe-7b",
    "llada2": "llada2-mini",
    "rnd1": "rnd1-30b",
    "sdar-30b": "sdar-30b",
}
_OF_EXPERTS = {PRESETS[name] for name in ("llada-moe", "llada2", "rnd1", "sdar-30b")}  # cannot be linked
_EXPORT = {"a2d": ("--attention", "block_causal")}  # options of a model's export


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(PRESETS), default="llada", help="the model (default llada)")
    parser.add_argument("--repeats", type=int, default=2, help="interleaved rounds (default 2)")
    parser.add_argument("--parity", action="store_true", help="also verify a full-width model of two layers")
    parser.add_argument(
        "--quantized", action="store_true", help="only export quantised artifacts, and run them"
    )
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--scratch",
        type=Path,
        help="a directory on the disk to measure (default: the system's temporary directory)",
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the JSON result"
    )
    args = parser.parse_args()
    preset, told = PRESETS[args.model], _EXPORT.get(args.model, ())
    if args.decode:
        print(json.dumps(decode(args.decode)))
        return
    report: dict[str, Any] = {"preset": preset, "machine": machine()}
    with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
        figures = (
            quantised(preset, Path(temporary))
            if args.quantized
            else measure(preset, Path(temporary), args.repeats, told)
        )
    report |= figures
    if args.parity:
        with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
            report["parity"] = parity(f"{preset}-2layers", Path(temporary), told)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"full-size-{preset}{'-quantised' if args.quantized else ''}.json").write_text(
        json.dumps(report, indent=1) + "\n"
    )
    print(json.dumps(report, indent=1))


def measure(preset: str, scratch: Path, repeats: int, told: tuple[str, ...]) -> dict[str, Any]:
    """Seconds and peak memory of cp, export and linked export, run in turn."""
    checkpoint, out = scratch / preset, scratch / "out"
    run("tools/random_checkpoint.py", "--preset", preset, str(checkpoint))
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    export = [
        sys.executable,
        "-m",
        "export",
        "--checkpoint",
        str(checkpoint),
        "--dtype",
        "bf16",
        "--out",
        str(out),
        "--verify",
        "no",
        *told,
    ]
    commands = {
        "cp": ["cp", "-r", str(checkpoint), str(out)],
        "export": export,
        **({} if preset in _OF_EXPERTS else {"export, linked": [*export, "--weights", "link"]}),
    }
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            os.sync()
            begin = time.perf_counter()
            memory = peak(command)
            os.sync()
            samples[name].append((time.perf_counter() - begin, memory))
            written = out / manifests.FILE_NAME
            if written.is_file():
                manifests.load(out)
            shutil.rmtree(out)
    rows = {
        name: {"seconds": [round(s, 1) for s, _ in taken], "peak_memory_mib": round(max(m for _, m in taken))}
        for name, taken in samples.items()
    }
    medians = {name: statistics.median(row["seconds"]) for name, row in rows.items()}
    return {"bytes": size, "rows": rows, "export_over_cp": medians["export"] / medians["cp"]}


def quantised(preset: str, scratch: Path) -> dict[str, Any]:
    """Per scheme: seconds and peak memory of the export, bytes of the artifact, and the cost of decoding a
    block."""
    checkpoint, rows = scratch / preset, {}
    run("tools/random_checkpoint.py", "--preset", preset, str(checkpoint))
    for scheme in ("w8a8", "int4"):
        out, begin = scratch / scheme, time.perf_counter()
        memory = peak(
            [
                sys.executable,
                "-m",
                "export",
                "--checkpoint",
                str(checkpoint),
                "--out",
                str(out),
                "--verify",
                "no",
                "--quantize",
                scheme,
                "--gate",
                "no",
            ]
        )
        seconds = time.perf_counter() - begin
        done = subprocess.run(
            [sys.executable, __file__, "--decode", str(out)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        size = sum(facts.size for facts in manifests.load(out).files.values())
        rows[scheme] = {
            "export_seconds": round(seconds, 1),
            "export_peak_memory_mib": round(memory),
            "bytes": size,
            **json.loads(done.stdout),
        }
        print(scheme, rows[scheme], flush=True)
        shutil.rmtree(out)
    return {"quantised": rows}


def decode(artifact: Path) -> dict[str, Any]:
    """One block of 32 tokens after a prompt of 128, two tokens per forward, dual cache: the second time, with
    the forwards' median ms."""
    begin = time.perf_counter()
    model = load(artifact)
    opened = time.perf_counter() - begin
    timed = Timed(model.backend)
    clocked = Model(artifact, timed)  # type: ignore[arg-type]
    config = GenerationConfig(gen_length=32, block_length=32, policy="fixed", steps=16, stop_at_eos=False)
    for _ in range(2):
        timed.seconds.clear()
        begin = time.perf_counter()
        clocked.generate([list(range(1000, 1128))], config)
        seconds = time.perf_counter() - begin
    kept = next(
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("VmHWM")
    )
    return {
        "open_seconds": round(opened, 1),
        "tokens_per_second": round(32 / seconds, 2),
        "prefix_ms": round(1000 * statistics.median(timed.seconds["prefix"])),
        "refine_ms": round(1000 * statistics.median(timed.seconds["refine"])),
        "decode_peak_memory_mib": round(int(kept.split()[1]) / 1024),
    }


def parity(preset: str, scratch: Path, told: tuple[str, ...]) -> dict[str, Any]:
    """The verdict of `verify` on the full-width model, in fp32 on ONNX Runtime."""
    run("tools/random_checkpoint.py", "--preset", preset, str(scratch / preset))
    run(
        "-m",
        "export",
        "--checkpoint",
        str(scratch / preset),
        "--out",
        str(scratch / "out"),
        "--verify",
        "yes",
        *told,
    )
    return {"preset": preset, **(manifests.load(scratch / "out").verified or {})}


def peak(command: list[str]) -> float:
    """Run a command and return its peak resident memory in MiB."""
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"error: exit status {os.waitstatus_to_exitcode(status)}: {' '.join(command)}")
    return usage.ru_maxrss / 1024


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
