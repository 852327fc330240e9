"""Parity and speed of our graphs on this GPU, stage by stage, compared with eager PyTorch and with the
machine's own limits.

    make gpu-report                            # on a GPU machine; works without network and without TensorRT
    python benchmarks/gpu/report.py --twin     # each stage's CPU twin, a tiny model: checks the script only

Each stage runs in its own process; a stage that fails or times out is reported, and the others continue.
Everything goes into one file, OUT/gpu-report-NAME.json: machine, versions, hashes of the artifacts, parity,
times, shares of the machine's limits, and failures with their reasons. The file is written after every stage
and can be shared as it is (docs/how-to/deploy-on-gpus.md); `benchmarks/reports/gpu.py` merges several.
Engines are built in a stage with its own time limit, after all stages that need no engine. The model fits the
GPU: 8 B parameters from 40 GiB on, else 1.5 B; --preset sdar-8b --block-length 4 chooses another, whose name
becomes part of the file's. Requires the packages in NEEDED; uses ONNX Runtime with CUDA,
cuda-bindings and TensorRT where they can be imported.
"""

from __future__ import annotations

import argparse
import importlib
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]

from reports import gpu as reports  # noqa: E402
from settings import TWIN, Settings, gpu_name, has_gpu, memory_gib, preset_for  # noqa: E402

# most informative first: when time runs out, the last ones are skipped
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
# the module and the function of each stage: a stage imports only what it needs
FUNCTIONS = {
    "environment": ("setup_stages", "environment"),
    "ceilings": ("kernels", "ceilings"),
    "kernels": ("kernels", "kernels"),
    "model": ("setup_stages", "model"),
    "torch": ("torch_stages", "torch_eager"),
    "torch_graph": ("torch_stages", "torch_graph"),
    "ort": ("backend_stages", "ort"),
    "build": ("backend_stages", "build"),
    "tensorrt": ("backend_stages", "tensorrt"),
    "tensorrt86": ("backend_stages", "tensorrt86"),
}
OWN_TIME = (
    "build",
    "tensorrt",
)  # outside the total time: an engine of 17 GB takes minutes to build, and its results are always wanted
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


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    results = ROOT / "benchmarks" / "results"
    option("--output", type=Path, default=results, help="the report's directory (default benchmarks/results)")
    option("--stages", default=",".join(STAGES), help=f"stages to run (default all: {','.join(STAGES)})")
    option("--twin", action="store_true", help="run the CPU twin of every stage")
    preset = "a preset of tools/random_checkpoint.py (default: the largest that fits the GPU)"
    option("--preset", help=preset)
    option("--block-length", type=int, help="tokens of a block (default 32; the twin: 8)")
    work = "a directory for checkpoint, artifact and engines, kept afterwards (default: a temporary one)"
    option("--work", type=Path, help=work)
    option("--tensorrt86", default="", help="where tools/unpack_tensorrt86.sh unpacked TensorRT 8.6")
    option("--stage-seconds", type=int, default=240, help="time limit per stage (default 240)")
    total = "time limit of all stages together, except those of engines (default 480)"
    option("--total-seconds", type=int, default=480, help=total)
    option("--build-seconds", type=int, default=1200, help="time limit for building engines (default 1200)")
    option(
        "--stage", help=argparse.SUPPRESS
    )  # in the child process: run one stage; settings come on standard input
    return parser


def main() -> None:
    args = _options().parse_args()
    if args.stage:
        child(args.stage, json.loads(sys.stdin.read()))
        return
    chosen = [name for name in args.stages.split(",") if name]
    _check(chosen, args.twin)
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        settings = Settings(
            str(work),
            str(work / "stages"),
            preset="" if args.preset or args.twin else preset_for(memory_gib()),
            tensorrt86=args.tensorrt86,
        )
        settings = replace(settings, **TWIN) if args.twin else settings  # type: ignore[arg-type]
        asked = {"preset": args.preset, "block_length": args.block_length}
        settings = replace(settings, **{name: value for name, value in asked.items() if value is not None})
        Path(settings.out).mkdir(parents=True, exist_ok=True)
        report = Report(args.output, settings, args.preset)
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


def _check(stages: list[str], is_twin: bool) -> None:
    """Exit with an error if these stages cannot run here."""
    if unknown := [name for name in stages if name not in STAGES]:
        raise SystemExit(f"error: unknown stage '{unknown[0]}': expected some of {', '.join(STAGES)}.")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise SystemExit(
            f"error: {sys.executable} lacks {', '.join(missing)}: run this with a Python that has them "
            f"(PYTHON=...)."
        )
    if not is_twin and not has_gpu():
        raise SystemExit(
            "error: PyTorch sees no GPU here: run this on a GPU machine, or --twin for the CPU twin of "
            "every stage."
        )


class Report:
    """The report file: the results of the stages so far."""

    def __init__(self, out: Path, settings: Settings, preset: str | None) -> None:
        name = "twin" if settings.is_twin else _slug(gpu_name())
        name += f"-{_slug(preset)}-block-{settings.block_length}" if preset else ""
        self.file, self.stages, self.settings = out / f"gpu-report-{name}.json", dict[str, Any](), settings

    def add(self, name: str, result: dict[str, Any]) -> None:
        self.stages[name] = result
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
        return [name for name, result in self.stages.items() if "failed" in result]

    def text(self) -> str:
        if "machine" not in self.stages.get("environment", {}):
            return "no table: the stage 'environment' did not run"
        return reports.table(self.stages)


def _hashes(manifest: Path) -> dict[str, str]:
    """SHA-256 of each file of an artifact."""
    return {
        name: facts["sha256"]
        for name, facts in json.loads(manifest.read_text(encoding="utf-8"))["files"].items()
    }


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("nvidia", "").replace("geforce", "")).strip("-")


def run(name: str, settings: Settings, most: float) -> dict[str, Any]:
    """Run one stage in its own process for at most `most` seconds; returns its result, or why it has none."""
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
        _, errors = process.communicate(json.dumps(asdict(settings)), timeout=most)
        trouble = f"{errors.strip()[-2000:]} (exit status {process.returncode})" if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children too
        process.communicate()
        trouble = f"took longer than {most:.0f} s"
    result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    result |= {"stage": name, "seconds": round(time.perf_counter() - begin, 1)} | (
        {"failed": trouble} if trouble else {}
    )
    state = f"FAILED: {reports.reason_of(trouble)}" if trouble else result.get("skipped") or "done"
    print(f"{name:12} {result['seconds']:7.1f} s  {state}", flush=True)
    return result


def child(name: str, options: dict[str, Any]) -> None:
    """Run a stage in this process. Its calls of `note` write partial results to disk at once."""
    settings = Settings(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    )
    result: dict[str, Any] = {
        "settings": {k: v for k, v in options.items() if k not in ("work", "out", "tensorrt86")}
    }
    file = Path(settings.out) / f"{name}.json"

    def note(**values: Any) -> None:
        result.update(values)
        write(file, result)

    try:
        module, function = FUNCTIONS[name]
        getattr(importlib.import_module(module), function)(settings, note)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def write(file: Path, result: dict[str, Any]) -> None:
    """Write a file atomically: a stage may be killed at any time."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


if __name__ == "__main__":
    main()
