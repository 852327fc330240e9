"""Evaluate the demo model on held-out prompts, decoded by ONNX Runtime: does parallel unmasking keep the answers right?

    python tools/evaluate_demo.py artifacts/llada-demo --output checkpoints/llada-demo/evaluation.json

Exact match: the answer is a right spelling of the plan (demo_task.is_right). Tokens a forward (TPF) counts the tokens before
the end of the answer over all forwards. The fixed schedules spread their forwards evenly over the blocks.
`--inputs FILE` writes prompts as inputs of decode cases instead, for `dllm-trt replay --record`.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path

import demo_task

import trt_runtime as rt

SEED = 20261123
VARIANTS = {
    "vanilla": rt.GenerationConfig(cache="none", policy="fixed"),
    "none, threshold 0.9": rt.GenerationConfig(cache="none", threshold=0.9),
    "prefix, threshold 0.9": rt.GenerationConfig(cache="prefix", threshold=0.9),
    "dual, threshold 0.9": rt.GenerationConfig(cache="dual", threshold=0.9),
    "dual, one a forward": rt.GenerationConfig(cache="dual", policy="fixed"),
    **{f"dual, fixed {n} forwards a block": rt.GenerationConfig(policy="fixed", steps=12 * n) for n in (4, 3, 2)},
    **{f"dual, threshold 0.9, block {n}": rt.GenerationConfig(block_length=n) for n in (16, 32)},
    "vanilla, block 32": rt.GenerationConfig(cache="none", policy="fixed", block_length=32),
}


def evaluate(model: rt.Model, examples: list[demo_task.Example], config: rt.GenerationConfig, batch: int) -> dict[str, float]:
    """Exact match (%), tokens a forward and mean forwards of one way of decoding."""
    right = useful = forwards = 0
    begin = time.perf_counter()
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        for example, result in zip(part, model.generate([e.prompt for e in part], config), strict=True):
            right += demo_task.is_right(result.text or "", example.plan)
            useful, forwards = useful + result.num_useful, forwards + result.nfe
    return {"exact_match": round(100 * right / len(examples), 1), "tokens_per_forward": round(useful / forwards, 2),
            "forwards": round(forwards / len(examples), 1), "seconds": round(time.perf_counter() - begin, 1)}  # fmt: skip


def case_inputs(model: rt.Model, examples: list[demo_task.Example]) -> list[dict[str, object]]:
    """Inputs of decode cases over these prompts, going through caches and policies in turn."""
    modes, policies = ("none", "prefix", "dual"), ({"threshold": 0.9}, {"threshold": None, "factor": 1.0}, {"threshold": 0.7})
    return [
        {"id": f"demo-{i}", "family": "llada", "mode": modes[i % 3], "prompt": [model.encode(example.prompt)],
         "gen_length": demo_task.GEN_LENGTH, "block_length": 8, "steps": 48, **policies[i // 3 % 3]}
        for i, example in enumerate(examples)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="the exported demo model")
    parser.add_argument("--count", type=int, default=500, help="held-out prompts (default 500)")
    parser.add_argument("--batch", type=int, default=20, help="rows decoded together (default 20)")
    parser.add_argument("--only", help="names of the ways of decoding, separated by ';' (default all)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--inputs", type=Path, help="write inputs of decode cases, and evaluate nothing")
    parser.add_argument("--prompts", type=Path, help="write the prompts, one a line, and evaluate nothing")
    args = parser.parse_args()
    model, rng = rt.load(args.artifact), random.Random(SEED)
    examples = [demo_task.draw(rng, held_out=True) for _ in range(args.count)]
    if args.inputs or args.prompts:
        if args.inputs:
            args.inputs.write_text(json.dumps({"cases": case_inputs(model, examples)}) + "\n")
        if args.prompts:
            args.prompts.write_text("".join(example.prompt + "\n" for example in examples))
        return
    import onnxruntime

    rows = {}
    for name in args.only.split(";") if args.only else VARIANTS:
        rows[name] = evaluate(model, examples, VARIANTS[name], args.batch)
        print(f"{name:34} {rows[name]}", flush=True)
    report = {"prompts": args.count, "seed": SEED, "rows": rows, "machine": platform.machine(),
              "versions": {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__}}  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
