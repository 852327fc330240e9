"""Tables of the smaller parts of benchmarks/cpu/system.py: block-causal decoding, experts, other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_BLOCKS = {"vanilla": "no cache, one token per forward", "block": "exact cache, stores apart",
           "block-fused": "exact cache, stores fused"}  # fmt: skip
_FORMS = {"ort": "ONNX Runtime fp32, dense", "ort fp32 MoE": "ONNX Runtime fp32, MoE",
          "ort int4": "ONNX Runtime int4, QMoE", "torch": "PyTorch fp32, eager"}  # fmt: skip

_BASELINES = (
    ("Fast-dLLM, eager PyTorch fp32", "dual"),
    ("PyTorch fp32, eager", "dual"),
    ("llama.cpp q8_0", "none"),
)


def sections(results: Path) -> list[str]:
    """The tables of what was measured."""
    parts = []
    for file in sorted(results.glob("system-blocks-*.json"), key=lambda file: int(file.stem.split("-")[2])):
        parts.append(blocks(json.loads(file.read_text(encoding="utf-8"))))
    speed, grown = results / "system-experts.json", results / "system-experts-scaling.json"
    if speed.is_file():
        parts.append(experts(json.loads(speed.read_text(encoding="utf-8"))))
    if grown.is_file():
        parts.append(growth(json.loads(grown.read_text(encoding="utf-8"))))
    if beside := programs(results):
        parts += [others(beside), "![other programs with the same weights](system-others.png)"]
    return parts


def programs(results: Path) -> dict[int, dict[str, Any]]:
    """The results of `--parts others`, by threads."""
    files = sorted(results.glob("system-others-*.json"))
    return {int(f.stem.rpartition("-")[2]): json.loads(f.read_text(encoding="utf-8")) for f in files}


def others(runs: dict[int, dict[str, Any]]) -> str:
    """Other programs with the same weights and schedule, a column for each thread count."""
    first = next(iter(runs.values()))
    settings, machine = first["settings"], first["machine"]
    speeds = {n: {(r["system"], r["cache"]): r for r in run["rows"]} for n, run in runs.items()}
    against = [key for key in _BASELINES if key in next(iter(speeds.values()))]
    ratios = "".join(f" | against {name.partition(',')[0]}" for name, _ in against)
    columns = [f"tokens/s at {n}{ratios}" for n in runs]
    lines = [
        f"Other programs with the same weights (a random LLaDA of {settings['parameters'] / 1e6:.0f} M "
        f"parameters), prompt ({settings['prompt']}) and schedule: {settings['gen_length']} tokens in blocks "
        f"of {settings['block']}, {settings['per_step']} in each step; {machine['cpu']} "
        f"({', '.join(machine['instruction_sets'])}), onnxruntime {machine['versions']['onnxruntime']}; "
        f"medians of {settings['repeats']} rounds; by threads:",
        "",
        f"| | cache | {' | '.join(columns)} | same tokens as ONNX Runtime fp32 |",
        "|---" * (3 + len(runs) * (1 + len(against))) + "|",
    ]
    for key in speeds[next(iter(runs))]:
        cells = [key[0], key[1]]
        for rows in speeds.values():
            own = rows[key]["tokens_per_second"]
            cells += [f"{own:.1f}", *(f"{own / rows[other]['tokens_per_second']:.2f}" for other in against)]
        row = next(iter(speeds.values()))[key]
        cells.append(f"{row['same_tokens']} of {row['of']}" if "of" in row else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _said(run: dict[str, Any]) -> str:
    versions = run["machine"]["versions"]
    return (
        f"1 thread; {run['machine']['cpu']} ({', '.join(run['machine']['instruction_sets'])}), onnxruntime "
        f"{versions['onnxruntime']}, torch {versions['torch']}; medians of {run['settings']['repeats']} "
        f"rounds"
    )


def blocks(run: dict[str, Any]) -> str:
    """Block-causal decoding beside eager PyTorch with the same cache and loop."""
    speeds = {row["variant"]: row["tokens_per_second"] for row in run["rows"]}
    lines = [
        f"A random SDAR of {run['artifact']['parameters'] / 1e6:.0f} M parameters, fp32, blocks of "
        f"{run['settings']['block_length']}; {_said(run)}:",
        "",
        "| | decoding | tokens/s | against PyTorch, stores apart | tokens per forward | ms a prefix pass | "
        "ms a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        backend, variant = row["variant"].split(" ")
        refine = "-" if row["refine_ms"] is None else f"{row['refine_ms']:.1f}"
        cells = ["ONNX Runtime" if backend == "ort" else "PyTorch, eager", _BLOCKS[variant]]
        cells += [f"{row['tokens_per_second']:.1f}", f"{speeds[row['variant']] / speeds['torch block']:.2f}"]
        cells += [f"{row['tokens_per_forward']:.2f}", f"{row['prefix_ms']:.0f}", refine]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def experts(run: dict[str, Any]) -> str:
    """The forms of a mixture of experts."""
    speeds = {row["variant"].rpartition(" ")[0]: row for row in run["rows"]}
    lines = [
        f"A random LLaDA-MoE of {run['artifact']['parameters'] / 1e6:.0f} M parameters (64 experts, 8 for "
        f"each row), dual cache, blocks of 32, two tokens per forward; {_said(run)}:",
        "",
        "| | tokens/s | against PyTorch | against dense | ms a prefix pass | ms a refine step | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, row in speeds.items():
        ratios = [row["tokens_per_second"] / speeds[other]["tokens_per_second"] for other in ("torch", "ort")]
        cells = [_FORMS[label], f"{row['tokens_per_second']:.1f}", *(f"{ratio:.2f}" for ratio in ratios)]
        cells += [f"{row['prefix_ms']:.0f}", f"{row['refine_ms']:.1f}"]
        cells.append(f"{run['peak_memory_mib'][label]:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def growth(report: dict[str, Any]) -> str:
    """How a forward grows with rows and experts, beside the roofline."""
    forms = {"dense": "dense", "moe": "MoE", "int4": "int4, QMoE"}
    lines = [
        "The same network, one forward over some rows of a canvas of 384, one thread; in brackets the "
        "roofline's time over the measured time (experts chosen independently):",
        "",
        f"| experts | rows | {' | '.join(f'{name}, ms' for name in forms.values())} | dense over MoE |",
        "|---|---|---|---|---|---|",
    ]
    points = {(p["experts"], p["rows"], p["form"]): p for p in report["points"]}
    for count, rows in sorted({(p["experts"], p["rows"]) for p in report["points"]}):
        of_form = [points[count, rows, form] for form in forms]
        cells = [f"{p['ms']:.1f} ({100 * p['roofline_ms'] / p['ms']:.0f} %)" for p in of_form]
        ratio = of_form[0]["ms"] / of_form[1]["ms"]
        lines.append(f"| {count} | {rows} | {' | '.join(cells)} | {ratio:.1f} |")
    return "\n".join(lines)
