"""Block-causal decoding restated naively in PyTorch: no cache, no batch, and no code of the runtime's loop.

Every step is one forward over everything up to the end of the block, with a mask written out position by
position. An artifact whose cached decoding makes the same decisions counts its blocks, stores them and takes
the next token as the model does. Shape letters: L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trt_runtime.artifact.manifest import ABSOLUTE
from trt_runtime.decoding.policies.options import just_above
from trt_runtime.measure.case_fields import Case
from trt_runtime.measure.replay import Decision

from .reference import TorchBackend

_PROMPTS = (1, 7, 8, 13, 16, 21)  # lengths, on block boundaries and off them
_BLOCKS = (4, 8)


class _OwnKeys:
    """Replaces a transformers cache: a layer attends to the keys of its own call."""

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value


@dataclass(frozen=True)
class NaiveDecoding:
    """A checkpoint's own facts and network, decoded with the threshold policy."""

    reference: TorchBackend
    block_length: int
    small_block: int
    threshold: float

    def decisions(self, prompt: list[int], gen_length: int) -> Iterator[Decision]:
        """The positions that are committed, with their tokens, forward by forward."""
        facts, size = self.reference.source.decoding, self.block_length
        end = len(prompt) + gen_length
        # the first block begins at 0, or so far left of it that one ends with the prompt
        begin = 0 if facts.block_origin == ABSOLUTE else len(prompt) - -(-len(prompt) // size) * size
        blocks = [(start, start + size) for start in range(begin, end, size)]
        tokens = prompt + [facts.mask_token_id] * (blocks[-1][1] - len(prompt))
        if facts.block_origin != ABSOLUTE:
            tokens, blocks[-1] = tokens[:end], (blocks[-1][0], end)
        for start, stop in blocks:
            if facts.next_from_store and start >= len(prompt):
                ((token, _),) = self._proposed(tokens[:start], blocks, [start])
                tokens[start] = token
                yield [start], [token]
            for small in range(max(start, 0), min(stop, end), self.small_block):
                last = min(small + self.small_block, stop)
                answer = range(small, min(last, end))  # behind it, nothing has to be decoded
                while any(tokens[position] == facts.mask_token_id for position in answer):
                    yield self._committed(tokens, blocks, range(small, last), stop)

    def _committed(
        self, tokens: list[int], blocks: list[tuple[int, int]], inside: range, stop: int
    ) -> Decision:
        """One forward and what it commits, which is written into `tokens`."""
        masked = [p for p in inside if tokens[p] == self.reference.source.decoding.mask_token_id]
        proposed = self._proposed(tokens[:stop], blocks, masked)
        best = max(range(len(masked)), key=lambda i: (proposed[i][1], -i))
        is_strict = self.reference.source.decoding.is_threshold_strict
        least = just_above(self.threshold) if is_strict else self.threshold
        chosen = [i for i in range(len(masked)) if i == best or proposed[i][1] >= least]
        for i in chosen:
            tokens[masked[i]] = proposed[i][0]
        return [masked[i] for i in chosen], [proposed[i][0] for i in chosen]

    @torch.inference_mode()
    def _proposed(
        self, tokens: list[int], blocks: list[tuple[int, int]], asked: list[int]
    ) -> list[tuple[int, float]]:
        """For each asked position the best token that is not the mask, and its probability."""
        facts, network = self.reference.source.decoding, self.reference.network
        length = len(tokens)
        mask = torch.full((1, 1, length, length), -30000.0, dtype=self.reference.dtype)
        for start, stop in blocks:
            mask[:, :, max(start, 0) : stop, : max(stop, 0)] = 0
        ids, positions = torch.tensor([tokens]), torch.arange(length)[None]
        hidden = network.hidden_states(ids, positions, mask, _OwnKeys())
        rows = [position - facts.logit_shift for position in asked]
        probability = network.logits(hidden[:, rows])[0].double().softmax(-1)
        probability[:, facts.mask_token_id] = -1
        best = probability.max(-1)
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def cases(reference: TorchBackend) -> Iterator[tuple[Case, list[Decision]]]:
    """Cases with the artifact's cache, and the decisions of a naive decoding."""
    manifest, rng = reference.manifest, np.random.default_rng(0)
    special = manifest.decoding.special_token_ids
    words = [token for token in range(manifest.model.vocab_size) if token not in special]
    for number, length in enumerate(_PROMPTS):
        block = _BLOCKS[number % 2]
        small = block // 2 if manifest.decoding.small_block is not None else block
        gen = min(2 * block + 1 + number % 3, manifest.model.max_length - length - block)
        prompt = rng.choice(words, length).tolist()
        threshold = 0.9 if number % 2 else 0.3
        case = {
            "id": f"blocks-{number}",
            "mask_token_id": manifest.decoding.mask_token_id,
            "mode": "block",
            "prompt": [prompt],
            "gen_length": gen,
            "block_length": block,
            "small_block": small,
            "threshold": threshold,
        }
        naive = NaiveDecoding(reference, block, small, threshold)
        yield case, list(naive.decisions(prompt, gen))
