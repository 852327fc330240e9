"""Where a forward spends its time on a CPU: the share of every operator in a refine step and a prefix pass,
and how near its matrix products come to the machine's own rate.

    python benchmarks/cpu/operators.py                              # a random LLaDA of 140 M, fp32 and w8a8
    python benchmarks/cpu/operators.py --artifact artifacts/x       # an artifact of yours

ONNX Runtime's own profile of the artifact as it is shipped, one thread, prompt 256, 128 tokens in blocks of
32. Matrix products are told apart by their sizes. Medians of the calls.
"""

from __future__ import annotations

import argparse
import bisect
import json
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

sys.path.append(str(Path(__file__).resolve().parents[2]))

import system
from machine_rates import peaks

from trt_runtime.artifact import manifest as manifests
from trt_runtime.artifact.manifest import ModelFacts
from trt_runtime.backends.ort import OrtBackend
from trt_runtime.measure.bench import machine

CALLS = {"refine": 12, "prefix": 5}  # the first two of each warm up
_PRODUCTS = (
    "Gemm",
    "FusedGemm",
    "MatMul",
    "FusedMatMul",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "DynamicQuantizeMatMul",
)
_SHAPE = re.compile(r"\d+")


def measure(artifact: Path, threads: int, folder: Path) -> dict[str, Any]:
    """ms and share of each operator, and the operations of its products, of both forwards."""
    report: dict[str, Any] = {}
    for kind, count in CALLS.items():
        backend = _profiled(artifact, threads, folder / f"{artifact.name}-{kind}")
        facts, base = backend.manifest.model, system.BASE
        length, block = _length(facts), base["block"]
        prompt = length - base["gen_length"]
        canvas = np.random.default_rng(0).integers(0, facts.vocab_size // 2, (1, length))
        start, end = (0, length) if kind == "prefix" else (prompt, prompt + block)
        window = system.window_of(canvas, start, end, prompt, block)
        cache = backend.new_cache(1, length)
        for _ in range(count):
            (backend.prefix if kind == "prefix" else backend.refine)(cache, slice(0, 1), window)
        report[kind] = _summed(
            json.loads(Path(backend._session.end_profiling()).read_text(encoding="utf-8")), facts
        )
        backend.close()
    return report


def _length(facts: ModelFacts) -> int:
    """The canvas: a prompt and an answer, as far as the model goes."""
    return min(system.BASE["prompt"] + system.BASE["gen_length"], facts.max_length)


def _profiled(artifact: Path, threads: int, prefix: Path) -> OrtBackend:
    """The backend with ONNX Runtime's profiler on."""
    plain = ort.SessionOptions

    def profiling() -> Any:
        options = plain()
        options.enable_profiling, options.profile_file_prefix = True, str(prefix)
        return options

    ort.SessionOptions = profiling  # type: ignore[assignment,misc]
    try:
        return OrtBackend(artifact, threads=threads)
    finally:
        ort.SessionOptions = plain  # type: ignore[misc]


def _summed(events: list[dict[str, Any]], facts: ModelFacts) -> list[dict[str, Any]]:
    """A row for each operator, the longest first."""
    begins = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    calls: list[dict[str, list[float]]] = [defaultdict(lambda: [0.0, 0.0]) for _ in begins]
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        name, operations = _named(event["args"], facts)
        entry = calls[bisect.bisect_right(begins, event["ts"]) - 1][name]
        entry[0] += event["dur"] / 1000
        entry[1] += operations
    kept = calls[2:]
    whole = statistics.median(sum(ms for ms, _ in call.values()) for call in kept)
    rows = []
    for name in {name for call in kept for name in call}:
        ms = statistics.median(call[name][0] for call in kept)
        rows.append({"operator": name, "ms": ms, "share": ms / whole, "operations": kept[0][name][1]})
    return sorted(rows, key=lambda row: -row["ms"])


def _named(arguments: dict[str, Any], facts: ModelFacts) -> tuple[str, float]:
    """What a node is, and its multiplications and additions if it is a matrix product."""
    kind, shapes = arguments["op_name"], arguments.get("input_type_shape", [])
    sizes = [list(map(int, _SHAPE.findall(str(next(iter(shape.values())))))) for shape in shapes]
    if kind not in _PRODUCTS or len(sizes) < 1 or not sizes[0]:
        return kind, 0.0
    out = list(map(int, _SHAPE.findall(str(next(iter(arguments["output_type_shape"][0].values()))))))
    rows, inner, wide = int(np.prod(sizes[0][:-1])), sizes[0][-1], out[-1]
    widths = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    names = {
        (facts.hidden_size, facts.vocab_size): "head",
        (facts.hidden_size, facts.intermediate_size): "gate, up",
        (facts.intermediate_size, facts.hidden_size): "down",
        **{(facts.hidden_size, width): "q, k, v, o" for width in widths},
    }
    return f"{names.get((inner, wide), f'{inner} to {wide}')} ({kind})", 2.0 * rows * inner * wide


def attention_forms(facts: ModelFacts, threads: int) -> list[dict[str, Any]]:
    """ms of ONNX Runtime's two attention operators over the shapes of both forwards, and how far their
    results are apart."""
    heads, size, base = facts.num_heads, facts.head_dim, system.BASE
    length, rng, rows = _length(facts), np.random.default_rng(0), []
    for count in (base["block"], length):
        q, k, v = (
            rng.standard_normal((1, heads, n, size)).astype(np.float32) for n in (count, length, length)
        )
        flat = np.ascontiguousarray(q.transpose(0, 2, 1, 3)).reshape(1, count, heads * size)
        options = {"num_heads": heads, "scale": size**-0.5, "domain": "com.microsoft"}
        forms = {
            "Attention": (_one_node("Attention", (q, k, v), threads, scale=size**-0.5), q),
            "MultiHeadAttention": (_one_node("MultiHeadAttention", (flat, k, v), threads, **options), flat),
        }
        results, taken = {}, defaultdict(list)
        for _ in range(15):
            for name, (session, first) in forms.items():
                begin = time.perf_counter()
                results[name] = session.run(None, {"q": first, "k": k, "v": v})[0]
                taken[name].append(1000 * (time.perf_counter() - begin))
        other = results["Attention"].transpose(0, 2, 1, 3).reshape(results["MultiHeadAttention"].shape)
        apart = float(np.abs(other - results["MultiHeadAttention"]).max())
        rows.append(
            {"rows": count, "apart": apart, "ms": {name: statistics.median(ms) for name, ms in taken.items()}}
        )
    return rows


def _one_node(operator: str, arrays: tuple[Any, ...], threads: int, **attributes: Any) -> Any:
    """A session of one node with the inputs q, k and v."""
    node = helper.make_node(operator, ["q", "k", "v"], ["y"], **attributes)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
        for name, array in zip("qkv", arrays, strict=True)
    ]
    graph = helper.make_graph(
        [node], "one", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def table(report: dict[str, Any], rates: dict[str, float]) -> str:
    """Both forwards of every artifact, as text. Rates are the machine's own."""
    lines = []
    for artifact, kinds in report.items():
        rate = rates["int8" if "w8a8" in artifact else "fp32"]
        for kind, rows in kinds.items():
            lines.append(f"\n{artifact}, {kind}: {sum(row['ms'] for row in rows):.1f} ms")
            for row in rows:
                if row["share"] < 0.005:
                    continue
                speed = row["operations"] / row["ms"] / 1e6
                of = (
                    f"{speed:8.0f} G/s {100 * speed * 1e9 / rate:4.0f} % of the rate"
                    if row["operations"]
                    else ""
                )
                lines.append(f"  {row['operator']:38}{row['ms']:8.2f} ms {100 * row['share']:5.1f} %{of}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", type=Path, action="append", help="an artifact (may be repeated)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a forward (default 1)")
    parser.add_argument("--output", type=Path, help="a file for the JSON result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        artifacts = args.artifact
        if not artifacts:
            fp32, (w8a8, _) = system.artifacts(None, folder)
            artifacts = [fp32, w8a8]
        report = {path.name: measure(path, args.threads, folder) for path in artifacts}
        forms = attention_forms(manifests.load(artifacts[0]).model, args.threads)
    rates = peaks(args.threads)
    print(table(report, rates))
    for row in forms:
        each = ", ".join(f"{name} {ms:.2f} ms" for name, ms in row["ms"].items())
        print(f"attention of {row['rows']} rows, one layer: {each}; apart {row['apart']:g}")
    if args.output:
        whole = {"machine": machine(), "threads": args.threads, "rates": rates}
        whole |= {"operators": report, "attention": forms}
        args.output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
