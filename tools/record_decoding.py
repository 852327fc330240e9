"""Record a decoding as an animated SVG: vanilla next to cached and parallel, each token where and when a
real run committed it.

    python tools/record_decoding.py artifacts/llada-demo --out docs/decoding.svg

Both runs are repeated in turn, several times, in this process. Those of median time are drawn, both slowed by
the same factor, which the picture states.
"""

from __future__ import annotations

import argparse
import html
import time
from dataclasses import dataclass
from pathlib import Path

import trt_runtime as rt
from trt_runtime.measure.bench import machine

PROMPT = "take red cups from kitchen to garage, then hand blue pens to Mia, and clean hall with mop"
RUNS = {
    "vanilla: no cache, one token per forward": rt.GenerationConfig(cache="none", policy="fixed"),
    "dual cache, threshold 0.9": rt.GenerationConfig(),
}
SECONDS, PAUSE = 9.0, 3.0  # the longest run on the screen, and the pause before the loop restarts
WIDTH, LINE, CHARACTER, MARGIN = 880, 24, 7.3, 16


@dataclass
class Run:
    """End of each forward in seconds from the start; text, confidence and forward (from 1) of every token."""

    times: list[float]
    tokens: dict[int, tuple[str, float, int]]
    answer: str
    useful: int


def record(model: rt.Model, config: rt.GenerationConfig) -> Run:
    begin, times, tokens, last = time.perf_counter(), [], {}, None
    for last in model.stream([PROMPT], config):
        times.append(time.perf_counter() - begin)
        for position, confidence in zip(last.changed, last.confidence, strict=True):
            tokens[position] = (model.piece(last.tokens[position]).strip(), confidence or 0.0, last.nfe)
    assert last is not None
    return Run(
        times,
        tokens,
        last.committed or "",
        len(model.tokenizer.encode(last.committed or "")) if model.tokenizer else 0,
    )


def median_runs(model: rt.Model, repeats: int) -> dict[str, Run]:
    recorded: dict[str, list[Run]] = {name: [] for name in RUNS}
    for _ in range(repeats):
        for name, config in RUNS.items():
            recorded[name].append(record(model, config))
    return {
        name: sorted(runs, key=lambda run: run.times[-1])[len(runs) // 2] for name, runs in recorded.items()
    }


STYLE = (
    "text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:12px}"
    ".name{font-weight:bold;font-size:13px;fill:#222}.token{fill:#111}.count{fill:#444;opacity:0}"
    ".mask{fill:none;stroke:#999;stroke-dasharray:2 2}.facts{fill:#666;font-size:11px}g{opacity:0}"
)


def draw(runs: dict[str, Run], facts: str) -> str:
    """The SVG. A token is hidden until its forward is done, in a loop of SECONDS + PAUSE."""
    slower = SECONDS / max(run.times[-1] for run in runs.values())
    total = SECONDS + PAUSE
    styles, body, top = [], [], 40
    for number, (name, run) in enumerate(runs.items()):
        shown = {p: token for p, token in sorted(run.tokens.items()) if p < run.useful}
        body.append(f'<text class="name" x="{MARGIN}" y="{top}">{html.escape(name)}</text>')
        for forward, at in enumerate(run.times, 1):
            share = 100 * at * slower / total
            styles.append(
                f"@keyframes "
                f"f{number}-{forward}{{0%,{share:.3f}%{{opacity:0}}{share + 0.001:.3f}%,100%{{opacity:1}}}}"
            )
        x, y = float(MARGIN), top + 14
        for text, confidence, forward in shown.values():
            width = CHARACTER * len(text) + 8
            if x + width > WIDTH - MARGIN:
                x, y = float(MARGIN), y + LINE
            hue = f"hsl({120 * confidence:.0f} 70% 75%)"
            body.append(
                f'<rect class="mask" x="{x:.1f}" y="{y}" width="{width:.1f}" height="19" rx="3"/>'
                f'<g style="animation:f{number}-{forward} {total}s infinite"><rect x="{x:.1f}" y="{y}" '
                f'width="{width:.1f}" height="19" rx="3" fill="{hue}"/>'
                f'<text class="token" x="{x + 4:.1f}" y="{y + 14}">{html.escape(text)}</text></g>'
            )
            x += width + 3
        y += LINE + 12
        for forward, at in enumerate(run.times, 1):
            end = run.times[forward] if forward < len(run.times) else None
            share, until = 100 * at * slower / total, 100 if end is None else 100 * end * slower / total
            styles.append(
                f"@keyframes "
                f"c{number}-{forward}{{0%,{share:.3f}%{{opacity:0}}"
                f"{share + 0.001:.3f}%,{until:.3f}%{{opacity:1}}"
                + ("" if end is None else f"{until + 0.001:.3f}%,100%{{opacity:0}}")
                + "}"
            )
            rate = f"{run.useful / len(run.times):.2f} per forward, {1000 * run.times[-1]:.0f} ms"
            done = "" if end is not None else f", {run.useful} tokens: {rate}"
            body.append(
                f'<text class="count" style="animation:c{number}-{forward} {total}s infinite" x="{MARGIN}" '
                f'y="{y + 4}">{forward} forwards{done}</text>'
            )
        top = y + 44
    style = STYLE + "".join(styles)
    facts = f"{facts}; shown {slower:.0f} times slower than measured"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 8}" '
        f'width="{WIDTH}"><title>Two decodings of one prompt, token by token</title>'
        f'<style>{style}</style><rect width="100%" height="100%" rx="6" fill="#fafafa"/><text class="facts" '
        f'x="{MARGIN}" y="18">&gt; {html.escape(PROMPT)}</text>'
        f'{"".join(body)}<text class="facts" x="{MARGIN}" y="{top - 8}">{html.escape(facts)}</text></svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, help="the exported demo model")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file to write")
    parser.add_argument(
        "--repeats", type=int, default=9, help="runs of each, in turn; the median is drawn (default 9)"
    )
    args = parser.parse_args()
    model, facts = rt.load(args.artifact, threads=1), machine()
    runs = median_runs(model, max(1, args.repeats))
    if len({run.answer for run in runs.values()}) > 1:
        print("note: the two answers differ: " + " | ".join(run.answer for run in runs.values()))
    args.out.write_text(
        draw(runs, f"{facts['cpu']}, one thread, onnxruntime {facts['versions']['onnxruntime']}"),
        encoding="utf-8",
    )
    for name, run in runs.items():
        print(f"{name}: {len(run.times)} forwards, {run.useful} tokens, {1000 * run.times[-1]:.0f} ms")


if __name__ == "__main__":
    main()
