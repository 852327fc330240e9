"""The results of benchmarks/cpu/system.py as tables and plots in the documents.

    python benchmarks/reports/system.py                                    # benchmarks/results/system-*.json
    python benchmarks/reports/system.py --results DIR --document FILE.md   # others

The default document is docs/benchmarks.md, the plots docs/system*.png and .svg. The tables replace the text
between the two marks of the document. Needs matplotlib (the `bench` extra).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

import system_parts
from marks import ROOT, insert

BEGIN, END = "<!-- system: begin -->", "<!-- system: end -->"
_VARIANTS = {
    "vanilla": "no cache, one token per forward",
    "none": "no cache",
    "prefix": "prefix cache",
    "dual": "dual cache",
}
_BACKENDS = {
    "ort": "ONNX Runtime fp32",
    "ort w8a8": "ONNX Runtime w8a8",
    "ort int4": "ONNX Runtime int4",
    "torch fp32": "PyTorch fp32",
    "torch bf16": "PyTorch bf16",
}
_SWEEPS = {
    "prompt": "prompt, tokens",
    "gen_length": "gen_length, tokens",
    "block": "block_length, tokens",
    "batch": "batch, rows",
    "threads": "threads",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="the directory with system-*.json",
    )
    parser.add_argument(
        "--document",
        type=Path,
        default=ROOT / "docs" / "benchmarks.md",
        help="the document with the two marks",
    )
    args = parser.parse_args()
    runs = {
        int(file.stem.rpartition("-")[2]): json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(args.results.glob("system-variants-*.json"))
    }
    scaling = args.results / "system-scaling.json"
    if not runs or not scaling.is_file():
        raise SystemExit(
            f"error: {args.results}: no system-variants-*.json or no system-scaling.json: run 'make "
            f"bench' first."
        )
    grown = json.loads(scaling.read_text(encoding="utf-8"))
    text = "\n\n".join(
        [
            *(variants(threads, run) for threads, run in runs.items()),
            "![tokens per second of every variant](system.png)",
            growth(grown),
            "![forwards compared with the roofline](system-scaling.png)",
            *system_parts.sections(args.results),
        ]
    )
    insert(args.document, BEGIN, END, text)
    plot_variants(runs, args.document.parent / "system")
    plot_growth(grown, args.document.parent / "system-scaling")
    if beside := system_parts.programs(args.results):
        plot_programs(beside, args.document.parent / "system-others")
    print(f"{args.document} and its plots written")


def name_of(row: dict[str, Any]) -> tuple[str, str]:
    """Backend and decoding options, in words."""
    label, _, variant = row["variant"].rpartition(" ")
    return _BACKENDS.get(label, label), _VARIANTS.get(variant, variant)


def variants(threads: int, run: dict[str, Any]) -> str:
    speeds = {row["variant"]: row["tokens_per_second"] for row in run["rows"]}
    versions, where = run["machine"]["versions"], run["machine"]["cpu"]
    lines = [
        f"{threads} thread{'' if threads == 1 else 's'}; {where}, onnxruntime {versions['onnxruntime']}, "
        f"torch {versions['torch']}; medians of {run['settings']['repeats']} rounds:",
        "",
        "| | decoding | tokens/s | against PyTorch fp32 dual | against PyTorch bf16 dual | ms a prefix pass "
        "| ms a refine step | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(run["rows"], key=lambda row: row["tokens_per_second"]):
        label = row["variant"].rpartition(" ")[0]
        ratios = [
            f"{row['tokens_per_second'] / speeds[other]:.2f}"
            for other in ("torch fp32 dual", "torch bf16 dual")
        ]
        refine = "-" if row["refine_ms"] is None else f"{row['refine_ms']:.1f}"
        cells = [
            *name_of(row),
            f"{row['tokens_per_second']:.1f}",
            *ratios,
            f"{row['prefix_ms']:.0f}",
            refine,
            f"{run['peak_memory_mib'][label]:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def growth(report: dict[str, Any]) -> str:
    lines = [
        "The same model on ONNX Runtime, one size changed at a time (else "
        + ", ".join(f"{_SWEEPS[name].split(',')[0]} {value}" for name, value in report["base"].items())
        + "); tokens/s follow from the two forwards; the share is the roofline's time over the measured "
        "time:",
        "",
        "| changed | | fp32: prefix ms (share) | refine ms (share) | tokens/s | w8a8: prefix ms (share) | "
        "refine ms (share) | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for sweep, title in _SWEEPS.items():
        for size in sorted({point[sweep] for point in report["points"] if point["sweep"] == sweep}):
            cells = [title.split(",")[0], str(size)]
            for artifact in ("fp32", "w8a8"):
                point = next(
                    p
                    for p in report["points"]
                    if p["sweep"] == sweep and p[sweep] == size and p["artifact"] == artifact
                )
                cells += [
                    f"{point[f'{kind}_ms']:.1f} "
                    f"({100 * point[f'{kind}_roofline_ms'] / point[f'{kind}_ms']:.0f} %)"
                    for kind in ("prefix", "refine")
                ]
                cells.append(f"{point['tokens_per_second']:.0f}")
            lines.append(f"| {' | '.join(cells)} |")
    rates = report["rates"]["1"]
    lines += [
        "",
        f"The roofline's rates, measured in the same run on one thread: {rates['fp32'] / 1e9:.0f} GFLOP/s in "
        f"fp32, {rates['int8'] / 1e9:.0f} Gop/s in u8 x s8, {rates['bandwidth'] / 1e9:.0f} GB/s of a copy.",
    ]
    return "\n".join(lines)


def plot_variants(runs: dict[int, dict[str, Any]], path: Path) -> None:
    def color(row: dict[str, Any]) -> str:
        if row["variant"].startswith("torch"):
            return "#d95f02"
        is_quantised = row["variant"].startswith("ort ") and len(row["variant"].split()) > 2
        return "#1b9e77" if is_quantised else "#7570b3"

    _bars(runs, path, 5, lambda row: ", ".join(name_of(row)), color)


def plot_programs(runs: dict[int, dict[str, Any]], path: Path) -> None:
    def name(row: dict[str, Any]) -> str:
        return f"{row['system']}, {'no' if row['cache'] == 'none' else row['cache']} cache"

    _bars(runs, path, 4, name, lambda row: "#7570b3" if row["system"].startswith("ONNX") else "#d95f02")


def _bars(
    runs: dict[int, dict[str, Any]],
    path: Path,
    height: int,
    name: Callable[[dict[str, Any]], str],
    color: Callable[[dict[str, Any]], str],
) -> None:
    """Tokens per second, a plot for each thread count; the name and the color of a row."""
    figure, axes = pyplot().subplots(1, len(runs), figsize=(6 * len(runs), height), squeeze=False)
    for axis, (threads, run) in zip(axes[0], runs.items(), strict=True):
        rows = sorted(run["rows"], key=lambda row: row["tokens_per_second"])
        speeds = [row["tokens_per_second"] for row in rows]
        bars = axis.barh([name(row) for row in rows], speeds, color=[color(row) for row in rows])
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_title(f"{threads} thread{'' if threads == 1 else 's'}")
        axis.set_xlabel("tokens per second")
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def plot_growth(report: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(2, len(_SWEEPS), figsize=(15, 6), sharey="row")
    colors = {"fp32": "#7570b3", "w8a8": "#1b9e77"}
    for column, (sweep, title) in enumerate(_SWEEPS.items()):
        for row, kind in enumerate(("prefix", "refine")):
            axis = axes[row][column]
            for artifact, color in colors.items():
                points = sorted(
                    (p[sweep], p[f"{kind}_ms"], p[f"{kind}_roofline_ms"])
                    for p in report["points"]
                    if p["sweep"] == sweep and p["artifact"] == artifact
                )
                sizes, measured, least = zip(*points, strict=True)
                axis.plot(sizes, measured, "o-", color=color, label=artifact)
                axis.plot(sizes, least, "--", color=color, label=f"{artifact}, roofline", alpha=0.7)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_xlabel(title)
        axes[0][0].set_ylabel("prefix pass, ms")
        axes[1][0].set_ylabel("refine step, ms")
    axes[0][0].legend(fontsize=8)
    save(figure, path)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dllm-trt"  # the same figures give the same file
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
