"""The graph-level operators: from the model's own q, k, v segments to its output.

What the paper (arXiv 2605.31158, 3-D block-sparse attention) does in a dozen launches and a read-back per layer: token
layout, block scores, selection, attention and the way back. ``li::sparse_attention`` is one call from start to end;
``li::pack_context`` and ``li::sparse_decode`` part it where the history ends that stays for all steps of a chunk, so that
it is packed once. Where the history comes from another call, ``li::sparse_prefill`` returns it in tile order, and
``li::sparse_attention`` reads it in place. See :mod:`.layout`, :mod:`.pack`, :mod:`.selection`, :mod:`.block_sparse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .block_sparse import attend
from .dense_attention import attend_densely
from .encode import encoded
from .layout import block_valid, cached, forced_mask, num_blocks, row_places, tile_order
from .pack import ROWS, Encoding, empty_pack, order_into, pack_into
from .plan import CONTEXT, CURRENT, TEXT, Plan, make_plan
from .problem import Problem
from .selection import Choice, choose, part_counts
from .workspace import scratch

__all__ = ["CONTEXT", "CURRENT", "TEXT", "pack_context", "sparse_attention", "sparse_decode", "sparse_prefill"]

ENCODINGS = ("float eps=1e-6, Tensor? q_norm=None, Tensor? k_norm=None, Tensor? cos=None, Tensor? sin=None, "
             "Tensor? q_camera=None, Tensor? kv_camera=None")  # fmt: skip
SETTINGS = "SymInt height, SymInt width, int[] tile, int block_size, {ratios}, int sub_blocks, float scale, bool summary=False, float[] head_ratios=[], "


@torch.library.custom_op(
    "li::sparse_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor[] k, Tensor[] v, int[] roles, "
    + SETTINGS.format(ratios="float topk_ratio, float prefill_ratio") + ENCODINGS + ", int protected=0, bool in_place=False) -> Tensor",
)  # fmt: skip
def sparse_attention(q, k, v, roles, height, width, tile, block_size, topk_ratio, prefill_ratio, sub_blocks, scale,
                     summary=False, head_ratios=(), eps=1e-6, q_norm=None, k_norm=None, cos=None, sin=None, q_camera=None,
                     kv_camera=None, protected=0, in_place=False):  # fmt: skip
    """Attention of the current tokens over text, history and themselves, with history (or, in prefill, everything
    visual) thinned to the blocks that score best.

    Args:
        q: ``[B, H, Lq, D]``, any strides: the current segment's queries, in raster (T, H, W) order.
        k, v: the segments in their order, each ``[B', H, Ls, D]``, any strides. Not concatenated. B' is B, or with
            cameras 2 B for all but the current segment.
        roles: one number a segment: 0 text, 1 context (history), 2 current. There is exactly one current segment, of
            Lq tokens. Visual segments (1, 2) hold whole frames of ``height * width`` tokens.
        height, width: tokens of a frame along each axis.
        tile, block_size: see :func:`~li_compile.kernels.layout.tile_order`.
        topk_ratio: with a context segment (decode): text and current blocks are kept, and of the history's blocks the
            best ``floor(topk_ratio * blocks)`` for every query block and head. At least 1: dense attention.
        prefill_ratio: without (prefill): text and neighbouring blocks are kept, and best-scoring ones up to
            ``max(floor(prefill_ratio * blocks), neighbours)``. At least 1: dense attention.
        sub_blocks: see :func:`~li_compile.kernels.selection.choose_blocks`.
        scale: factor on the scores, above 0.
        summary: blocks that are left out still take part through the means of their keys and values.
        head_ratios: one ratio a head, in place of the one that applies; empty: the same for all.
        eps, q_norm, k_norm, cos, sin, q_camera, kv_camera: what is yet to be done to the current segment's q, k and v,
            see :class:`~li_compile.kernels.pack.Encoding`: the norms and RoPE to q and k, ``q_camera`` to q and
            ``kv_camera`` to k and v. None: it was done before.
        protected: of a current segment that is history and new frames in one (no context segment), how many frames at its
            end are new. Every query keeps the blocks with a token of theirs (paper section 3.3: current frames are
            preserved); of the blocks that are history alone, neighbours and best-scoring ones up to
            ``max(floor(topk_ratio * blocks), neighbours)``. ``prefill_ratio`` takes no part.
        in_place: the one context segment is in tile order already, as :func:`sparse_prefill` returns it for the same frames and tile: it is
            read where it lies, and of its keys only the means are made. Text is read with the current tokens.

    Returns:
        ``[B', H, Lq, D]`` in q's token order and dtype, with [B', Lq, H, D] memory, as models go on with it.

    Raises ValueError if segments and roles don't fit; the sentence says which. There is no backward.
    """
    plan = make_plan([x.shape[2] for x in k], roles, height, width, tuple(tile), block_size, topk_ratio, prefill_ratio, head_ratios, protected,
                     in_place)  # fmt: skip
    _check(q, k, v, plan, 1 if kv_camera is None else 2)
    encodings = _encodings(eps, q_norm, k_norm, cos, sin, q_camera, kv_camera)
    if plan.dense:
        return _dense(plan, q, k, v, scale, encodings)
    make = _static_in_place if in_place else _pack_static
    static = make(plan, k, v, sub_blocks, summary, scratch) if plan.static else None
    text = [[x[s] for s, role in enumerate(roles) if role == TEXT] if in_place else [] for x in (k, v)]
    return _attend(plan, q, k[plan.current], v[plan.current], static, sub_blocks, scale, summary, encodings, text)[0]


@sparse_attention.register_fake
def _(q, k, v, roles, height, width, tile, block_size, topk_ratio, prefill_ratio, sub_blocks, scale, summary=False,
      head_ratios=(), eps=1e-6, q_norm=None, k_norm=None, cos=None, sin=None, q_camera=None, kv_camera=None, protected=0, in_place=False):  # fmt: skip
    return _new_out(q, 1 if kv_camera is None else 2)


@torch.library.custom_op(
    "li::sparse_prefill",
    mutates_args=(),
    schema="(Tensor q, Tensor[] k, Tensor[] v, int[] roles, " + SETTINGS.format(ratios="float prefill_ratio") + ENCODINGS
    + ") -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
def sparse_prefill(q, k, v, roles, height, width, tile, block_size, prefill_ratio, sub_blocks, scale, summary=False, head_ratios=(), eps=1e-6,
                   q_norm=None, k_norm=None, cos=None, sin=None, q_camera=None, kv_camera=None):  # fmt: skip
    """:func:`sparse_attention` of frames that will be history, and their keys and values in tile order, which it makes in any case.

    Args as there, without a context segment.

    Returns:
        ``(out, keys, values)``: the attention's output; and the current segment's keys and values after all encodings, contiguous
        ``[B', H, Lq, D]`` without padding, in the order of :func:`~li_compile.kernels.layout.tile_order`.
    """
    plan = make_plan([x.shape[2] for x in k], roles, height, width, tuple(tile), block_size, 1.0, prefill_ratio, head_ratios)
    if plan.decode:
        raise ValueError(f"Frames that will be history are encoded without one; found roles {list(roles)}.")
    _check(q, k, v, plan, 1 if kv_camera is None else 2)
    encodings = _encodings(eps, q_norm, k_norm, cos, sin, q_camera, kv_camera)
    if plan.dense:
        out, order = _dense(plan, q, k, v, scale, encodings), _order(plan, plan.current, q.device)
        kept = []
        for x, encoding in ((k[plan.current], encodings[1]), (v[plan.current], encodings[2])):
            kept.append(x.new_empty(x.shape[0] * encoding.branches, *x.shape[1:]))
            order_into(x, order, kept[-1], None, ROWS, 1, encoding)
        return out, *kept
    static = _pack_static(plan, k, v, sub_blocks, summary, scratch) if plan.static else None
    return _attend(plan, q, k[plan.current], v[plan.current], static, sub_blocks, scale, summary, encodings, kept=True)


@sparse_prefill.register_fake
def _(q, k, v, roles, height, width, tile, block_size, prefill_ratio, sub_blocks, scale, summary=False, head_ratios=(), eps=1e-6, q_norm=None,
      k_norm=None, cos=None, sin=None, q_camera=None, kv_camera=None):  # fmt: skip
    branches = 1 if kv_camera is None else 2
    kept = lambda x: x.new_empty(x.shape[0] * branches, *x.shape[1:])
    current = roles.index(CURRENT)
    return _new_out(q, branches), kept(k[current]), kept(v[current])


@torch.library.custom_op(
    "li::pack_context",
    mutates_args=(),
    schema="(Tensor[] k, Tensor[] v, int[] roles, SymInt height, SymInt width, int[] tile, int block_size, int sub_blocks, "
    "bool summary=False) -> (Tensor, Tensor, Tensor, Tensor)",
)
def pack_context(k, v, roles, height, width, tile, block_size, sub_blocks, summary=False):
    """Text and history in blocks, once for all denoising steps of a chunk that read them.

    Args as for :func:`sparse_attention`, but with segments of roles 0 and 1 only, in the order in which they will be
    named to :func:`sparse_decode`.

    Returns:
        ``(packed_k, packed_v, k_means, v_means)``: ``[B, H, blocks * block_size, D]``, text before history; fp32
        ``[B, H, history blocks * sub_blocks, D]``; and means of the history's values, empty without ``summary``.
    """
    plan = _static_plan(k, roles, height, width, tile, block_size)
    _check_segments(k, v, plan)
    return _pack_static(plan, k, v, sub_blocks, summary, _fresh)


@pack_context.register_fake
def _(k, v, roles, height, width, tile, block_size, sub_blocks, summary=False):
    first = k[0]
    text = sum(num_blocks(x.shape[2], block_size) for x, role in zip(k, roles) if role == TEXT)
    history = sum(num_blocks(x.shape[2], block_size) for x, role in zip(k, roles) if role == CONTEXT)
    packed, means = empty_pack(first, text + history, block_size, sub_blocks)
    average = lambda parts: means.new_empty(*means.shape[:2], history * parts, means.shape[3])
    return packed, torch.empty_like(packed), average(sub_blocks), average(1) if summary else means.new_empty(0)


@torch.library.custom_op(
    "li::sparse_decode",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor packed_k, Tensor packed_v, Tensor k_means, Tensor v_means, SymInt[] lengths, "
    "int[] roles, " + SETTINGS.format(ratios="float topk_ratio") + ENCODINGS + ") -> Tensor",
)  # fmt: skip
def sparse_decode(q, k, v, packed_k, packed_v, k_means, v_means, lengths, roles, height, width, tile, block_size, topk_ratio,
                  sub_blocks, scale, summary=False, head_ratios=(), eps=1e-6, q_norm=None, k_norm=None, cos=None, sin=None,
                  q_camera=None, kv_camera=None):  # fmt: skip
    """:func:`sparse_attention` of a chunk whose text and history were packed by :func:`pack_context`.

    Args:
        q, k, v: the current segment alone, ``[B, H, Lq, D]``, any strides.
        packed_k, packed_v, k_means, v_means: what :func:`pack_context` returned for the same settings.
        lengths, roles: of the segments that it was given.
        The rest: as for :func:`sparse_attention`.
    """
    plan = make_plan([*lengths, q.shape[2]], [*roles, CURRENT], height, width, tuple(tile), block_size, topk_ratio, 1.0, head_ratios)
    encodings = _encodings(eps, q_norm, k_norm, cos, sin, q_camera, kv_camera)
    _check_current(q, k, v, packed_k, 1 if kv_camera is None else 2)
    if packed_k.shape != packed_v.shape or packed_k.shape[2] != (plan.total - plan.current_blocks) * block_size:
        raise ValueError(f"packed_k and packed_v must hold {plan.total - plan.current_blocks} blocks of {block_size}; found "
                         f"{tuple(packed_k.shape)} and {tuple(packed_v.shape)}.")  # fmt: skip
    if plan.dense:
        return _dense(plan, q, *_unpack(plan, packed_k, packed_v, k, v), scale, encodings)
    return _attend(plan, q, k, v, (packed_k, packed_v, k_means, v_means), sub_blocks, scale, summary, encodings)[0]


@sparse_decode.register_fake
def _(q, k, v, packed_k, packed_v, k_means, v_means, lengths, roles, height, width, tile, block_size, topk_ratio, sub_blocks,
      scale, summary=False, head_ratios=(), eps=1e-6, q_norm=None, k_norm=None, cos=None, sin=None, q_camera=None,
      kv_camera=None):  # fmt: skip
    return _new_out(q, 1 if kv_camera is None else 2)


def _new_out(q: Tensor, branches: int) -> Tensor:
    batch, heads, length, dim = q.shape
    return q.new_empty(batch * branches, length, heads, dim).transpose(1, 2)


def _encodings(eps, q_norm, k_norm, cos, sin, q_camera, kv_camera) -> tuple[Encoding, Encoding, Encoding]:
    """Of queries, keys and values."""
    if (q_camera is None) != (kv_camera is None):
        raise ValueError("q_camera and kv_camera go together; give both or neither.")
    return Encoding(q_norm, eps, cos, sin, q_camera), Encoding(k_norm, eps, cos, sin, kv_camera), Encoding(camera=kv_camera)


def _order(plan: Plan, segment: int, device) -> Tensor | None:
    frames = plan.frames[segment]
    return tile_order(frames, plan.height, plan.width, plan.tile, device) if frames else None


def _fresh(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_empty(shape)


def _pack_static(plan: Plan, k: Sequence[Tensor], v: Sequence[Tensor], sub_blocks: int, summary: bool, new):
    """Text and history of a plan in one buffer each; new: where memory comes from, ``(name, shape, like)``."""
    size = plan.block_size
    first = k[plan.static[0]]
    batch, heads, _, dim = first.shape
    count = plan.text_blocks + plan.context_blocks
    packed, means = [], []
    for name, segments, kept_means in (("k", k, sub_blocks), ("v", v, 1)):
        blocks = new(f"static {name}", (batch, heads, count * size, dim), first)
        average = torch.empty(batch, heads, count * kept_means, dim, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
        at = 0
        for s in plan.static:
            pack_into(segments[s], _order(plan, s, first.device), blocks, average, size, kept_means, at=at)
            at += plan.blocks[s]
        packed.append(blocks)
        means.append(average[:, :, plan.text_blocks * kept_means :].contiguous())
    return packed[0], packed[1], means[0], means[1] if summary else means[1].new_empty(0)


def _static_in_place(plan: Plan, k: Sequence[Tensor], v: Sequence[Tensor], sub_blocks: int, summary: bool, new):
    """What :func:`_pack_static` gives, of a history that is in tile order: itself, and its means."""
    (s,) = plan.static

    def averaged(x: Tensor, parts: int) -> Tensor:
        means = torch.empty(*x.shape[:2], plan.context_blocks * parts, x.shape[3], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        order_into(x, None, None, means, plan.block_size, parts)
        return means

    return k[s], v[s], averaged(k[s], sub_blocks), averaged(v[s], 1) if summary else None


def _attend(plan: Plan, q, k, v, static, sub_blocks: int, scale: float, summary: bool, encodings, text=((), ()),
            kept: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The rest of a call whose text and history are packed: the current segment's blocks, selection, attention. text: keys and values that
    are read with the current ones; kept: the current keys and values in tile order, which are returned with the output, are to stay."""
    size, device = plan.block_size, q.device
    tables = plan_tables(plan, sub_blocks, device)
    queries, q_means = _blocks(plan, "q", q, tables.order, sub_blocks, encodings[0])
    (keys, current_means), (values, value_means) = (
        (_second(plan, name, x, beside, encoding), None) if plan.decode and (plan.in_place or encoding.empty)
        else _blocks(plan, name, x, tables.order, parts, encoding, kept)
        for name, x, beside, parts, encoding in (("k", k, text[0], sub_blocks, encodings[1]), ("v", v, text[1], 1, encodings[2]))
    )  # fmt: skip
    k_means, v_means = (static[2], static[3]) if plan.decode else (current_means, value_means)
    indices, counts, tails, bias = choose(Choice(
        q_means, k_means, tables.q_counts, tables.k_counts, tables.valid, tables.keep, tables.near, plan.first, size, sub_blocks,
        scale, plan.pitch, summary,
    ))  # fmt: skip
    k_summary, v_summary = None, None
    if summary:
        k_summary = k_means if sub_blocks == 1 else _whole_means(k_means, tables.k_counts, sub_blocks)
        k_summary, v_summary = k_summary.to(q.dtype), v_means.to(q.dtype)
    nothing = keys[:, :, :0]
    packed_k, packed_v = static[:2] if static is not None else (nothing, nothing)
    out, _ = attend(Problem(
        queries, packed_k, packed_v, indices, counts, tables.valid, size, scale, tails, keys, values, k_summary, v_summary,
        bias if summary else None, rows=tables.rows, length=q.shape[2], clean=True,
    ))  # fmt: skip
    return out, keys, values


def _blocks(plan: Plan, name: str, x: Tensor, order: Tensor, parts: int, encoding: Encoding, kept: bool = False) -> tuple[Tensor, Tensor]:
    """The current segment's queries, keys or values in blocks, and their means. kept: in memory of their own, without padding."""
    batch, heads, length, dim = x.shape
    shape = (batch * encoding.branches, heads, length if kept else plan.current_blocks * plan.block_size, dim)
    means = torch.empty(*shape[:2], plan.current_blocks * parts, dim, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if kept:
        blocks = x.new_empty(shape)
        order_into(x, order, blocks, means, plan.block_size, parts, encoding)
    else:
        blocks = scratch(f"current {name}", shape, x)
        pack_into(x, order, blocks, means, plan.block_size, parts, encoding)
    return blocks, means


def _second(plan: Plan, name: str, x: Tensor, text: Sequence[Tensor], encoding: Encoding) -> Tensor:
    """Keys or values that are read as a whole, so that their order does not matter: the current ones, and text behind them."""
    if encoding.empty and not text:
        return x
    joined = scratch(f"current {name}", (x.shape[0] * encoding.branches, x.shape[1], plan.second, x.shape[3]), x)
    at = 0
    for part, how in ((x, encoding), *((t, Encoding()) for t in text)):
        order_into(part, None, joined[:, :, at : at + part.shape[2]], None, ROWS, 1, how)
        at += part.shape[2]
    return joined


class Tables(NamedTuple):
    """What depends on a plan alone, on a device: orders, counts and masks."""

    order: Tensor
    rows: Tensor
    valid: Tensor
    q_counts: Tensor
    k_counts: Tensor
    near: Tensor | None
    keep: Tensor


def plan_tables(plan: Plan, sub_blocks: int, device) -> Tables:
    return cached(_plan_tables, device, plan, sub_blocks)


def _plan_tables(device, plan: Plan, sub_blocks: int) -> Tables:
    size = plan.block_size
    grid = (plan.frames[plan.current], plan.height, plan.width, plan.tile)
    valid = torch.cat([block_valid(n, size, device) for n in (*(plan.lengths[s] for s in plan.static), plan.second)])
    parts = lambda x: x if sub_blocks == 1 else part_counts(x, size, sub_blocks)
    return Tables(
        tile_order(*grid, device), row_places(*grid, size, device), valid, parts(block_valid(plan.lengths[plan.current], size, device)),
        parts(valid[plan.first : plan.first + plan.candidates]), None if plan.decode else forced_mask(*grid, size, plan.protected, device),
        torch.tensor(plan.keep, dtype=torch.int32).to(device),
    )  # fmt: skip


def _whole_means(means: Tensor, counts: Tensor, sub_blocks: int) -> Tensor:
    """Means of whole blocks from those of their parts."""
    counts = counts.view(-1, sub_blocks, 1)
    return (means.unflatten(2, (-1, sub_blocks)) * (counts / counts.sum(1, keepdim=True))).sum(3)


def _dense(plan: Plan, q, k: Sequence[Tensor], v: Sequence[Tensor], scale: float, encodings) -> Tensor:
    """Dense attention, with what is left to do to the current segment done one after the other."""
    current = [x if e.empty else encoded(x, e) for x, e in zip((q, k[plan.current], v[plan.current]), encodings)]
    keys, values = ([current[i] if s == plan.current else x for s, x in enumerate(xs)] for i, xs in ((1, k), (2, v)))
    return attend_densely(current[0], keys, values, scale)


def _unpack(plan: Plan, packed_k, packed_v, k, v) -> tuple[list[Tensor], list[Tensor]]:
    """The segments as dense attention may have them: in block order, which it does not mind, and without padding."""
    lists, at = ([], []), 0
    for s in plan.static:
        for parts, packed in zip(lists, (packed_k, packed_v)):
            parts.append(packed[:, :, at * plan.block_size : at * plan.block_size + plan.lengths[s]])
        at += plan.blocks[s]
    by_number = dict(zip(plan.static, range(len(plan.static))))
    return tuple([xs[by_number[s]] if s in by_number else x for s in range(len(plan.lengths))] for xs, x in zip(lists, (k, v)))


def _static_plan(k: Sequence[Tensor], roles, height, width, tile, block_size) -> Plan:
    """A plan for text and history alone; the current segment, which has no part in it, is taken to be one frame."""
    return make_plan([*(x.shape[2] for x in k), height * width], [*roles, CURRENT], height, width, tuple(tile), block_size, 0.0, 0.0)


def _check(q, k, v, plan: Plan, branches: int) -> None:
    if len(k) != len(plan.lengths) or [x.shape for x in v] != [x.shape for x in k]:
        raise ValueError(f"k and v need the same segments; found {[tuple(x.shape) for x in k]} and {[tuple(x.shape) for x in v]}.")
    if q.shape[2] != plan.lengths[plan.current]:
        raise ValueError(f"q must hold the current segment's {plan.lengths[plan.current]} tokens; found {q.shape[2]}.")
    for s, (x, y) in enumerate(zip(k, v)):
        _check_current(q, x, y, None, 1 if s == plan.current else branches)


def _check_segments(k, v, plan: Plan) -> None:
    if len(k) != len(plan.static) or [x.shape for x in v] != [x.shape for x in k]:
        raise ValueError(f"k and v need the same segments, of roles 0 and 1; found {[tuple(x.shape) for x in k]} and {[tuple(x.shape) for x in v]}.")
    for x, y in zip(k, v):
        _check_current(k[0], x, y, None, 1)


def _check_current(q, k, v, packed, branches: int) -> None:
    beside = (packed,) if packed is not None else (k, v)
    want = (q.shape[0] * branches, q.shape[1])
    for x, batch in [(x, want[0]) for x in beside] + ([(k, q.shape[0]), (v, q.shape[0])] if packed is not None else []):
        if (x.shape[0], x.shape[1]) != (batch, want[1]) or x.shape[3] != q.shape[3] or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"Every segment must share batch, heads, head_dim, dtype and device with q, {tuple(q.shape)} {q.dtype} "
                f"{q.device} (batch times {branches}); found {tuple(x.shape)} {x.dtype} {x.device}."
            )
