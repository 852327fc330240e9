"""When the cache is rebuilt, and what of the masks behind the block is seen: by what must come out the same,
and by the windows that are asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trt_runtime.decoding.cache_plan import Suffix
from trt_runtime.decoding.config import GenerationConfig
from trt_runtime.decoding.generator import Generator
from trt_runtime.decoding.rules import rules_of
from trt_runtime.decoding.sequence import Sequence
from trt_runtime.errors import DllmError


class Recorded:
    """A backend that notes the windows of its calls."""

    def __init__(self, backend):
        self.backend, self.calls = backend, []
        self.manifest, self.max_batch, self.steps_per_sync, self.new_cache = (
            backend.manifest,
            None,
            1,
            backend.new_cache,
        )

    def forward(self, role, cache, slots, window, **options):
        self.calls.append((role, window))
        return self.backend.forward(role, cache, slots, window, **options)


def _config(manifest, **options):
    return GenerationConfig(
        **{"gen_length": 30, "block_length": 8, "threshold": 0.05, "stop_at_eos": False} | options
    ).resolved(manifest)


def _run(backend, prompt, **options):
    row = Sequence(np.array(prompt), rules_of(_config(backend.manifest, **options), backend.manifest))
    Generator(backend, [row]).run()
    return row


PROMPTS = [[5, 9, 300], list(range(40, 59))]


@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_a_window_over_everything_is_a_rebuilt_cache(golden_backend, cache):
    """A refine step over the whole canvas makes what a prefix pass makes: the same tokens in the same
    steps."""
    for prompt in PROMPTS:
        full = _run(golden_backend, prompt, cache=cache)
        near = _run(golden_backend, prompt, cache=cache, refresh_every=0, refresh_window=100)
        assert near.canvas.tolist() == full.canvas.tolist()
        assert [step.positions for step in near.trace] == [step.positions for step in full.trace]
        assert [step.kind for step in near.trace].count("prefix_pass") == 1 and [
            step.kind for step in near.trace
        ].count("refine_near") == 3


@pytest.mark.parametrize("cache", ["dual", "prefix", "none"])
def test_a_suffix_that_holds_everything_changes_nothing(golden_backend, cache):
    for decay in (False, True):
        row = _run(golden_backend, PROMPTS[0], cache=cache, suffix=40, suffix_decay=decay)
        assert row.canvas.tolist() == _run(golden_backend, PROMPTS[0], cache=cache).canvas.tolist()


@pytest.mark.parametrize("cache", ["dual", "prefix", "none"])
def test_without_any_suffix_a_block_is_a_generation_of_its_own(golden_backend, cache):
    """Blocks that see nothing behind them come out as generations of one block each, over a prompt that
    grows."""
    for prompt in PROMPTS:
        row = _run(golden_backend, prompt, cache=cache, suffix=0, block_length=8)
        grown, nfe = list(prompt), 0
        for length in (8, 8, 8, 6):
            part = _run(golden_backend, grown, cache=cache, gen_length=length, block_length=8)
            grown, nfe = part.canvas.tolist(), nfe + part.nfe
        assert row.canvas.tolist() == grown and row.nfe == nfe


def _seen(canvas, mask, end, config):
    """Naively: positions before `end`, and behind it what is no mask, the nearest masks and the last."""
    masks = [p for p in range(end, len(canvas)) if canvas[p] == mask]
    if config.suffix is None or len(masks) <= config.suffix:
        kept = masks
    elif config.suffix_decay:
        kept = sorted(
            {
                masks[round(len(masks) ** (i / (config.suffix - 1) if config.suffix > 1 else 0)) - 1]
                for i in range(config.suffix)
            }
        )
    else:
        kept = ([*masks[: config.suffix - 1], masks[-1]]) if config.suffix else []
    return [p for p in range(len(canvas)) if p < end or canvas[p] != mask or p in kept]


OPTIONS = [
    {"suffix": 3},
    {"suffix": 5, "suffix_decay": True},
    {"suffix": 1},
    {"refresh_every": 2, "refresh_window": 2},
    {"refresh_every": 0},
    {"suffix": 4, "refresh_every": 0, "refresh_window": 1},
    {"suffix": 4, "cache": "prefix"},
    {"suffix": 2, "cache": "none"},
    {"refresh_every": 3, "cache": "prefix"},
    {"suffix": 3, "cache": "prefix", "refresh_every": 0, "refresh_window": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_windows_are_what_the_rules_say(golden_backend, options):
    """Every call's tokens, positions, cache rows and lengths, restated from the canvas alone."""
    backend = Recorded(golden_backend)
    config, mask = _config(backend.manifest, **options), backend.manifest.decoding.mask_token_id
    row = Sequence(np.array(PROMPTS[1]), rules_of(config, backend.manifest))
    generator, start = Generator(backend, [row]), len(PROMPTS[1])
    while not row.is_finished:
        (s, e), number, step = row.block, (row.block[0] - start) // 8, row.state.step
        canvas = row.canvas.tolist()
        seen = _seen(canvas, mask, e, config)
        generator.step()
        role, window = backend.calls[-1]
        is_full = config.cache == "none" or (
            step == 0 and (number == 0 or (config.refresh_every and number % config.refresh_every == 0))
        )
        assert role == ("prefix" if is_full else "refine")
        if is_full:
            expected = seen
        elif step == 0:
            first, last = s - 8 - config.refresh_window, e + config.refresh_window
            expected = [
                p
                for p in seen
                if p >= first and (p < last or config.cache == "prefix" or config.suffix is not None)
            ]
        else:
            expected = [p for p in seen if s <= p and (p < e or config.cache == "prefix")]
        assert window.position_ids[0].tolist() == expected and window.input_ids[0].tolist() == [
            canvas[p] for p in expected
        ]
        assert window.kv_len.tolist() == [len(seen)] and window.write_index.tolist() == [
            seen.index(expected[0])
        ]
    assert mask not in row.canvas


def test_rows_of_different_rules_share_a_batch(golden_backend):
    """Each comes out as alone."""
    rows = [
        Sequence(
            np.array(prompt), rules_of(_config(golden_backend.manifest, **options), golden_backend.manifest)
        )
        for prompt in PROMPTS
        for options in OPTIONS
    ]
    alone = [
        _run(golden_backend, prompt, **options).canvas.tolist() for prompt in PROMPTS for options in OPTIONS
    ]
    Generator(golden_backend, rows).run()
    assert [row.canvas.tolist() for row in rows] == alone


def test_gaps_of_the_prompt_are_filled_whatever_the_suffix(golden_backend):
    mask = golden_backend.manifest.decoding.mask_token_id
    prompt = [5, mask, 9, mask, mask, 30]
    row = _run(golden_backend, prompt, suffix=2, refresh_every=0, infill=True)
    assert mask not in row.canvas and row.canvas[[0, 2, 5]].tolist() == [5, 9, 30]


def test_suffixes():
    assert (
        Suffix(3).of(10).tolist() == [0, 1, 9]
        and Suffix(0).of(5).tolist() == []
        and Suffix(1).of(5).tolist() == [4]
    )
    decayed = Suffix(6, True).of(100)
    assert decayed[0] == 0 and decayed[-1] == 99 and (np.diff(np.diff(decayed)) >= 0).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"refresh_every": -1}, "refresh_every is -1"),
        ({"suffix": -2}, "suffix is -2"),
        ({"suffix_decay": True}, "needs suffix"),
        ({"cache": "none", "refresh_every": 2}, "need a cache"),
        ({"refresh_window": 4}, "refresh_window needs refresh_every"),
        ({"gamma": -1.0}, "gamma is -1"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"low_threshold": 0.0}, "low_threshold is 0"),
    ],
)
def test_options_out_of_range(golden_backend, options, said):
    with pytest.raises(DllmError, match=said):
        replace(GenerationConfig(), **options).resolved(golden_backend.manifest)
