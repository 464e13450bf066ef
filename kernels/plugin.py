"""The graph-level operators for a runtime with a plugin: all in ATen operators of constant sizes, but for attention over listed blocks, which
is ``li::block_sparse_plugin``.

As in native.py tokens are brought into blocks, scored and chosen by standard operators. Nothing is gathered by the choice: it becomes the
lists that the operators' own kernels read, and history that is packed and tokens of the current chunk stay two sources. Experimental: see
docs/limits.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .block_sparse_plugin import block_sparse_plugin
from .layout import cached, row_places, tile_order
from .native import block_means, budget, chosen_blocks, counted_entries, in_blocks, valid_keys
from .plan import CONTEXT, CURRENT, Plan, make_plan
from .plugin_ptx import why_no_ptx

__all__ = ["PLUGIN", "why_not_plugin"]

LONGEST = 3840  # entries that TensorRT's TopK, which also sorts, can return


def sparse_attention(q, k, v, roles, height, width, tile, block_size, topk_ratio, prefill_ratio, sub_blocks, scale, summary=False,
                     head_ratios=(), protected=0):  # fmt: skip
    """``li::sparse_attention`` without encodings and summaries, where it is not dense."""
    plan = make_plan([x.shape[2] for x in k], roles, height, width, tuple(tile), block_size, topk_ratio, prefill_ratio, head_ratios, protected)
    current = [x[plan.current] for x in (k, v)]
    first = [torch.cat([in_blocks(x[s], plan, s) for s in plan.static], 2) for x in (k, v)] if plan.static else None
    if plan.decode:
        history, segments = first[0][:, :, plan.first * block_size :], tuple(s for s in plan.static if roles[s] == CONTEXT)
    else:
        current = [in_blocks(x, plan, plan.current) for x in current]
        history, segments = current[0], (plan.current,)
    valid = cached(valid_keys, q.device, plan, segments)
    return _attend(plan, q, first or current, current, block_means(history, valid, block_size, sub_blocks), valid, sub_blocks, scale)


def sparse_decode(q, k, v, packed_k, packed_v, k_means, v_means, lengths, roles, height, width, tile, block_size, topk_ratio,
                  sub_blocks, scale, summary=False, head_ratios=()):  # fmt: skip
    """``li::sparse_decode`` without encodings and summaries, where it is not dense."""
    plan = make_plan([*lengths, q.shape[2]], [*roles, CURRENT], height, width, tuple(tile), block_size, topk_ratio, 1.0, head_ratios)
    valid = cached(valid_keys, q.device, plan, tuple(s for s in plan.static if roles[s] == CONTEXT))
    return _attend(plan, q, (packed_k, packed_v), (k, v), k_means, valid, sub_blocks, scale)


#: Operator -> the same around ``li::block_sparse_plugin``.
PLUGIN = {"li::sparse_attention": sparse_attention, "li::sparse_decode": sparse_decode}


def why_not_plugin(name: str, arguments: dict, plan: Plan | None) -> str | None:
    """Why a call of an operator cannot be put around the plugin, None if it can. arguments: by the names of its schema; tensors may be fake."""
    if name not in PLUGIN:
        return "it is not one of " + ", ".join(PLUGIN)
    if (why := native.why_not_native(name, arguments)) is not None:
        return why
    if plan.dense:
        return "nothing is left out of it"
    if plan.pitch > LONGEST:
        return f"TensorRT sorts lists of at most {LONGEST} blocks, and its would have {plan.pitch}"
    budget(plan, 1)  # kept from now on: it reads numbers, which cannot be done while a graph is traced
    q = arguments["q"]
    return why_no_ptx(q.dtype, q.shape[3], plan.block_size)


def _attend(plan: Plan, q, first, second, k_means, valid, sub_blocks: int, scale: float) -> Tensor:
    """first, second: (keys, values) of the static segments and of the current one; the same twice where there are no static ones."""
    device, count = q.device, budget(plan, 1)[1]
    chosen = chosen_blocks(plan, in_blocks(q, plan, plan.current), k_means, valid, sub_blocks, scale, 1, count) if count else None
    lists = _lists(plan, chosen, (q.shape[0], q.shape[1], plan.current_blocks), device)
    grid = (plan.frames[plan.current], plan.height, plan.width, plan.tile)
    ordered = q.index_select(2, tile_order(*grid, device))
    out = block_sparse_plugin(
        ordered, *(x.contiguous() for x in (*first, *second)), *lists, cached(valid_keys, device, plan, (*plan.static, plan.current)),
        row_places(*grid, plan.block_size, device), cached(_scalar, device, scale))  # fmt: skip
    return out.transpose(1, 2)


def _lists(plan: Plan, chosen: Tensor | None, shape: tuple[int, ...], device) -> tuple[Tensor, Tensor, Tensor]:
    """(indices, counts, tails) as ``li::choose_blocks`` gives them, of candidates ``[B, H, nq, any]`` by number."""
    ranks, around, counts = cached(_tables, device, plan)
    parts = [around.expand(*shape, -1)]
    if chosen is not None:
        ranked = ranks[plan.first : plan.first + plan.candidates].index_select(0, chosen.flatten()).view(chosen.shape)
        if budget(plan, 1)[2] is not None:  # of unequal lists, the shorter ones are filled up with what comes last
            ranked = torch.where(cached(counted_entries, device, plan, 1), ranked, 2 * plan.total)
        parts.append(ranked)
    ranked = torch.cat(parts, -1).topk(plan.pitch, -1, largest=False).values  # in TensorRT sorting is this, and for sorting it wants more to be known
    numbers = cached(_numbers, device, plan.total).index_select(0, ranked.flatten()).view(ranked.shape)
    tails = ((ranked >= plan.total) & (ranked < 2 * plan.total)).sum(-1, dtype=torch.int32)
    return numbers, counts.expand(shape).contiguous(), tails


def _tables(device, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """int32: what each block is sorted by, its number, or for a partly filled one ``total`` more ``[total]``; that of those which every query
    block reads; and how many a list has in all ``[1|H, 1|nq]``."""
    valid = valid_keys("cpu", plan, (*plan.static, plan.current))
    ranks = torch.arange(plan.total, dtype=torch.int32) + plan.total * (valid < plan.block_size)
    around = torch.cat([ranks[: plan.first], ranks[plan.first + plan.candidates :]])
    _, longest, counts = budget(plan, 1)
    counts = torch.full((1, 1), longest) if counts is None else counts
    return tuple(x.to(device, torch.int32) for x in (ranks, around, counts + len(around)))


def _numbers(device, total: int) -> Tensor:
    """int32 ``[2 * total + 1]``: the block that a rank stands for; 0 for the last, which stands for none."""
    return torch.cat([torch.arange(total), torch.arange(total), torch.zeros(1)]).to(device, torch.int32)


def _scalar(device, value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float32, device=device)
