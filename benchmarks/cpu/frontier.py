"""Accuracy against tokens per forward on the demo model, for all decoding options on the same held-out
prompts.

    make frontier                   # all of it: about 15 minutes on 2 cores
    python benchmarks/cpu/frontier.py artifacts/llada-demo --count 40 --only factor    # writes nothing

Writes benchmarks/results/frontier.json, docs/frontier.png and .svg, and the table between the marks of
docs/benchmarks.md (needs the `bench` extra). Exact match is that of tools/demo_task.py, with the standard
error of a proportion; tokens per forward (TPF) counts tokens before the end of the answer. `same`: answers
equal, token for token, to those of one token per forward with the same cache and blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[2] / name) for name in ("", "tools", "benchmarks"))

import demo_task
from demo_prompts import SEED, held_out
from reports.marks import insert

import trt_runtime as rt
from trt_runtime.measure.bench import machine

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- frontier: begin -->", "<!-- frontier: end -->"
BLOCKS = 12  # of 8, in a generation of 96
Config = rt.GenerationConfig


def variants() -> dict[str, dict[str, Config]]:
    """The decoding options to compare, by group and name."""
    thresholds = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    near = {"refresh_every": 0}
    return {
        "vanilla": {
            "no cache, one token per forward": Config(cache="none", policy="fixed"),
            "dual, one token per forward": Config(policy="fixed"),
        },
        "fixed schedule": {
            f"dual, fixed, {n} forwards per block": Config(policy="fixed", steps=BLOCKS * n)
            for n in (6, 4, 3, 2, 1)
        },
        "threshold, dual": {f"dual, threshold {t:g}": Config(threshold=t) for t in thresholds},
        "threshold, prefix": {
            f"prefix, threshold {t:g}": Config(cache="prefix", threshold=t) for t in thresholds
        },
        "threshold, no cache": {
            f"no cache, threshold {t:g}": Config(cache="none", threshold=t) for t in (0.5, 0.7, 0.9)
        },
        **_other_policies(),
        "refresh": {
            "dual, rebuilt every 2 blocks": Config(refresh_every=2),
            "dual, rebuilt every 4 blocks": Config(refresh_every=4),
            "dual, rebuilt once": Config(**near),
            "dual, rebuilt once, window 8": Config(**near, refresh_window=8),
            "dual, rebuilt once, window 32": Config(**near, refresh_window=32),
        },
        "suffix": {
            **{f"dual, suffix {n}": Config(suffix=n) for n in (0, 4, 8, 16)},
            "dual, suffix 8 decaying": Config(suffix=8, suffix_decay=True),
            "dual, rebuilt once, suffix 8": Config(**near, suffix=8),
        },
        "block length": {
            f"dual, threshold 0.9, blocks of {n}": Config(block_length=n) for n in (4, 16, 32, 96)
        },
        "speculation": {
            f"dual, one token per step, {n} verified per call": Config(policy="fixed", speculate=n)
            for n in (2, 4, 8)
        }
        | {"dual, threshold 0.9, 4 verified per call": Config(speculate=4)},
    }


def _other_policies() -> dict[str, dict[str, Config]]:
    return {
        "factor": {f"dual, factor {f:g}": Config(policy="factor", factor=f) for f in (0.25, 0.5, 1.0, 2.0)},
        "eb": {f"dual, eb, gamma {g:g}": Config(policy="eb", gamma=g) for g in (0.01, 0.05, 0.2, 0.5, 1.0)},
        "margin": {
            f"dual, margin {t:g}": Config(policy="margin", threshold=t) for t in (0.5, 0.7, 0.9, 0.97)
        },
        "dynamic": {
            f"dual, dynamic 0.9, alpha {a:g}": Config(policy="dynamic", alpha=a) for a in (0.2, 0.4, 0.6)
        },
        "localleap": {
            f"dual, localleap 0.9, {t:g} nearby": Config(policy="localleap", low_threshold=t)
            for t in (0.5, 0.6, 0.75)
        },
        "hierarchy": {
            f"dual, hierarchy 0.9, {t:g} of a run": Config(policy="hierarchy", low_threshold=t)
            for t in (0.5, 0.6, 0.75)
        },
        "prophet": {"dual, prophet": Config(policy="prophet")},
        "slowfast": {
            f"dual, slowfast 0.9, sees to {t:g}": Config(policy="slowfast", low_threshold=t)
            for t in (0.3, 0.6)
        },
    }


def evaluate(
    model: rt.Model, examples: list[demo_task.Example], config: Config, batch: int
) -> tuple[dict[str, float], list[list[int]]]:
    """Exact match (%), its standard error, tokens per forward, forwards per answer; and the answers'
    tokens."""
    right = useful = forwards = 0
    answers = []
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        for example, result in zip(part, model.generate([e.prompt for e in part], config), strict=True):
            right += demo_task.is_right(result.text or "", example.plan)
            useful, forwards = useful + result.num_useful, forwards + result.nfe
            answers.append(result.tokens)
    count, share = len(examples), right / len(examples)
    figures = {
        "exact_match": round(100 * share, 1),
        "standard_error": round(100 * math.sqrt(share * (1 - share) / count), 1),
        "tokens_per_forward": round(useful / forwards, 2),
        "forwards": round(forwards / count, 1),
    }
    return figures, answers


def table(report: dict[str, Any]) -> str:
    lines = [
        "| decoding | exact match % | TPF | forwards | same as one per forward % |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        same = "" if row["same"] is None else f"{row['same']:.1f}"
        lines.append(
            f"| {row['name']} | {row['exact_match']:.1f} ± {row['standard_error']:.1f} | "
            f"{row['tokens_per_forward']:.2f} | {row['forwards']:.1f} | {same} |"
        )
    return "\n".join([*lines, "", "![accuracy against tokens per forward](frontier.png)"])


def plot(report: dict[str, Any], file: Path) -> None:
    """A line per group that has a knob, marks for the others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5.5))
    names = list(dict.fromkeys(row["group"] for row in report["rows"]))
    colours = plt.get_cmap("tab20").colors
    for i, name in enumerate(names):
        rows = sorted(
            (row for row in report["rows"] if row["group"] == name), key=lambda row: row["tokens_per_forward"]
        )
        joined = name not in ("refresh", "suffix", "block length", "speculation", "vanilla")
        axes.errorbar(
            [row["tokens_per_forward"] for row in rows],
            [row["exact_match"] for row in rows],
            [row["standard_error"] for row in rows],
            label=name,
            color=colours[i % 20],
            marker="osD^v*"[i % 6],
            markersize=5,
            linewidth=1.4 if joined else 0,
            elinewidth=0.6,
        )
    axes.set(
        xlabel="tokens per forward",
        ylabel="exact match, %",
        title=f"Demo model, {report['prompts']} held-out prompts",
        xlim=(0, None),
        ylim=(0, 101),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(
            file.with_suffix(suffix),
            dpi=130,
            metadata={"Date": None} if suffix == ".svg" else {"Software": None},
        )
    plt.close(figure)


def measure(model: rt.Model, count: int, batch: int, only: set[str]) -> dict[str, Any]:
    """The figures of all groups (or of those in `only`)."""
    examples = held_out(count)
    groups, rows, single = variants(), [], {}
    for group, configs in groups.items():
        for name, config in configs.items() if not only or group in only else ():
            figures, answers = evaluate(model, examples, config, batch)
            if config.policy == "fixed" and config.steps is None and config.speculate == 1:
                single[config.cache] = answers
            base = single.get(config.cache) if config.block_length is None else None
            same = (
                None
                if base is None
                else round(100 * sum(a == b for a, b in zip(answers, base, strict=True)) / count, 1)
            )
            rows.append({"group": group, "name": name, **figures, "same": same})
            print(f"{name:46} {figures}", file=sys.stderr, flush=True)
    return {"prompts": count, "seed": SEED, "rows": rows, "machine": machine()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, help="the exported demo model")
    parser.add_argument("--count", type=int, default=500, help="held-out prompts (default 500)")
    parser.add_argument("--batch", type=int, default=20, help="prompts per batch (default 20)")
    parser.add_argument(
        "--only",
        default="",
        help=f"run only these groups, comma-separated, and write nothing: {', '.join(variants())}",
    )
    parser.add_argument(
        "--from-json",
        type=Path,
        metavar="FILE",
        help="do not measure: draw the table and plot from this file",
    )
    args = parser.parse_args()
    only = {name.strip() for name in args.only.split(",") if name.strip()}
    if args.count < 1 or args.batch < 1 or only - set(variants()):
        raise SystemExit(
            f"error: --count {args.count}, --batch {args.batch}, --only '{args.only}': expected --count and "
            f"--batch of at least 1, and --only with groups of: {', '.join(variants())}."
        )
    if args.from_json:
        report = json.loads(args.from_json.read_text(encoding="utf-8"))
    else:
        report = measure(rt.load(args.artifact), args.count, args.batch, only)
    if only:
        print(table(report))
        return
    results = ROOT / "benchmarks" / "results" / "frontier.json"
    results.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, ROOT / "docs" / "frontier")
    insert(ROOT / "docs" / "benchmarks.md", BEGIN, END, table(report))


if __name__ == "__main__":
    main()
