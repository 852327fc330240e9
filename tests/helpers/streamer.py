"""A terminal program that streams the answer of a stand-in model block by block; the tokens are the texts of
a file (a JSON list).

python streamer.py TOKENS.json BLOCK: reads a line from standard input before forward 20, so that a
test can resize the terminal there.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

from trt_runtime.cli.render import show_stream
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.model import Update

MASK = 0
texts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
block = int(sys.argv[2])


def decode(ids):
    return "".join(texts[i - 1] for i in ids)


def stream(prompts, config, raw):
    rng, tokens, number = random.Random(0), [MASK] * len(texts), 0
    for start in range(0, len(texts), block):
        left = list(range(start, min(start + block, len(texts))))
        rng.shuffle(left)
        while left:
            if (number := number + 1) == 20:
                print("\x1b]2;waiting\x07", end="", flush=True)  # a title: nothing on the screen
                sys.stdin.readline()
            changed, left = sorted(left[:3]), left[3:]
            for i in changed:
                tokens[i] = i + 1
            done = start if left else min(start + block, len(texts))
            yield Update(
                0,
                number,
                "refine",
                decode(tokens[:done]),
                "",
                list(tokens),
                changed,
                [None] * len(changed),
                (start, start + block),
                done == len(texts),
            )


tokenizer = SimpleNamespace(decode=decode)
manifest = SimpleNamespace(decoding=SimpleNamespace(mask_token_id=MASK, eos_token_ids=[]))
show_stream(SimpleNamespace(stream=stream, tokenizer=tokenizer, manifest=manifest), "x", GenerationConfig())
