"""Benchmark: a random LLaDA of 140 M parameters on ONNX Runtime against the PyTorch reference, one thread, side by side.

    python benchmarks/llada_140m.py --output benchmarks/results

12 layers, d 768, vocabulary 32k; prompt 256, gen_length 128, blocks of 32, two tokens a forward (vanilla: one), fp32. Both sides run the same
loop over the same weights (`dllm-trt bench`); PyTorch is eager, with scaled_dot_product_attention and the head computed only
on the rows that are used.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the JSON result")
    parser.add_argument("--threads", type=int, default=1, help="threads of a matrix product (default 1)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs (default 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, artifact = f"{temporary}/llada-140m", f"{temporary}/artifact"
        run("tools/random_checkpoint.py", "--preset", "llada-140m", checkpoint)
        run("-m", "export", "--checkpoint", checkpoint, "--out", artifact, "--verify", "no")
        args.output.mkdir(parents=True, exist_ok=True)
        run("-m", "trt_runtime.cli", "bench", artifact, "--prompt-length", "256", "--gen-length", "128", "--block-length", "32",
            "--tokens-per-step", "2", "--count", "1", "--repeats", str(args.repeats), "--threads", str(args.threads),
            "--variants", "none,prefix,dual", "--reference", "vanilla,none,dual", "--output", str(args.output / f"llada-140m-{args.threads}-thread.json"))  # fmt: skip


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
