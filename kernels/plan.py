"""What a call of ``li::sparse_attention`` will do, from lengths and ratios alone: no tensor, no device.

The operator runs this plan and :func:`density` reports it, so FLOPs in reports are those executed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from .layout import Tile, forced_counts, num_blocks

__all__ = ["CONTEXT", "CURRENT", "TEXT", "Density", "Plan", "density", "make_plan"]

TEXT, CONTEXT, CURRENT = 0, 1, 2


@dataclass(frozen=True)
class Plan:
    """Blocks and the budget of every query block.

    Blocks are numbered text first, then history, both in a source that stays, then the current segment's in another. With ``in_place`` the
    first source is the history alone, and text follows the current tokens in the second, whose ``second`` tokens are cut into blocks as one.

    Attributes:
        frames: by segment, latent frames (0 for text).
        static: segment numbers of the first source, text before history. current: of the second.
        blocks: by segment.
        text_blocks, context_blocks, current_blocks: blocks of each kind. total: of both sources.
        decode: there is a context segment.
        protected: without one, frames at the end of the current segment whose keys every query reads.
        dense: the ratio asks for everything.
        first, candidates: the blocks that are chosen from; those around them are always kept.
        keep: candidates chosen by score, by head (one row: all heads) and query block (one column: all).
        kept: blocks kept in all by a query block, the mean over heads. pitch: the largest number of them.
    """

    lengths: tuple[int, ...]
    frames: tuple[int, ...]
    static: tuple[int, ...]
    current: int
    blocks: tuple[int, ...]
    height: int
    width: int
    tile: Tile
    block_size: int
    text_blocks: int
    context_blocks: int
    current_blocks: int
    decode: bool
    protected: int
    dense: bool
    first: int
    candidates: int
    keep: tuple[tuple[int, ...], ...]
    kept: tuple[float, ...]
    pitch: int
    total: int
    in_place: bool
    second: int


def make_plan(lengths, roles, height, width, tile, block_size, topk_ratio, prefill_ratio, head_ratios=(), protected=0, in_place=False) -> Plan:
    """The plan for segments of these lengths and roles; arguments as in ``li::sparse_attention``.

    Raises ValueError where they don't fit together.
    """
    return _make_plan(tuple(lengths), tuple(roles), height, width, tuple(tile), block_size, topk_ratio, prefill_ratio, tuple(head_ratios), protected,
                      in_place)


@functools.lru_cache(maxsize=256)
def _make_plan(lengths, roles, height, width, tile, block_size, topk_ratio, prefill_ratio, head_ratios, protected, in_place) -> Plan:
    if len(roles) != len(lengths) or not set(roles) <= {TEXT, CONTEXT, CURRENT} or roles.count(CURRENT) != 1:
        raise ValueError(
            f"Each of {len(lengths)} segments needs a role, 0 text, 1 context or 2 current, and exactly one is current; found {list(roles)}."
        )
    if height < 1 or width < 1 or block_size < 1 or len(tile) != 3 or min(tile) < 1:
        raise ValueError(f"Frame, tile and block sizes must be at least 1; found {height} x {width}, tile {tile}, block {block_size}.")
    if min(topk_ratio, prefill_ratio, *head_ratios) < 0:
        raise ValueError(f"Ratios must not be negative; found topk_ratio {topk_ratio}, prefill_ratio {prefill_ratio}, head_ratios {head_ratios}.")
    for length, role in zip(lengths, roles):
        if length < 1 or (role != TEXT and length % (height * width)):
            raise ValueError(
                f"A visual segment must hold whole frames of {height} x {width} = {height * width} tokens and no segment "
                f"may be empty; found {length} tokens. Leave out empty segments."
            )
    if in_place and roles.count(CONTEXT) != 1:
        raise ValueError(f"History is read in place where it is one segment of role 1; found roles {list(roles)}.")
    frames = tuple(0 if role == TEXT else length // (height * width) for length, role in zip(lengths, roles))
    current = roles.index(CURRENT)
    static = tuple(s for kind in (TEXT, CONTEXT) if not (in_place and kind == TEXT) for s, role in enumerate(roles) if role == kind)
    blocks = tuple(num_blocks(length, block_size) for length in lengths)
    text, context, queries = (sum(n for n, r in zip(blocks, roles) if r == kind) for kind in (TEXT, CONTEXT, CURRENT))
    text = 0 if in_place else text
    second = sum(n for n, r in zip(lengths, roles) if r == CURRENT or in_place and r == TEXT)
    read = num_blocks(second, block_size)  # of the second source
    decode = CONTEXT in roles
    if protected and (decode or not 0 < protected <= frames[current]):
        raise ValueError(f"protected counts frames of the one segment that holds history and new frames, of at most {frames[current]} here "
                         f"and without a context segment, whose current frames are all kept; found {protected} and roles {list(roles)}.")
    ratios = head_ratios or (topk_ratio if decode or protected else prefill_ratio,)
    late = 0  # candidates that all keep, and that are no history
    if decode:
        around, near = text + read, (0,)
    else:
        around = text
        near, late = forced_counts(frames[current], height, width, tile, block_size, protected)
        near = near[:1] if len(set(near)) == 1 else near
    candidates = context if decode else queries
    keep = tuple(tuple(max(_budget(ratio, candidates - late) - (n - late), 0) for n in near) for ratio in ratios)
    dense = min(ratios) >= 1 or late == candidates > 0
    total = text + context + read
    kept = [around + n + sum(row[i] for row in keep) / len(keep) for i, n in enumerate(near)]
    kept = (total,) * queries if dense else tuple(kept) * (queries if len(kept) == 1 else 1)
    pitch = total if dense else max(around + n + max(row[i] for row in keep) for i, n in enumerate(near))
    return Plan(
        lengths, frames, static, current, blocks, height, width, tile, block_size, text, context, queries,
        decode, protected, dense, text, candidates, keep, kept, pitch, total, in_place, second,
    )  # fmt: skip


def _budget(ratio: float, blocks: int) -> int:
    """floor(ratio * blocks) as decimals mean it: 0.29 * 100 is 28.999... in floating point and 29 here."""
    return min(math.floor(ratio * blocks + 1e-9), blocks)


@dataclass(frozen=True)
class Density:
    """Kept blocks of each query block and how many blocks there are.

    ``kept[i] / total`` is query block i's density. A block counts whole, as it is executed, even if it is partly padding;
    a dense plan runs without padding, at density 1.
    """

    kept: tuple[float, ...]
    total: int

    @property
    def ratio(self) -> float:
        """Executed share of all pairs of blocks."""
        return sum(self.kept) / (len(self.kept) * self.total)


def density(lengths, roles, height, width, tile=(4, 4, 4), block_size=64, topk_ratio=0.175, prefill_ratio=0.3, head_ratios=(), protected=0,
            in_place=False) -> Density:  # fmt: skip
    """Blocks that ``li::sparse_attention`` attends to for segments of these lengths; pure Python, exact.

    FLOPs of one head: ``4 * block_size**2 * D * sum(kept)``.
    """
    plan = make_plan(lengths, roles, height, width, tile, block_size, topk_ratio, prefill_ratio, head_ratios, protected, in_place)
    return Density(plan.kept, plan.total)
