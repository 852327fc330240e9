"""Accuracy against tokens per forward on both demo models, for all decoding options on the same held-out
prompts.

    make frontier                   # both models: about 20 minutes on 2 cores
    python benchmarks/cpu/frontier.py artifacts/sdar-demo                              # one of them
    python benchmarks/cpu/frontier.py artifacts/llada-demo --count 40 --only factor    # writes nothing

Writes benchmarks/results/frontier-NAME.json of each artifact. Then draws all such files: docs/frontier.png
and .svg, and the tables between the marks of docs/benchmarks.md (needs the `bench` extra). Exact match is
that of tools/demo_task.py, with the standard error of a proportion; tokens per forward (TPF) counts tokens
before the end of the answer, and forwards that store a block count too. `same`: answers equal, token for
token, to those of one token per forward with the same cache and blocks.
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
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
RESULTS = ROOT / "benchmarks" / "results"
Config = rt.GenerationConfig


def variants(is_block_causal: bool) -> dict[str, dict[str, Config]]:
    """The decoding options to compare, by group and name."""
    return _block_causal() if is_block_causal else _full()


def _block_causal() -> dict[str, dict[str, Config]]:
    return {
        "vanilla": {
            "no cache, one token per forward": Config(cache="none", policy="fixed"),
            "block, one token per forward": Config(policy="fixed"),
            "block, one token per forward, stores apart": Config(policy="fixed", fuse_stores=False),
        },
        "fixed schedule": {
            f"block, fixed, {n} forwards per block": Config(policy="fixed", steps=BLOCKS * n)
            for n in (6, 4, 3, 2, 1)
        },
        "threshold, block": {f"block, threshold {t:g}": Config(threshold=t) for t in THRESHOLDS},
        "threshold, stores apart": {
            f"block, stores apart, threshold {t:g}": Config(threshold=t, fuse_stores=False)
            for t in THRESHOLDS
        },
        "threshold, no cache": {
            f"no cache, threshold {t:g}": Config(cache="none", threshold=t) for t in (0.5, 0.7, 0.9)
        },
        **_other_policies("block"),
        "block length": {f"block, threshold 0.9, blocks of {n}": Config(block_length=n) for n in (4, 16)},
        "speculation": _speculation("block"),
    }


def _full() -> dict[str, dict[str, Config]]:
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
        "threshold, dual": {f"dual, threshold {t:g}": Config(threshold=t) for t in THRESHOLDS},
        "threshold, prefix": {
            f"prefix, threshold {t:g}": Config(cache="prefix", threshold=t) for t in THRESHOLDS
        },
        "threshold, no cache": {
            f"no cache, threshold {t:g}": Config(cache="none", threshold=t) for t in (0.5, 0.7, 0.9)
        },
        **_other_policies("dual"),
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
        "speculation": _speculation("dual"),
    }


def _speculation(cache: str) -> dict[str, Config]:
    return {
        f"{cache}, one token per step, {n} verified per call": Config(policy="fixed", speculate=n)
        for n in (2, 4, 8)
    } | {f"{cache}, threshold 0.9, 4 verified per call": Config(speculate=4)}


def _other_policies(cache: str) -> dict[str, dict[str, Config]]:
    return {
        "factor": {
            f"{cache}, factor {f:g}": Config(policy="factor", factor=f) for f in (0.25, 0.5, 1.0, 2.0)
        },
        "eb": {
            f"{cache}, eb, gamma {g:g}": Config(policy="eb", gamma=g) for g in (0.01, 0.05, 0.2, 0.5, 1.0)
        },
        "margin": {
            f"{cache}, margin {t:g}": Config(policy="margin", threshold=t) for t in (0.5, 0.7, 0.9, 0.97)
        },
        "dynamic": {
            f"{cache}, dynamic 0.9, alpha {a:g}": Config(policy="dynamic", alpha=a) for a in (0.2, 0.4, 0.6)
        },
        "localleap": {
            f"{cache}, localleap 0.9, {t:g} nearby": Config(policy="localleap", low_threshold=t)
            for t in (0.5, 0.6, 0.75)
        },
        "hierarchy": {
            f"{cache}, hierarchy 0.9, {t:g} of a run": Config(policy="hierarchy", low_threshold=t)
            for t in (0.5, 0.6, 0.75)
        },
        "prophet": {f"{cache}, prophet": Config(policy="prophet")},
        "slowfast": {
            f"{cache}, slowfast 0.9, sees to {t:g}": Config(policy="slowfast", low_threshold=t)
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
    """The figures of one model."""
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
    return "\n".join(lines)


def best(reports: dict[str, dict[str, Any]], drop: float = 1.0) -> str:
    """Of each model, the most tokens per forward at the accuracy of one token per forward less `drop`
    points."""
    lines = [
        "| model | attention | cache | one a forward % | fastest within a point | exact match % | TPF |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, report in reports.items():
        single = next(row for row in report["rows"] if row["group"] == "vanilla")
        least = single["exact_match"] - drop
        kept = [row for row in report["rows"] if row["exact_match"] >= least]
        row = max(kept, key=lambda row: row["tokens_per_forward"])
        attention = report["attention"]
        cells = [model, attention, "exact" if attention == "block-causal" else "approximate"]
        cells += [f"{single['exact_match']:.1f}", row["name"]]
        cells += [
            f"{row['exact_match']:.1f} ± {row['standard_error']:.1f}",
            f"{row['tokens_per_forward']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def document(reports: dict[str, dict[str, Any]]) -> str:
    """The tables of all models, and the plot."""
    parts = [best(reports), "![accuracy against tokens per forward](frontier.png)"]
    for model, report in reports.items():
        parts += [f"`{model}`, {report['attention']} attention, {report['prompts']} prompts:", table(report)]
    return "\n\n".join(parts)


def plot(reports: dict[str, dict[str, Any]], file: Path) -> None:
    """A panel per model; a line per group that has a knob, marks for the others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(reports), figsize=(10, 5.2 * len(reports)), sharex=True, squeeze=False, layout="constrained"
    )
    for axes, (model, report) in zip(panels[:, 0], reports.items(), strict=True):
        _panel(axes, report, plt.get_cmap("tab20").colors)
        title = f"{model}: {report['attention']} attention, {report['prompts']} held-out prompts"
        axes.set(ylabel="exact match, %", title=title, xlim=(0, None), ylim=(0, 101))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    panels[-1, 0].set(xlabel="tokens per forward")
    for suffix in (".png", ".svg"):
        figure.savefig(
            file.with_suffix(suffix),
            dpi=130,
            metadata={"Date": None} if suffix == ".svg" else {"Software": None},
        )
    plt.close(figure)


def _panel(axes: Any, report: dict[str, Any], colours: Any) -> None:
    for i, name in enumerate(dict.fromkeys(row["group"] for row in report["rows"])):
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


def measure(model: rt.Model, count: int, batch: int, only: set[str]) -> dict[str, Any]:
    """The figures of all groups (or of those in `only`)."""
    examples = held_out(count)
    is_block_causal = model.manifest.decoding.is_block_causal
    groups, rows, single = variants(is_block_causal), [], {}
    for group, configs in groups.items():
        for name, config in configs.items() if not only or group in only else ():
            figures, answers = evaluate(model, examples, config, batch)
            if config.policy == "fixed" and config.steps is None and config.speculate == 1:
                single.setdefault(config.cache, answers)
            base = single.get(config.cache) if config.block_length is None else None
            same = (
                None
                if base is None
                else round(100 * sum(a == b for a, b in zip(answers, base, strict=True)) / count, 1)
            )
            rows.append({"group": group, "name": name, **figures, "same": same})
            print(f"{name:46} {figures}", file=sys.stderr, flush=True)
    attention = "block-causal" if is_block_causal else "full"
    return {"attention": attention, "prompts": count, "seed": SEED, "rows": rows, "machine": machine()}


def of_results() -> dict[str, dict[str, Any]]:
    """The reports under benchmarks/results by the model's name, those of full attention first."""
    reports = {
        file.stem.removeprefix("frontier-"): json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(RESULTS.glob("frontier-*.json"))
    }
    return dict(sorted(reports.items(), key=lambda item: item[1]["attention"] != "full"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "artifacts", type=Path, nargs="*", help="exported demo models (none: draw what was measured before)"
    )
    parser.add_argument("--count", type=int, default=500, help="held-out prompts (default 500)")
    parser.add_argument("--batch", type=int, default=20, help="prompts per batch (default 20)")
    groups = list(dict.fromkeys([*variants(False), *variants(True)]))
    only_help = f"run only this group, and write nothing (may be repeated): {'; '.join(groups)}"
    parser.add_argument("--only", action="append", default=[], help=only_help)
    args = parser.parse_args()
    if args.count < 1 or args.batch < 1 or set(args.only) - set(groups):
        raise SystemExit(
            f"error: --count {args.count}, --batch {args.batch}, --only {args.only}: expected --count and "
            f"--batch of at least 1, and --only with a group of: {'; '.join(groups)}."
        )
    for artifact in args.artifacts:
        with rt.load(artifact) as model:
            report = measure(model, args.count, args.batch, set(args.only))
        if args.only:
            print(table(report))
        else:
            file = RESULTS / f"frontier-{artifact.resolve().name}.json"
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    reports = of_results()
    if args.only or not reports:
        return
    plot(reports, ROOT / "docs" / "frontier")
    insert(ROOT / "docs" / "benchmarks.md", BEGIN, END, document(reports))


if __name__ == "__main__":
    main()
