"""The reports of benchmarks/gpu/report.py as a table and a plot in the documents; several GPUs side by side.

    python benchmarks/reports/gpu.py                                  # benchmarks/results/gpu-report-*.json
    python benchmarks/reports/gpu.py mine.json theirs.json --print    # merged, on standard output
    python benchmarks/reports/gpu.py --document FILE.md               # another document

The default document is docs/benchmarks.md, the plot docs/gpu-report.svg. The table replaces the text between
the two marks of the document. The plot (of the first report) needs matplotlib (the `bench` extra).
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

from marks import ROOT, insert

BEGIN, END = "<!-- gpu-report: begin -->", "<!-- gpu-report: end -->"
PLOT, FORMAT, VERSION = "gpu-report.svg", "dllm-trt gpu report", 1
# stage and key in its result -> the name of a row
ROWS = (
    ("torch", "", "PyTorch, eager"),
    ("torch_graph", "graph", "PyTorch, CUDA graph (*)"),
    ("torch_graph", "compiled_graph", "PyTorch, compiled, CUDA graph (*)"),
    ("ort", "", "ONNX Runtime"),
    ("tensorrt", "", "TensorRT"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "reports",
        nargs="*",
        type=Path,
        help="files written by make gpu-report (default: those under benchmarks/results)",
    )
    parser.add_argument(
        "--document",
        type=Path,
        default=ROOT / "docs" / "benchmarks.md",
        help="the document with the two marks",
    )
    parser.add_argument("--print", action="store_true", help="print the tables; change no document")
    args = parser.parse_args()
    files = args.reports or sorted(
        (ROOT / "benchmarks" / "results").glob("gpu-report-*.json"), key=lambda file: file.stem
    )
    if not files:
        raise SystemExit(
            "error: benchmarks/results: no gpu-report-*.json: run 'make gpu-report' on a GPU machine first."
        )
    reports = [read(file) for file in files]
    text = "\n\n".join([*([merged(reports)] if len(reports) > 1 else []), *map(table, reports)])
    if args.print:
        print(text)
        return
    insert(
        args.document,
        BEGIN,
        END,
        f"{text}\n\n![refine step and prefix pass of each variant, and the machine's own limit]({PLOT})",
    )
    plot(reports[0], args.document.parent / PLOT)
    print(f"{args.document} and {args.document.parent / PLOT} written")


def read(file: Path) -> dict[str, Any]:
    """The stages of a report, by name. Exits with an error for a file that is not a report."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if report.get("format") != FORMAT or report.get("format_version") != VERSION:
            raise ValueError(
                f"its format is {report.get('format')!r}, version {report.get('format_version')!r}"
            )
        stages: dict[str, Any] = report["stages"]
        stages["environment"]["machine"]["versions"]  # every table needs it
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(
            f"error: {file}: not a report of 'make gpu-report' ({error}): pass one that it wrote on a GPU "
            f"machine."
        ) from error
    return stages


def device_of(results: dict[str, Any]) -> str:
    """The measured device, in words."""
    environment = results["environment"]
    return environment.get("gpu", {}).get("name") or f"no GPU (the CPU twin), {environment['machine']['cpu']}"


def merged(reports: list[dict[str, Any]]) -> str:
    """One row per GPU and variant. Different models are in different rows and are never compared."""
    lines = [
        "| device | model | variant | refine step ms | share of roofline | prefix pass ms | share | "
        "tokens/s | parity |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for results in reports:
        settings = results["environment"]["settings"]
        for name, row in longest(results):
            stage = next(stage for stage, _, known in ROWS if known == name)
            passed = results.get(stage, {}).get("parity", {}).get("passed")
            cells = [
                device_of(results),
                f"{settings['preset']} {settings['dtype']}, canvas {settings['canvases'][-1]}, "
                f"block {settings['block_length']}",
                name,
                f"{row['refine_ms']:.2f}",
                _share(row, "refine"),
                f"{row['prefix_ms']:.2f}",
                _share(row, "prefix"),
                _number(row.get("tokens_per_second_at_schedule")),
                "-" if passed is None else "passed" if passed else "FAILED",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def longest(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and figures of every measured variant, at batch 1 on the longest canvas."""
    measured = []
    for stage, key, name in ROWS:
        result = results.get(stage, {})
        if key:
            row = result.get(key, {})
        else:
            row = next(
                (
                    row
                    for row in result.get("speeds", [])
                    if row["batch"] == 1 and row["canvas"] == result["settings"]["canvases"][-1]
                ),
                {},
            )
            row = row | {
                "tokens_per_second_at_schedule": result.get("tokens_per_second_at_schedule"),
                "loop": result.get("tokens_per_second"),
            }
        if row.get("refine_ms") is not None:
            measured.append((name, row))
    return measured


def table(results: dict[str, Any]) -> str:
    """Machine, speeds compared with eager PyTorch in the same run, parity, and what failed or was not run."""
    environment = results["environment"]
    settings, machine = environment["settings"], environment["machine"]
    where = device_of(results)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    changes = " with uncommitted changes" if environment.get("has_uncommitted_changes") else ""
    lines = [
        f"{where}; {versions}; Python {machine['python']}; {environment['utc']}, commit "
        f"{str(environment['commit'])[:10]}{changes}. Random {settings['preset']}, {settings['dtype']}, "
        f"canvas {settings['canvases'][-1]}, block {settings['block_length']}, batch 1; tokens/s at "
        f"{settings['tokens_per_forward']} tokens per forward, from the times of single calls, and of the "
        "loop itself.",
        "",
    ]
    lines += _speeds(results)
    lines += [
        "",
        "(*) the GPU's own time of a replay: no copies in or out, only token and confidence. The others are "
        "a caller's wall time.",
    ]
    lines.append("")
    lines += [*_kernels(results), *_notes(results)]
    return "\n".join(line if line.startswith("|") else _wrapped(line) for line in lines)


def _wrapped(line: str) -> str:
    """The line in Markdown lines of at most 110 columns."""
    return textwrap.fill(
        line,
        110,
        subsequent_indent="  " if line.startswith("- ") else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _kernels(results: dict[str, Any]) -> list[str]:
    """A line for the largest case of each kernel, all of which equal their NumPy references."""
    kernels, lines = results.get("kernels", {}), []
    if measured := kernels.get("row_statistics"):
        most = max(measured, key=lambda figures: figures["rows"] * figures["vocab"])
        share = f", {100 * most['share_of_copy']:.0f} % of a copy" if "share_of_copy" in most else ""
        lines.append(
            f"- kernel `row_statistics`, {most['rows']} rows of {most['vocab']:,} logits: tokens as NumPy, "
            f"probabilities within {most['error']:.0e}; {most['ms']:.3f} ms ({most['gb_per_s']:,.0f} GB/s"
            f"{share}; PyTorch's operators {most['torch_ms']:.2f} ms)."
        )
    if "commit" in kernels:
        commit = kernels["commit"]
        lines.append(
            f"- kernel `commit`: {commit['cases']} random calls of {commit['rows']} rows as NumPy; "
            f"{commit['ms']:.3f} ms."
        )
    for row in kernels.get("head", []):
        lines.append(
            f"- kernels of the head with its statistics, {row['rows']} rows of {row['hidden']}, a vocabulary "
            f"of {row['vocabulary']}: {row['ms']:.3f} ms, float32 product and statistics "
            f"{row['plain_ms']:.3f} ms."
        )
    for row in kernels.get("attention", []):
        lines.append(
            f"- kernels of attention, batch {row['batch']}, {row['heads']} heads of {row['rows']} rows, "
            f"caches of {row['capacity']}: {row['ms']:.3f} ms; PyTorch's, masked: {row['plain_ms']:.3f} ms."
        )
    for row in kernels.get("experts", []):
        lines.append(
            f"- kernels of experts, {row['rows']} rows, top {row['top_k']} of {row['experts']} of "
            f"{row['inner']} units, hidden {row['hidden']}: within {row['error']:.0e} of the largest value; "
            f"{row['ms']:.2f} ms, all experts by PyTorch {row['dense_ms']:.2f} ms."
        )
    return lines


def _speeds(results: dict[str, Any]) -> list[str]:
    """A row per variant, compared with eager PyTorch in the same run."""
    lines = [
        "| variant | refine step ms | share of roofline | prefix pass ms | share | tokens/s | of eager | "
        "tokens/s of the loop, at tokens per forward |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = longest(results)
    base = next((row["tokens_per_second_at_schedule"] for name, row in rows if name == ROWS[0][2]), None)
    for name, row in rows:
        speed, loop = row.get("tokens_per_second_at_schedule"), row.get("loop") or {}
        cells = [
            name,
            f"{row['refine_ms']:.2f}",
            _share(row, "refine"),
            f"{row['prefix_ms']:.2f}",
            _share(row, "prefix"),
            _number(speed),
            f"{speed / base:.2f}" if speed and base else "-",
            f"{loop['tokens_per_second']:,.0f} at {loop['tokens_per_forward']:.2f}" if loop else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _notes(results: dict[str, Any]) -> list[str]:
    """A line per stage: its parity, or why it failed or was not run."""
    lines, dtype = [], results["environment"]["settings"]["dtype"]
    for stage, stage_result in sorted(results.items()):
        parity = stage_result.get("parity", {})
        if "passed" in parity:
            far = max(
                parity[role][name]["from_fp32"]
                for role in ("prefix", "refine")
                for name in ("confidence", "runner_up", "entropy")
            )
            own = max(
                parity[role][name]["torch_from_fp32"]
                for role in ("prefix", "refine")
                for name in ("confidence", "runner_up", "entropy")
            )
            verdict = "passed" if parity["passed"] else "FAILED"
            lines.append(
                f"- `{stage}`: parity {verdict}: at most {far:.2g} nats from PyTorch in fp32, whose own "
                f"{dtype} is {own:.2g} away."
            )
        if stage_result.get("memory_bytes"):
            lines.append(f"- `{stage}`: {stage_result['memory_bytes'] / 2**30:.1f} GiB on the GPU.")
        if reason := stage_result.get("failed") or stage_result.get("skipped"):
            lines.append(
                f"- `{stage}`: {'failed' if 'failed' in stage_result else 'not run'}: "
                f"{reason_of(reason)[:200].rstrip(chr(46))}."
            )
    return lines


def reason_of(trouble: str) -> str:
    """The line of a failed stage's output that says why: a command's 'error: ' line, else the last line."""
    lines = trouble.splitlines()
    return next((line for line in lines if line.startswith("error: ")), lines[-1])


def plot(results: dict[str, Any], file: Path) -> None:
    """Bars of both kinds of forward, with the roofline of the machine as a line."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dllm-trt"  # the same file for the same figures
    from matplotlib import pyplot

    rows = longest(results)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.6 + 0.5 * max(1, len(rows))), sharey=True)
    for axis, role, title in zip(
        axes, ("refine", "prefix"), ("refine step, ms", "prefix pass, ms"), strict=True
    ):
        bars = axis.barh([name for name, _ in rows], [row[f"{role}_ms"] for _, row in rows], color="#76b900")
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.margins(x=0.18)
        floor = next((row[f"{role}_roofline_ms"] for _, row in rows if row.get(f"{role}_roofline_ms")), None)
        if floor:
            axis.axvline(floor, color="black", linestyle="--", linewidth=1)
            axis.set_xlabel(f"dashed: the machine's limit, {floor:.2g} ms")
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _share(row: dict[str, Any], role: str) -> str:
    value = row.get(f"{role}_share")
    return f"{100 * value:.0f} %" if value else "-"


def _number(value: float | None) -> str:
    return f"{value:,.0f}" if value else "-"


if __name__ == "__main__":
    main()
