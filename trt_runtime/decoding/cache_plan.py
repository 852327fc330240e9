"""Cache plans: which forward a row makes next, and therefore which keys and values are recomputed and which
are read from the cache.

A plan is chosen by its name (GenerationConfig.cache). It takes the state of a row (RowView) and returns a
Forward. A plan of your own is a class in one file: an entry point of the group `dllm_trt.cache_plans`, or
`--cache
my_module:MyPlan`.

With full attention, cached keys are approximate until the next prefix pass:

    none     every forward computes the whole canvas, and nothing is reused
    prefix   a block begins with a prefix pass; its refine steps compute the block and everything after it
    dual     a block begins with a prefix pass; its refine steps compute only the block

With block-causal attention, where nothing right of the block is seen (blocks.py):

    none        every forward computes everything up to the end of the block
    block       the prompt is stored by one prefix pass, each finished block by a forward; exact
    block_dual  as block, and steps compute only the small block (the sub-block cache of Fast-dLLM v2)

Positions are absolute and half-open.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from trt_runtime.artifact.manifest import ATTENTIONS, FULL
from trt_runtime.decoding.blocks import BlockView
from trt_runtime.decoding.policies.base import Bools, Ints

PREFIX, REFINE = "prefix", "refine"  # roles: contract.ROLES
# kinds of forwards, as traces, recorded cases and metrics name them
PREFIX_PASS, REFINE_BLOCK, REFINE_SUFFIX, REFINE_NEAR = (
    "prefix_pass",
    "refine_block",
    "refine_suffix",
    "refine_near",
)
# of block-causal attention: the prompt's whole blocks, a finished block, a finished block together with the
# first step of the next, the whole block with its keys kept for its small blocks, and a small block
PREFILL, STORE, STORE_AND_REFINE, REFINE_FILL, REFINE_SMALL = (
    "prefill",
    "store",
    "store_and_refine",
    "refine_fill",
    "refine_small",
)
KINDS = (
    PREFIX_PASS,
    REFINE_BLOCK,
    REFINE_SUFFIX,
    REFINE_NEAR,
    PREFILL,
    STORE,
    STORE_AND_REFINE,
    REFINE_FILL,
    REFINE_SMALL,
)
# refine steps that may follow one another without the host: all of a block's steps compute the same window
REPEATABLE = (REFINE_BLOCK, REFINE_SUFFIX, REFINE_SMALL)


@dataclass(frozen=True)
class Refresh:
    """When a prefix pass rebuilds the cache: at the start of every `every`-th block (1: every block; 0: only
    the first).

    Other blocks begin with a refine step over the previous block, the current block and `window` positions
    before and after the two: the vicinity refresh of dInfer (arXiv 2510.08666). `every` above 1 is the
    delayed refresh of dKV-Cache (arXiv 2505.15781).
    """

    every: int = 1
    window: int = 0


@dataclass(frozen=True)
class Suffix:
    """Which masks after the block a forward sees: at most `most` (None: all), because distant masks
    contribute little (DPad, arXiv 2508.14148).

    These are the `most` - 1 nearest and the last of the canvas (Streaming-dLLM, arXiv 2601.17917); with
    `decay`, `most` masks at distances that grow geometrically.
    """

    most: int | None = None
    decay: bool = False

    def of(self, count: int) -> Ints:
        """The indices of the visible ones of `count` masks, which are numbered from the nearest."""
        if self.most is None or count <= self.most:
            return np.arange(count)
        if not self.most:
            return np.arange(0)
        if self.decay:
            return np.unique(np.round(np.geomspace(1, count, self.most)).astype(np.int64)) - 1
        return np.append(np.arange(self.most - 1), count - 1)


@dataclass(frozen=True)
class Forward:
    """The next forward of a row: a window of its canvas, and the masked positions (candidates) that need
    statistics.

    role: the graph, 'prefix' or 'refine'. kind: what the window is, one of KINDS. The window consists of the
    positions [start, end), then those of `far`, which are further right. It is written to the cache from row
    `start` on; kv_len: the number of valid rows of the cache.

    With block-causal attention: row_len [S] is the number of rows of the cache that each row of the window
    sees; the first `stores` positions have their final keys and values in the cache afterwards. is_forced:
    all candidates are committed, whatever the policy. editable: committed positions that the forward may
    change (editing.py); they need statistics too.
    """

    role: str
    kind: str
    start: int
    end: int
    candidates: Ints
    far: Ints
    kv_len: int
    row_len: Ints | None = None
    stores: int = 0
    is_forced: bool = False
    editable: Ints = field(default_factory=lambda: np.arange(0))

    @property
    def asked(self) -> Ints:
        """The positions that need statistics: candidates, then editable ones."""
        return np.concatenate([self.candidates, self.editable]) if len(self.editable) else self.candidates

    @property
    def is_prefix_pass(self) -> bool:
        return self.role == PREFIX

    @property
    def rows(self) -> int:
        return self.end - self.start + len(self.far)

    @property
    def positions(self) -> Ints:
        """Canvas positions of the window's rows [S]."""
        return np.concatenate([np.arange(self.start, self.end), self.far])

    def logit_rows(self, shift: int) -> Ints:
        """Rows of the window that have the statistics of the positions asked for."""
        return np.maximum(np.searchsorted(self.positions, self.asked) - shift, 0)


@dataclass(frozen=True)
class RowView:
    """The state of a row, as a plan sees it.

    is_masked [L]: which positions of the canvas are masked. start, end: the current block [start, end).
    number: how many blocks were decoded before it. before: the range of the previous block; None for the
    first.
    opens_block: the next forward is the block's first (or a repetition of it, if the first one left the
    block's first position masked).
    is_first_only: the candidates of the block's first forward are only its first mask (Dream). fills_gaps: a
    prefix pass also has the masks before the block as candidates. blocks: with block-causal attention.
    """

    is_masked: Bools
    start: int
    end: int
    number: int
    before: tuple[int, int] | None
    opens_block: bool
    is_first_only: bool
    fills_gaps: bool
    blocks: BlockView | None = None

    @property
    def inside(self) -> Ints:
        """The masks of the block."""
        return self.start + np.flatnonzero(self.is_masked[self.start : self.end])

    @property
    def masked(self) -> Ints:
        """The masks of the block and of everything before it: gaps of the prompt."""
        return np.flatnonzero(self.is_masked[: self.end])

    @property
    def first_candidates(self) -> Ints:
        """The block's masks that its first forward may commit."""
        return self.inside[:1] if self.is_first_only else self.inside

    def after(self, suffix: Suffix) -> Ints:
        """The visible positions after the block: those that are not masked, and the masks that `suffix`
        selects."""
        rest = np.arange(self.end, len(self.is_masked))
        if suffix.most is None:
            return rest
        is_masked = self.is_masked[self.end :]
        return np.sort(np.concatenate([rest[~is_masked], rest[is_masked][suffix.of(int(is_masked.sum()))]]))


@dataclass(frozen=True)
class CachePlan(ABC):
    """Chooses the next forward of a row. refresh, suffix: the user's options. name: on the command line
    and in requests. keeps_cache: whether a forward reads what an earlier one wrote; only then do the refresh
    options apply. attentions: which kinds of attention it is for (manifest.ATTENTIONS). may_fuse_stores:
    whether it can store a finished block by the first step of the next. fuses_stores: whether it does."""

    name: ClassVar[str]
    keeps_cache: ClassVar[bool] = True
    attentions: ClassVar[tuple[str, ...]] = (FULL,)
    may_fuse_stores: ClassVar[bool] = False
    refresh: Refresh = field(default_factory=Refresh)
    suffix: Suffix = field(default_factory=Suffix)
    fuses_stores: bool = False

    @abstractmethod
    def next_forward(self, row: RowView) -> Forward:
        """The forward that the row makes next."""


class NoCache(CachePlan):
    """Every forward is a pass over the canvas; gaps of the prompt are filled along the way. With block-causal
    attention it ends with the block."""

    name = "none"
    keeps_cache = False
    attentions = ATTENTIONS

    def next_forward(self, row: RowView) -> Forward:
        if (blocks := row.blocks) is not None:
            # a block's first token comes from a pass that ends before it, as when that pass stores keys
            end = blocks.start if blocks.needs_first else blocks.end
            return of_blocks(
                blocks,
                (PREFIX, PREFIX_PASS, 0, end),
                np.array([end]) if blocks.needs_first else row.inside,
                is_forced=blocks.needs_first,
            )
        return prefix_pass(row, row.masked, row.after(self.suffix))


class _BlockCache(CachePlan):
    """A block begins with a prefix pass or, where the cache is not rebuilt, with a refine step over its
    surroundings; refine steps follow."""

    kind: ClassVar[str]
    computes_suffix: ClassVar[bool]

    def next_forward(self, row: RowView) -> Forward:
        after = row.after(self.suffix)
        if not row.opens_block:
            far = after if self.computes_suffix else after[:0]
            return Forward(REFINE, self.kind, row.start, row.end, row.inside, far, row.end + len(after))
        near = self._near(row)
        if near is None:
            return prefix_pass(row, row.masked if row.fills_gaps else row.first_candidates, after)
        # a bounded suffix selects other masks for each block, in other cache rows: recompute all of them
        reach = len(after) if self.computes_suffix or self.suffix.most is not None else self.refresh.window
        return Forward(
            REFINE, REFINE_NEAR, near, row.end, row.first_candidates, after[:reach], row.end + len(after)
        )

    def _near(self, row: RowView) -> int | None:
        """The start of the window of a block's first forward; None if that is a prefix pass."""
        is_next = row.before is not None and row.before[1] == row.start
        if not is_next or (self.refresh.every and row.number % self.refresh.every == 0):
            return None
        assert row.before is not None
        return max(0, row.before[0] - self.refresh.window)


class PrefixCache(_BlockCache):
    """Keys and values before the block are reused."""

    name = "prefix"
    kind = REFINE_SUFFIX
    computes_suffix = True


class DualCache(_BlockCache):
    """Keys and values before and after the block are reused."""

    name = "dual"
    kind = REFINE_BLOCK
    computes_suffix = False


def prefix_pass(row: RowView, candidates: Ints, after: Ints) -> Forward:
    """A pass over the visible canvas, which rebuilds the cache."""
    return Forward(PREFIX, PREFIX_PASS, 0, row.end, candidates, after, row.end + len(after))


def of_blocks(
    blocks: BlockView,
    window: tuple[str, str, int, int],
    candidates: Ints,
    *,
    visible: int | None = None,
    stores: int = 0,
    is_forced: bool = False,
) -> Forward:
    """A forward with block-causal attention. window: its role, kind, start and end. visible: how much of the
    cache is valid, if more than the window's end."""
    role, kind, start, end = window
    row_len, none = blocks.reach[start:end], candidates[:0]
    return Forward(role, kind, start, end, candidates, none, visible or end, row_len, stores, is_forced)
