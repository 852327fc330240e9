"""Held-out prompts of the demo model's task (demo_task.py), the same for everyone: as text, with their
answers, or as inputs of decode cases.

    python tools/demo_prompts.py --tuning demo.jsonl --count 200     # for dllm-trt tune --data demo.jsonl
    python tools/demo_prompts.py --prompts prompts.txt --count 24    # one per line
    python tools/demo_prompts.py --inputs cases.json artifacts/llada-demo --count 24    # for replay --record
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import demo_task

import trt_runtime as rt

SEED = 20261123


def held_out(count: int) -> list[demo_task.Example]:
    """The first `count` held-out examples, the same on every run."""
    rng = random.Random(SEED)
    return [demo_task.draw(rng, held_out=True) for _ in range(count)]


def case_inputs(model: rt.Model, examples: list[demo_task.Example]) -> list[dict[str, object]]:
    """Inputs of decode cases over these prompts, cycling through caches and policies."""
    modes: list[dict[str, object]] = [{"mode": "none"}, {"mode": "prefix"}, {"mode": "dual"}]
    if model.manifest.decoding.is_block_causal:
        modes = [{"mode": "none"}, {"mode": "block"}, {"mode": "block_dual", "small_block": 4}]
    policies = ({"threshold": 0.9}, {"threshold": None, "factor": 1.0}, {"threshold": 0.7})
    return [
        {
            "id": f"demo-{i}",
            "family": model.manifest.model.family,
            "prompt": [model.encode(example.prompt)],
            "gen_length": demo_task.GEN_LENGTH,
            "block_length": 8,
            "steps": 48,
            **modes[i % 3],
            **policies[i // 3 % 3],
        }
        for i, example in enumerate(examples)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, nargs="?", help="the exported demo model, for --inputs")
    parser.add_argument("--count", type=int, default=500, help="prompts (default 500)")
    parser.add_argument("--prompts", type=Path, help="write them, one per line")
    parser.add_argument("--tuning", type=Path, help="write them with their answers, as lines of JSON")
    parser.add_argument("--inputs", type=Path, help="write inputs of decode cases")
    args = parser.parse_args()
    examples = held_out(args.count)
    if args.prompts:
        args.prompts.write_text("".join(example.prompt + "\n" for example in examples), encoding="utf-8")
    if args.tuning:
        lines = [
            json.dumps(
                {"prompt": e.prompt, "answers": [json.dumps(plan) for plan in demo_task.spellings(e.plan)]}
            )
            for e in examples
        ]
        args.tuning.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if args.inputs:
        if args.artifact is None:
            parser.error("--inputs needs the artifact argument: its tokenizer encodes the prompts")
        args.inputs.write_text(
            json.dumps({"cases": case_inputs(rt.load(args.artifact), examples)}) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
