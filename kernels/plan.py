"""What a call of ``li::sparse_attention`` will do, from lengths and ratios alone: no tensor, no device.

The operator runs this plan and :func:`density` reports it, so FLOPs in reports are those executed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from .layout import Tile, neighbour_counts, num_blocks

__all__ = ["CONTEXT", "CURRENT", "TEXT", "Density", "Plan", "density", "make_plan"]

TEXT, CONTEXT, CURRENT = 0, 1, 2


@dataclass(frozen=True)
class Plan:
    """Segments in block order and the budget of every query block.

    Attributes:
        lengths, frames: by segment, tokens and latent frames (0 for text).
        order: segment numbers in block order: text, current, context.
        text_segments: how many of them are text; the one after is current.
        decode: there is a context segment.
        dense: the ratio asks for everything.
        prefix_blocks: blocks at the front that every query block keeps.
        keep: candidates chosen by score, for each query block or all.
        kept: blocks kept in all, by query block. pitch: the largest of them.
        total: blocks there are.
    """

    lengths: tuple[int, ...]
    frames: tuple[int, ...]
    order: tuple[int, ...]
    text_segments: int
    height: int
    width: int
    tile: Tile
    block_size: int
    decode: bool
    dense: bool
    prefix_blocks: int
    keep: int | tuple[int, ...]
    kept: tuple[int, ...]
    pitch: int
    total: int


def make_plan(lengths, roles, height, width, tile, block_size, topk_ratio, prefill_ratio) -> Plan:
    """The plan for segments of these lengths and roles; arguments as in ``li::sparse_attention``.

    Raises ValueError where they don't fit together.
    """
    return _make_plan(tuple(lengths), tuple(roles), height, width, tuple(tile), block_size, topk_ratio, prefill_ratio)


@functools.lru_cache(maxsize=256)
def _make_plan(lengths, roles, height, width, tile, block_size, topk_ratio, prefill_ratio) -> Plan:
    if len(roles) != len(lengths) or not set(roles) <= {TEXT, CONTEXT, CURRENT} or roles.count(CURRENT) != 1:
        raise ValueError(
            f"Each of {len(lengths)} segments needs a role, 0 text, 1 context or 2 current, and exactly one is current; found {list(roles)}."
        )
    if height < 1 or width < 1 or block_size < 1 or len(tile) != 3 or min(tile) < 1:
        raise ValueError(f"Frame, tile and block sizes must be at least 1; found {height} x {width}, tile {tile}, block {block_size}.")
    if topk_ratio < 0 or prefill_ratio < 0:
        raise ValueError(f"Ratios must not be negative; found topk_ratio {topk_ratio} and prefill_ratio {prefill_ratio}.")
    for length, role in zip(lengths, roles):
        if length < 1 or (role != TEXT and length % (height * width)):
            raise ValueError(
                f"A visual segment must hold whole frames of {height} x {width} = {height * width} tokens and no segment "
                f"may be empty; found {length} tokens. Leave out empty segments."
            )
    frames = tuple(0 if role == TEXT else length // (height * width) for length, role in zip(lengths, roles))
    order = tuple(sorted(range(len(roles)), key=lambda s: (TEXT, CURRENT, CONTEXT).index(roles[s])))
    blocks = [num_blocks(length, block_size) for length in lengths]
    in_role = lambda role: sum(n for n, r in zip(blocks, roles) if r == role)
    decode = CONTEXT in roles
    queries = in_role(CURRENT)
    if decode:
        prefix = in_role(TEXT) + in_role(CURRENT)
        keep = _budget(topk_ratio, in_role(CONTEXT))
        kept = (prefix + keep,) * queries
    else:
        prefix = in_role(TEXT)
        near = neighbour_counts(frames[roles.index(CURRENT)], height, width, tile, block_size)
        keep = tuple(max(_budget(prefill_ratio, queries) - n, 0) for n in near)
        kept = tuple(prefix + n + more for n, more in zip(near, keep))
        if len(set(keep)) == 1:
            keep = keep[0]
    dense = (topk_ratio if decode else prefill_ratio) >= 1
    total = sum(blocks)
    if dense:
        kept = (total,) * queries
    return Plan(
        lengths, frames, order, roles.count(TEXT), height, width, tile, block_size,
        decode, dense, prefix, keep, kept, max(kept), total,
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

    kept: tuple[int, ...]
    total: int

    @property
    def ratio(self) -> float:
        """Executed share of all pairs of blocks."""
        return sum(self.kept) / (len(self.kept) * self.total)


def density(lengths, roles, height, width, tile=(4, 4, 4), block_size=64, topk_ratio=0.175, prefill_ratio=0.3) -> Density:
    """Blocks that ``li::sparse_attention`` attends to for segments of these lengths; pure Python, exact.

    FLOPs of one head: ``4 * block_size**2 * D * sum(kept)``.
    """
    plan = make_plan(lengths, roles, height, width, tile, block_size, topk_ratio, prefill_ratio)
    return Density(plan.kept, plan.total)
