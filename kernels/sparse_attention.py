"""The graph-level operator ``li::sparse_attention``: from the model's own q, k, v segments to its output.

What the paper (arXiv 2605.31158, 3-D block-sparse attention) does in a dozen launches and a read-back per layer: token
layout, block scores, selection, attention and the way back. See :mod:`.layout`, :mod:`.selection`, :mod:`.block_sparse`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .block_sparse import attend
from .layout import block_valid, neighbour_mask, num_blocks, tile_order, tile_order_inverse
from .plan import CONTEXT, CURRENT, TEXT, Plan, make_plan
from .selection import block_means, block_scores, choose_blocks
from .workspace import scratch

__all__ = ["CONTEXT", "CURRENT", "TEXT", "sparse_attention"]


@torch.library.custom_op(
    "li::sparse_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor[] k, Tensor[] v, int[] roles, SymInt height, SymInt width, int[] tile, int block_size, "
    "float topk_ratio, float prefill_ratio, int sub_blocks, float scale) -> Tensor",
)
def sparse_attention(q, k, v, roles, height, width, tile, block_size, topk_ratio, prefill_ratio, sub_blocks, scale):
    """Attention of the current tokens over text, history and themselves, with history (or, in prefill, everything
    visual) thinned to the blocks that score best.

    Args:
        q: ``[B, H, Lq, D]``, any strides: the current segment's queries, in raster (T, H, W) order.
        k, v: the segments in their order, each ``[B, H, Ls, D]``, any strides. Not concatenated.
        roles: one number a segment: 0 text, 1 context (history), 2 current. There is exactly one current segment, of
            Lq tokens. Visual segments (1, 2) hold whole frames of ``height * width`` tokens.
        height, width: tokens of a frame along each axis.
        tile, block_size: see :func:`~li_compile.kernels.layout.tile_order`.
        topk_ratio: with a context segment (decode): text and current blocks are kept, and of the history's blocks the
            best ``floor(topk_ratio * blocks)`` for every query block and head. At least 1: dense attention.
        prefill_ratio: without (prefill): text and neighbouring blocks are kept, and best-scoring ones up to
            ``max(floor(prefill_ratio * blocks), neighbours)``. At least 1: dense attention.
        sub_blocks: see :func:`~li_compile.kernels.selection.select_blocks`.
        scale: factor on the scores, above 0.

    Returns:
        ``[B, H, Lq, D]``, contiguous, in q's token order and dtype.

    Raises ValueError if segments and roles don't fit; the sentence says which. There is no backward.
    """
    lengths = [x.shape[2] for x in k]
    plan = make_plan(lengths, roles, height, width, tuple(tile), block_size, topk_ratio, prefill_ratio)
    _check(q, k, v, plan)
    if plan.dense:
        keys, values = (x[0] if len(x) == 1 else torch.cat(x, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q, keys, values, scale=scale).contiguous()
    return _run(plan, q, k, v, sub_blocks, scale)


@sparse_attention.register_fake
def _(q, k, v, roles, height, width, tile, block_size, topk_ratio, prefill_ratio, sub_blocks, scale):
    return q.new_empty(q.shape)


def _run(plan: Plan, q, k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], sub_blocks: int, scale: float):
    size, device = plan.block_size, q.device
    grid = lambda frames: (frames, plan.height, plan.width, plan.tile)
    current = grid(plan.frames[plan.order[plan.text_segments]])

    # Blocks come text first, then the current chunk, then history, whatever the order of the segments: attention does
    # not care, forced blocks are then one run at the front, and candidates one run at the end.
    orders = [tile_order(*grid(plan.frames[s]), device) if plan.frames[s] else None for s in plan.order]
    keys, values = (_pack(name, [x[s] for s in plan.order], orders, size) for name, x in (("packed_k", k), ("packed_v", v)))
    queries = _pack("packed_q", [q], [tile_order(*current, device)], size)
    valid = torch.cat([block_valid(plan.lengths[s], size, device) for s in plan.order])
    q_valid = block_valid(q.shape[2], size, device)

    # Scores only for blocks that are not kept anyway.
    prefix = plan.prefix_blocks
    q_means, q_real = block_means(queries, q_valid, size, sub_blocks, padding_is_zero=True)
    k_means, k_real = block_means(keys[:, :, prefix * size :], valid[prefix:], size, sub_blocks, padding_is_zero=True)
    scores = block_scores(q_means, k_means, q_real, k_real, scale, sub_blocks)
    near = None if plan.decode else neighbour_mask(*current, size, device)
    indices, counts = choose_blocks(scores, forced=near, keep=plan.keep, pitch=plan.pitch - prefix)
    always = torch.arange(prefix, device=device, dtype=torch.int32).expand(*indices.shape[:3], prefix)
    indices, counts = torch.cat((always, indices + prefix), -1), counts + prefix

    out, _ = attend(queries, keys, values, indices, counts, valid, size, scale)
    return out.index_select(2, tile_order_inverse(*current, device))


def _pack(name: str, segments: Sequence[torch.Tensor], orders, block_size: int) -> torch.Tensor:
    """Segments in block order, each padded with zeros to whole blocks, in one buffer ``[B, H, n * block_size, D]``."""
    batch, heads, _, dim = segments[0].shape
    starts = [0]
    for x in segments:
        starts.append(starts[-1] + num_blocks(x.shape[2], block_size) * block_size)
    packed = scratch(name, (batch, heads, starts[-1], dim), segments[0])
    for x, order, start, stop in zip(segments, orders, starts, starts[1:]):
        end = start + x.shape[2]
        if order is None:
            packed[:, :, start:end].copy_(x)
        else:
            torch.index_select(x, 2, order, out=packed[:, :, start:end])
        if end < stop:
            packed[:, :, end:stop].zero_()
    return packed


def _check(q, k, v, plan: Plan) -> None:
    if len(k) != len(plan.lengths) or [x.shape for x in v] != [x.shape for x in k]:
        raise ValueError(f"k and v need the same segments; found {[tuple(x.shape) for x in k]} and {[tuple(x.shape) for x in v]}.")
    for x in (*k, *v):
        if x.shape[:2] != q.shape[:2] or x.shape[3] != q.shape[3] or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"Every segment must share batch, heads, head_dim, dtype and device with q, {tuple(q.shape)} {q.dtype} "
                f"{q.device}; found {tuple(x.shape)} {x.dtype} {x.device}."
            )
    if q.shape[2] != plan.lengths[plan.order[plan.text_segments]]:
        raise ValueError(f"q must hold the current segment's {plan.lengths[plan.order[plan.text_segments]]} tokens; found {q.shape[2]}.")
