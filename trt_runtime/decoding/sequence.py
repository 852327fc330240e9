"""One row: its canvas, its blocks, and the next forward it needs. No backend, no batch.

Positions are absolute, ranges half-open. A row goes through its blocks from left to right: prefix pass ->
select -> (refine -> select)* until the block has no mask, then the next block. With block-causal attention
(blocks.py): prefill -> (step -> select)* -> store, then the next block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from trt_runtime.decoding.blocks import BlockView
from trt_runtime.decoding.cache_plan import REFINE_FILL, REPEATABLE, Forward, RowView
from trt_runtime.decoding.device_commit import proposed_mask
from trt_runtime.decoding.editing import EditState
from trt_runtime.decoding.policies.base import (
    BlockState,
    Bools,
    CommitRule,
    Ints,
    RowStats,
    select_holding_back,
    without_confidence,
)
from trt_runtime.decoding.rules import Rules
from trt_runtime.decoding.trace import Step, Trace, Written


class Sequence:
    """The state of one row. canvas: the prompt and gen_length mask tokens (with block-causal attention more,
    to the end of the last block); end: the first position after the answer; trace: grows by one step per
    forward."""

    def __init__(self, prompt: Ints, rules: Rules, seed: int = 0) -> None:
        self.rules, blocks = rules, rules.blocks
        self.prompt_length, self.end = len(prompt), len(prompt) + rules.gen_length
        length = blocks.canvas_length(len(prompt), rules.gen_length) if blocks else self.end
        closing = [] if rules.closing_token_id is None else [rules.closing_token_id]
        masks = np.full(length - len(prompt), rules.mask_token_id, np.int64)
        self.canvas: Ints = np.concatenate([prompt, masks, np.array(closing, np.int64)])
        # with block-causal attention: the end of each position's block [L]
        self.reach = None if blocks is None else blocks.reach(len(prompt), length)
        self._stored = 0  # positions whose final keys and values are in the cache
        self._filled = -1  # the start of the block whose keys and values were computed as a whole
        self.history = Trace()
        self.rng = np.random.default_rng(seed)
        self.uniform = np.random.default_rng([seed, 1]).random(len(self.canvas))
        self.block: tuple[int, int] | None = None
        self.before: tuple[int, int] | None = None  # the block before
        self._number = -1  # of the block
        self._edits = EditState()  # of the running block
        self.num_free = 0  # steps of the trace without a forward of their own (speculation.py)
        self._state = BlockState(0, 0)
        self._num_followed = 0  # the last steps of the trace that are not yet in _state
        self._has_end = False  # whether an end token was written
        self._open_block(self.prompt_length)

    @property
    def length(self) -> int:
        return len(self.canvas)

    @property
    def trace(self) -> list[Step]:
        """The finished forwards."""
        return self.history.steps

    @property
    def is_masked(self) -> Bools:
        return self.canvas == self.rules.mask_token_id

    @property
    def is_finished(self) -> bool:
        return self.block is None

    @property
    def nfe(self) -> int:
        return self.history.count - self.num_free

    @property
    def state(self) -> BlockState:
        """The progress in the running block."""
        if self._num_followed:
            seen = [seen for step in self.trace[-self._num_followed :] if (seen := step.seen) is not None]
            self._state = self._state.after([(each[0], each[1].confidence) for each in seen])
            self._num_followed = 0
        return self._state

    def fork(self) -> Sequence:
        """An independent copy that continues from here, with a trace of its own."""
        twin = copy.copy(self)
        twin._state, twin._num_followed = self.state, 0
        twin.canvas, twin.history = self.canvas.copy(), Trace()
        return twin

    @property
    def output(self) -> Ints:
        """The generated part [gen_length]."""
        return self.canvas[self.prompt_length : self.end]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The blocks of the answer, half-open, from left to right."""
        size, start, ranges = self.rules.block_length or self.length, self.prompt_length, []
        while start < self.end:
            after = start + size if self.reach is None else int(self.reach[start])
            ranges.append((start, min(after, self.end)))
            start = after
        return ranges

    @property
    def num_useful(self) -> int:
        """Generated tokens before the first end-of-sequence token."""
        is_end = np.isin(self.output, self.rules.eos_token_ids)
        return int(is_end.argmax()) if is_end.any() else self.rules.gen_length

    @property
    def num_edits(self) -> int:
        """How often a committed token was changed."""
        return sum(len(step.edits[0]) for step in self.trace if step.edits)

    def next_forward(self) -> Forward:
        """The forward that the row makes next. A prefix pass may also fill masks before the block (gaps of
        the prompt)."""
        assert self.block is not None, "the row is finished"
        forward = self.rules.cache.next_forward(
            RowView(
                self.is_masked,
                *self.block,
                self._number,
                self.before,
                self.opens_block,
                is_first_only=self._has_first_commit and not self.rules.hold_back_eos,
                fills_gaps=not self._has_first_commit,
                blocks=self._block_view(),
            )
        )
        if self.rules.editing is None or forward.end < self.block[1]:  # a store alone
            return forward
        inside = np.arange(max(self.block[0], self.prompt_length), self.block[1])
        return replace(forward, editable=inside[~self.is_masked[inside]])

    def _block_view(self) -> BlockView | None:
        """Where the row stands among its blocks; None with full attention."""
        blocks, where = self.rules.blocks, self.block
        if blocks is None or self.reach is None:
            return None
        assert where is not None
        start, end = blocks.block_of(where[0], self.prompt_length, self.length)
        return BlockView(
            self.reach,
            start,
            end,
            blocks.small_block_of(where[0], self.prompt_length, self.length),
            self._stored,
            is_filled=self._filled == start,
            needs_first=blocks.next_from_store and start > 0 and bool(self.is_masked[start]),
        )

    @property
    def opens_block(self) -> bool:
        """Whether the next forward is the block's first or repeats it. It is repeated if `hold_back_eos` left
        the block's first position masked and the row before the block predicts it (logit_shift 1), because a
        refine step over the block alone cannot fill that position."""
        assert self.block is not None
        is_held = self.rules.hold_back_eos and self._has_first_commit and bool(self.is_masked[self.block[0]])
        return self.state.step == 0 or is_held

    def commit(self, forward: Forward, stats: RowStats, instead: Written | None = None) -> None:
        """Let the policy choose among the candidates, write the proposals, and advance. instead: positions
        and tokens to write in place of the policy's; the trace still records the policy's choice
        (replay.follow)."""
        assert self.block is not None
        state = replace(
            self.state, uniform=self.uniform[forward.candidates], rng=self.rng, positions=forward.candidates
        )
        count = len(forward.candidates)
        asked, stats = stats, stats.part(slice(count))
        if forward.is_forced or not count:
            chosen, forced = np.ones(count, np.bool_), forward.is_forced
        else:
            stats, chosen, forced = self._choose(stats, state)
        positions, tokens = forward.candidates[chosen], stats.token[chosen]
        if self.rules.mask_token_id in tokens:
            raise proposed_mask(self.rules.mask_token_id)
        written, edits, looked = (positions.tolist(), tokens.tolist()), None, None
        if self.rules.editing is not None:
            rest = asked.part(slice(count, None))
            which = self.rules.editing.select(rest, self.canvas[forward.editable])
            edits = forward.editable[which].tolist(), rest.token[which].tolist()
            looked = forward.editable, rest
        step = Step(
            forward.kind,
            forward.start,
            forward.rows,
            *written,
            (forward.candidates, stats, state),
            edits,
            looked,
        )
        self._write(forward, step, instead, forced)

    def _choose(self, stats: RowStats, state: BlockState) -> tuple[RowStats, Bools, bool]:
        """The effective statistics [R], the candidates to commit [R], and whether the commit is forced: the
        block's first position, whatever the policy."""
        every = np.ones(len(stats.token), np.bool_)
        if not self.rules.hold_back_eos:
            return (
                stats,
                every if self.is_forced else self.rules.policy.select(stats, every, state),
                self.is_forced,
            )
        is_end = np.isin(stats.token, self.rules.eos_token_ids)
        stats = without_confidence(stats, is_end)
        if self.is_forced and not is_end[0]:
            return stats, np.arange(len(every)) == 0, True
        return stats, select_holding_back(self.rules.policy, stats, is_end, state), False

    def commit_rule(self, forward: Forward) -> CommitRule | None:
        """The policy's choices in the current block as data, if a device can follow them from this forward
        on."""
        assert self.block is not None
        is_alone = not self.is_masked[forward.start : self.block[0]].any()
        inside = bool((forward.candidates < self.block[1]).all()) and is_alone
        if (
            forward.kind not in REPEATABLE
            or self.rules.sampler.needs_logits
            or self.rules.hold_back_eos
            or self.rules.editing is not None
            or not inside
        ):
            return None
        return self.rules.policy.rule(self.state, self.block[1] - forward.start)

    def follow(self, positions: Ints, tokens: Ints) -> None:
        """Apply what a device committed in one step of the current block."""
        forward = self.next_forward()
        step = Step(forward.kind, forward.start, forward.rows, positions.tolist(), tokens.tolist())
        self._write(forward, step, None, self.is_forced)

    def follow_step(
        self, step: Callable[[], Step], positions: Ints, tokens: Ints, *, may_be_done: bool, has_end: bool
    ) -> None:
        """Write a step of the current block that was chosen elsewhere (running.py). step: returns it, for the
        trace. may_be_done: whether the block may be done; has_end: whether a token is an end token."""
        self.canvas[positions] = tokens
        self.history.add(step)
        self._num_followed += 1
        self._has_end = self._has_end or has_end
        if may_be_done or (self._has_end and self.rules.stop_at_eos):
            self._advance(may_end=not self.rules.stop_after_block)

    def _write(self, forward: Forward, step: Step, instead: Written | None, forced: bool) -> None:
        """Write a step, or what stands `instead` of it, into the canvas, record it, and advance."""
        assert self.block is not None
        had_masks, seen = bool(self.is_masked[slice(*self.block)].any()), step.seen
        for positions, tokens in (
            [instead] if instead else [(step.positions, step.tokens), *step.written_edits]
        ):
            self.canvas[positions] = tokens
            self._has_end = self._has_end or any(token in self.rules.eos_token_ids for token in tokens)
        self.history.add(lambda: step)
        if forward.end >= self.block[1]:
            has_edited = any(positions for positions, _ in step.written_edits)
            self._edits = self._edits.after(had_masks=had_masks, has_edited=has_edited)
        self._stored = max(self._stored, forward.stores)
        if forward.kind == REFINE_FILL:
            self._filled = forward.start
        if forward.is_forced:  # it belongs to no step of the block
            self._state = replace(self.state, num_masked=int(self.is_masked[slice(*self.block)].sum()))
            self._advance(may_end=not self.rules.stop_after_block)
            return
        left = int(self.is_masked[slice(*self.block)].sum()) if forced else self.state.num_masked
        state = replace(self.state, num_masked=left, forced=self.state.forced + forced)
        if seen is None or forced:
            self._state = replace(state, step=state.step + 1)
        else:
            self._state = state.after([(seen[0], seen[1].confidence)])
        self._advance(may_end=not self.rules.stop_after_block)

    def _advance(self, *, may_end: bool) -> None:
        """Open the next block if this one is done, or end the row. A block is done without masks in the
        answer (behind it, nothing has to be decoded), and, where tokens are edited, without any and with
        nothing to edit."""
        assert self.block is not None
        (start, end), editing = self.block, self.rules.editing
        is_done = not self.is_masked[start : end if editing else min(end, self.end)].any()
        is_done = is_done and (editing is None or self._edits.is_done(editing))
        may_end = may_end and editing is None
        if self.rules.stop_at_eos and self._has_end and (may_end or is_done) and self._has_ended():
            self.block = None
        elif is_done:
            self._open_block(self.block[1])

    @property
    def is_forced(self) -> bool:
        """Whether the next forward commits the block's first mask, whatever the policy."""
        return self._has_first_commit and self.state.step == 0

    @property
    def _has_first_commit(self) -> bool:
        return self.rules.first_commit and self.rules.cache.keeps_cache

    def _open_block(self, start: int) -> None:
        """Open the next block: first those of the generation, from left to right, then the gaps of the
        prompt."""
        masked = np.flatnonzero(self.is_masked[: self.end])
        limit, self.before, self._number = self.end, self.block, self._number + 1
        if not len(masked):
            self.block = None
            return
        if self.rules.blocks is not None:
            first = int(masked[0])
            _, end = self.rules.blocks.small_block_of(first, self.prompt_length, self.length)
            self._open(first, end, self.rules.blocks.length)
            return
        size = self.rules.block_length or self.length
        if masked[-1] < self.prompt_length:
            start, limit = int(masked[0]), self.prompt_length
        elif self.rules.block_length is None:
            start = int(masked[0])
        end = min(start + size, limit)
        self._open(start, end, end - start)

    def _open(self, start: int, end: int, length: int) -> None:
        """Open the block [start, end), or part of a block of `length` positions."""
        self.block, self._edits = (start, end), EditState()
        state = BlockState(int(self.is_masked[start:end].sum()), 0, length=length)
        self._state, self._num_followed = state, 0

    def _has_ended(self) -> bool:
        """Whether there is an end-of-sequence token without a mask before it; everything after it is then
        filled with it."""
        first = self.num_useful
        if first == self.rules.gen_length or self.is_masked[: self.prompt_length + first].any():
            return False
        if self.rules.stop_after_block:
            return True
        rest = self.output[first:]
        rest[rest == self.rules.mask_token_id] = rest[0]
        return True
