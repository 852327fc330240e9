"""What this GPU does with our graphs, stage by stage: parity, speed against eager PyTorch, and the share of
the machine's own limits.

    make gpu-report                                   # on a GPU machine; without network and without TensorRT too
    python benchmarks/gpu_report.py --twin            # every stage's CPU twin: a tiny model, no GPU; checks the script, measures nothing

Each stage is a process of its own; one that fails or runs out of its time says so, and the others go on.
Everything goes into one file, OUT/gpu-report-NAME.json: machine, versions, hashes of what was run, parity,
times, shares of the machine's limits, and what failed and why. It is on the disk after every stage, and may
be sent as it is (docs/how-to/deploy-on-gpus.md); `benchmarks/reports/gpu.py` merges several. Building engines is a stage
of its own with its own time, after all that needs none. The model fits the GPU: 8 B parameters from 40 GiB
on, else 1.5 B. Needs what NEEDED lists; ONNX Runtime with CUDA, cuda-bindings and TensorRT are used where
they can be imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]

from reports import gpu as reports  # noqa: E402

# the most telling first: when time runs out, the last are left
STAGES = (
    "environment",
    "ceilings",
    "kernels",
    "model",
    "torch",
    "ort",
    "torch_graph",
    "tensorrt86",
    "build",
    "tensorrt",
)
OWN_TIME = (
    "build",
    "tensorrt",
)  # not of the total: an engine of 17 GB takes minutes to build, and what it gives is wanted even then
LARGE_FROM = 40  # GiB: the reference runs the model in fp32
NEEDED = (
    "torch",
    "transformers",
    "triton",
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "ml_dtypes",
    "tokenizers",
    "jinja2",
    "safetensors",
)


@dataclass(frozen=True)
class Settings:
    """What is measured. tokens_per_forward: of the fixed schedule. repeats: timed calls of each kind."""

    work: str
    out: str
    device: str = "cuda"
    preset: str = "llada-8b"
    dtype: str = "bf16"
    canvases: tuple[int, ...] = (512, 1280)
    batches: tuple[int, ...] = (1, 8)
    block_length: int = 32
    gen_length: int = 256
    tokens_per_forward: float = 2.77
    repeats: int = 15
    vocabularies: tuple[int, ...] = (126_464, 152_064)
    tensorrt86: str = ""

    @property
    def is_twin(self) -> bool:
        return self.device == "cpu"

    @property
    def checkpoint(self) -> Path:
        return Path(self.work) / "checkpoint"

    @property
    def artifact(self) -> Path:
        return Path(self.work) / "artifact"

    @property
    def forwards_per_block(self) -> int:
        """Whole forwards of a block in a run of the loop: the schedule's, rounded up."""
        return -(-self.block_length * 100 // round(100 * self.tokens_per_forward))


TWIN = {
    "device": "cpu",
    "preset": "tiny",
    "dtype": "fp32",
    "canvases": (48, 64),
    "batches": (1, 2),
    "block_length": 8,
    "gen_length": 16,
    "repeats": 2,
    "vocabularies": (1000,),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results", help="where the report goes"
    )
    parser.add_argument(
        "--stages", default=",".join(STAGES), help=f"stages to run (default all: {','.join(STAGES)})"
    )
    parser.add_argument("--twin", action="store_true", help="run the CPU twin of every stage")
    parser.add_argument(
        "--preset", help="the random checkpoint, of tools/random_checkpoint.py (default: what fits the GPU)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="where checkpoint, artifact and engines go, kept (default a temporary directory)",
    )
    parser.add_argument(
        "--tensorrt86", default="", help="where tools/unpack_tensorrt86.sh unpacked TensorRT 8.6"
    )
    parser.add_argument(
        "--stage-seconds", type=int, default=240, help="the longest that a stage may take (default 240)"
    )
    parser.add_argument(
        "--total-seconds",
        type=int,
        default=480,
        help="the longest that all of them may take, but for engines (default 480)",
    )
    parser.add_argument(
        "--build-seconds",
        type=int,
        default=1200,
        help="the longest that building engines may take (default 1200)",
    )
    parser.add_argument(
        "--stage", help=argparse.SUPPRESS
    )  # the child: run one stage of the settings on standard input
    args = parser.parse_args()
    if args.stage:
        child(args.stage, json.loads(sys.stdin.read()))
        return
    chosen = [name for name in args.stages.split(",") if name]
    if unknown := [name for name in chosen if name not in STAGES]:
        raise SystemExit(f"error: unknown stage '{unknown[0]}': expected some of {', '.join(STAGES)}.")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise SystemExit(
            f"error: {sys.executable} lacks {', '.join(missing)}: run this with a Python that has them "
            f"(PYTHON=...)."
        )
    if not args.twin and not has_gpu():
        raise SystemExit(
            "error: PyTorch sees no GPU here: run this on a GPU machine, or --twin for the CPU twin of "
            "every stage."
        )
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        settings = Settings(
            str(work),
            str(work / "stages"),
            preset=args.preset or preset_for(memory_gib()),
            tensorrt86=args.tensorrt86,
        )
        settings = replace(settings, **TWIN) if args.twin else settings  # type: ignore[arg-type]
        Path(settings.out).mkdir(parents=True, exist_ok=True)
        report = Report(args.output, settings)
        deadline = time.perf_counter() + args.total_seconds
        for name in chosen:
            most = min(args.stage_seconds, deadline - time.perf_counter())
            if name in OWN_TIME:
                most = args.build_seconds if name == "build" else args.stage_seconds
            report.add(name, run(name, settings, most))
    print(f"\n{report.text()}\n\n{report.file} written: to contribute it, see docs/how-to/deploy-on-gpus.md")
    if failed := report.failed:
        raise SystemExit(
            f"error: failed: {', '.join(failed)}; the other stages' results are in {report.file}."
        )


class Report:
    """The one file: what each stage found, so far."""

    def __init__(self, out: Path, settings: Settings) -> None:
        name = "twin" if settings.is_twin else _slug(gpu_name())
        self.file, self.stages, self.settings = out / f"gpu-report-{name}.json", dict[str, Any](), settings

    def add(self, name: str, held: dict[str, Any]) -> None:
        self.stages[name] = held
        artifacts = {
            path.parent.name: _hashes(path)
            for path in sorted(Path(self.settings.work).glob("*/manifest.json"))
        }
        write(
            self.file,
            {
                "format": reports.FORMAT,
                "format_version": reports.VERSION,
                "artifacts": artifacts,
                "stages": self.stages,
            },
        )

    @property
    def failed(self) -> list[str]:
        return [name for name, held in self.stages.items() if "failed" in held]

    def text(self) -> str:
        if "machine" not in self.stages.get("environment", {}):
            return "no table: the stage 'environment' did not run"
        return reports.table(self.stages)


def _hashes(manifest: Path) -> dict[str, str]:
    """What was run, by file."""
    return {
        name: facts["sha256"]
        for name, facts in json.loads(manifest.read_text(encoding="utf-8"))["files"].items()
    }


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("nvidia", "").replace("geforce", "")).strip("-")


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def gpu_name() -> str:
    import torch

    return str(torch.cuda.get_device_properties(0).name)


def memory_gib() -> float:
    """Of the GPU; 0 without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def preset_for(gib: float) -> str:
    """The model that a GPU of so much memory takes, PyTorch's fp32 included: 8 B parameters are 32 GB then,
    1.5 B are 6 GB (where even these do not fit, the reference of parity runs on the host:
    gpu_speed.torch_eager)."""
    return "llada-8b" if gib >= LARGE_FROM else "llada-1.5b"


def run(name: str, settings: Settings, most: float) -> dict[str, Any]:
    """One stage in a process of its own, with at most so many seconds: its result, or why there is none."""
    file, begin = Path(settings.out) / f"{name}.json", time.perf_counter()
    if most < 5:
        print(f"{name:12} {0:7.1f} s  no time was left", flush=True)
        return {"stage": name, "skipped": "no time was left"}
    environment = dict(os.environ) | ({"TRITON_INTERPRET": "1"} if settings.is_twin else {})
    command = [sys.executable, __file__, "--stage", name]
    file.unlink(missing_ok=True)
    process = subprocess.Popen(
        command,
        text=True,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, said = process.communicate(json.dumps(asdict(settings)), timeout=most)
        trouble = f"{said.strip()[-2000:]} (exit status {process.returncode})" if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it started too
        process.communicate()
        trouble = f"took longer than {most:.0f} s"
    held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    held |= {"stage": name, "seconds": round(time.perf_counter() - begin, 1)} | (
        {"failed": trouble} if trouble else {}
    )
    state = f"FAILED: {trouble.splitlines()[-1]}" if trouble else held.get("skipped") or "done"
    print(f"{name:12} {held['seconds']:7.1f} s  {state}", flush=True)
    return held


def child(name: str, given: dict[str, Any]) -> None:
    """Run a stage here. What it notes on the way is on disk at once (`note`)."""
    import gpu_kernels
    import gpu_speed

    settings = Settings(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    )
    functions = {
        "environment": environment,
        "ceilings": gpu_kernels.ceilings,
        "kernels": gpu_kernels.kernels,
        "model": model,
        "torch": gpu_speed.torch_eager,
        "torch_graph": gpu_speed.torch_graph,
        "ort": gpu_speed.ort,
        "build": gpu_speed.build,
        "tensorrt": gpu_speed.tensorrt,
        "tensorrt86": gpu_speed.tensorrt86,
    }
    held: dict[str, Any] = {
        "settings": {k: v for k, v in given.items() if k not in ("work", "out", "tensorrt86")}
    }
    file = Path(settings.out) / f"{name}.json"

    def note(**values: Any) -> None:
        held.update(values)
        write(file, held)

    try:
        functions[name](settings, note)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def write(file: Path, held: dict[str, Any]) -> None:
    """As a whole or not at all: a stage may be killed at any time."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def environment(settings: Settings, note: Any) -> None:
    """The machine, the GPU, the versions, the commit."""
    import importlib.metadata

    import torch

    from trt_runtime.measure.bench import machine

    found = machine()
    for package in ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "triton", "onnx", "cuda-bindings"):
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    note(
        machine=found,
        commit=done.stdout.strip() or None,
        utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    if not settings.is_twin:
        facts = torch.cuda.get_device_properties(0)
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        note(
            gpu={
                "name": facts.name,
                "memory_gib": round(facts.total_memory / 2**30, 1),
                "capability": f"{facts.major}.{facts.minor}",
                "multiprocessors": facts.multi_processor_count,
                "driver": driver,
                "cuda": torch.version.cuda,
            }
        )


def model(settings: Settings, note: Any) -> None:
    """A random checkpoint of the published layout, and its export with linked weights."""
    import random_checkpoint

    from export import families

    config, dtype = random_checkpoint.PRESETS.get(
        settings.preset, (families.find("llada").tiny_config(), settings.dtype)
    )
    begin = time.perf_counter()
    random_checkpoint.write(config, settings.checkpoint, dtype)
    size = sum(file.stat().st_size for file in settings.checkpoint.iterdir())
    note(
        preset=settings.preset,
        checkpoint_bytes=size,
        checkpoint_seconds=round(time.perf_counter() - begin, 1),
    )
    begin = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "export",
        "--checkpoint",
        str(settings.checkpoint),
        "--out",
        str(settings.artifact),
        "--dtype",
        settings.dtype,
        "--weights",
        "link",
        "--verify",
        "no",
        "--overwrite",
        "--lowering",
        "modern",
    ]
    subprocess.run(
        command, cwd=ROOT, check=True, env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    )
    note(export_seconds=round(time.perf_counter() - begin, 1))


if __name__ == "__main__":
    main()
