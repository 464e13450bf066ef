"""The graph-level operators written out in ATen operators of constant sizes, for runtimes that know none of ours.

Gathered blocks and dense attention over them: each query block's (or group of query blocks') kept blocks are gathered with
one list a head, what every query keeps (text, in decode the current tokens) is read in place, and the two parts share one
softmax. Lists of uneven length are padded and masked. No size depends on data, so that ONNX and TensorRT can take it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import block_valid, cached, forced_mask, laid_out, tile_order
from .plan import CONTEXT, CURRENT, TEXT, Plan, make_plan
from .selection import part_counts

__all__ = ["NATIVE", "gathered_share", "why_not_native"]

LOW = -1e30  # a score that counts as nothing; finite, since runtimes differ in what they make of infinities


def sparse_attention(q, k, v, roles, height, width, tile, block_size, topk_ratio, prefill_ratio, sub_blocks, scale, summary=False,
                     head_ratios=(), protected=0, share=1):  # fmt: skip
    """``li::sparse_attention`` without encodings and summaries. share: query blocks that choose together (an approximation)."""
    plan = make_plan([x.shape[2] for x in k], roles, height, width, tuple(tile), block_size, topk_ratio, prefill_ratio, head_ratios, protected)
    if plan.dense:
        return laid_out(F.scaled_dot_product_attention(q, torch.cat(list(k), 2), torch.cat(list(v), 2), scale=scale))
    text = [[x[s] for s in plan.static if roles[s] == TEXT] for x in (k, v)]
    if plan.decode:
        context = [s for s in plan.static if roles[s] == CONTEXT]
        blocks = [torch.cat([in_blocks(x[s], plan, s) for s in context], 2) for x in (k, v)]
        valid = cached(valid_keys, q.device, plan, tuple(context))
        shared = [torch.cat([*t, x[plan.current]], 2) for t, x in zip(text, (k, v))]
    else:
        blocks = [in_blocks(x[plan.current], plan, plan.current) for x in (k, v)]
        valid = cached(valid_keys, q.device, plan, (plan.current,))
        shared = [torch.cat(t, 2) if t else None for t in text]
    means = block_means(blocks[0], valid, block_size, sub_blocks)
    return _attend(plan, q, *blocks, means, valid, *shared, sub_blocks, scale, share)


def pack_context(k, v, roles, height, width, tile, block_size, sub_blocks, summary=False):
    """``li::pack_context`` without summaries."""
    plan = _static_plan(k, roles, height, width, tile, block_size)
    packed = [torch.cat([in_blocks(x[s], plan, s) for s in plan.static], 2) for x in (k, v)]
    valid = cached(valid_keys, packed[0].device, plan, tuple(s for s in plan.static if roles[s] == CONTEXT))
    history = packed[0][:, :, plan.text_blocks * block_size :]
    return *packed, block_means(history, valid, block_size, sub_blocks), packed[0].new_zeros(0, dtype=torch.promote_types(packed[0].dtype, torch.float32))


def sparse_decode(q, k, v, packed_k, packed_v, k_means, v_means, lengths, roles, height, width, tile, block_size, topk_ratio,
                  sub_blocks, scale, summary=False, head_ratios=(), share=1):  # fmt: skip
    """``li::sparse_decode`` without encodings and summaries."""
    plan = make_plan([*lengths, q.shape[2]], [*roles, CURRENT], height, width, tuple(tile), block_size, topk_ratio, 1.0, head_ratios)
    text, at = ([], []), 0
    for s in (s for s in plan.static if roles[s] == TEXT):
        for parts, packed in zip(text, (packed_k, packed_v)):
            parts.append(packed[:, :, at * block_size : at * block_size + plan.lengths[s]])
        at += plan.blocks[s]
    blocks = [x[:, :, at * block_size :] for x in (packed_k, packed_v)]
    context = tuple(s for s in plan.static if roles[s] == CONTEXT)
    shared = [torch.cat([*t, x], 2) for t, x in zip(text, (k, v))]
    if plan.dense:
        kept = cached(_kept_rows, q.device, plan, context)
        whole = [torch.cat([s, b.index_select(2, kept)], 2) for s, b in zip(shared, blocks)]
        return laid_out(F.scaled_dot_product_attention(q, *whole, scale=scale))
    return _attend(plan, q, *blocks, k_means, cached(valid_keys, q.device, plan, context), *shared, sub_blocks, scale, share)


def frame_attention(q, k, v, roles, frames, tokens, block_size, scale):
    """``li::frame_attention``."""
    entries = (frames[:, None] * tokens + torch.arange(tokens, device=frames.device)).flatten()
    keys, values = (torch.cat([s.index_select(2, entries) if r == CONTEXT else s for s, r in zip(x, roles)], 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, keys, values, scale=scale).contiguous()


#: Operator -> the same in ATen operators; of those with a selection, with one more argument ``share``.
NATIVE = {"li::sparse_attention": sparse_attention, "li::pack_context": pack_context, "li::sparse_decode": sparse_decode,
          "li::frame_attention": frame_attention}  # fmt: skip


def why_not_native(name: str, arguments: dict) -> str | None:
    """Why a call of an operator cannot be written out, None if it can. arguments: by the names of its schema."""
    if name not in NATIVE:
        return "it is not one of " + ", ".join(NATIVE)
    if arguments.get("summary"):
        return "blocks that are left out take part through their means (sparse.summary)"
    encoded = [a for a in ("q_norm", "k_norm", "cos", "sin", "q_camera", "kv_camera") if arguments.get(a) is not None]
    return f"it encodes its operands itself ({', '.join(encoded)})" if encoded else None


def gathered_share(plan: Plan, share: int = 1) -> float:
    """Bytes that gathering writes, over those of the keys and values that are gathered from."""
    _, count, _ = budget(plan, share)
    return plan.current_blocks // share * count / max(plan.candidates, 1)


def _static_plan(k: Sequence[Tensor], roles, height, width, tile, block_size) -> Plan:
    return make_plan([*(x.shape[2] for x in k), height * width], [*roles, CURRENT], height, width, tuple(tile), block_size, 0.0, 0.0)


def in_blocks(x: Tensor, plan: Plan, segment: int) -> Tensor:
    """Tokens of a segment in block order, with zeros up to whole blocks."""
    if plan.frames[segment]:
        x = x.index_select(2, tile_order(plan.frames[segment], plan.height, plan.width, plan.tile, x.device))
    missing = plan.blocks[segment] * plan.block_size - x.shape[2]
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def block_means(packed: Tensor, valid: Tensor, block_size: int, sub_blocks: int) -> Tensor:
    counts = part_counts(valid, block_size, sub_blocks).clamp(min=1)[:, None]
    wide = packed.to(torch.promote_types(packed.dtype, torch.float32))
    return wide.unflatten(2, (-1, block_size // sub_blocks)).sum(3) / counts


def valid_keys(device, plan: Plan, segments: tuple[int, ...]) -> Tensor:
    return torch.cat([block_valid(plan.lengths[s], plan.block_size, device) for s in segments])


def _kept_rows(device, plan: Plan, segments: tuple[int, ...]) -> Tensor:
    """Rows of packed segments that are no padding."""
    valid = valid_keys(device, plan, segments)
    return (torch.arange(plan.block_size, device=device) < valid[:, None]).flatten().nonzero().flatten()


def budget(plan: Plan, share: int) -> tuple[Tensor | None, int, Tensor | None]:
    """(forced candidates ``[groups, candidates]`` or None, length of the longest list, true lengths ``[1|H, 1|groups]`` or None where
    all are equal), on the CPU."""
    return cached(_make_budget, "cpu", plan, share)


def _make_budget(device, plan: Plan, share: int) -> tuple[Tensor | None, int, Tensor | None]:
    keep = torch.tensor(plan.keep)
    groups = plan.current_blocks // share
    if keep.shape[1] > 1:
        keep = keep.unflatten(1, (groups, share)).amax(2)
    forced = None
    if not plan.decode:
        forced = forced_mask(plan.frames[plan.current], plan.height, plan.width, plan.tile, plan.block_size, plan.protected, "cpu")
        forced = forced.unflatten(0, (groups, share)).any(1)
        keep = keep + forced.sum(1)
    counts = keep.clamp(max=plan.candidates)
    longest = int(counts.max())
    return forced, longest, None if bool((counts == longest).all()) else counts


def _forced(device, plan: Plan, share: int) -> Tensor:
    return budget(plan, share)[0].to(device)


def counted_entries(device, plan: Plan, share: int) -> Tensor:
    """Which entries of the lists count: bool ``[1|H, 1|groups, longest]``."""
    _, longest, counts = budget(plan, share)
    return (torch.arange(longest) < counts[..., None]).to(device)


def _back(device, plan: Plan) -> Tensor:
    return torch.argsort(tile_order(plan.frames[plan.current], plan.height, plan.width, plan.tile, device))


def _attend(plan: Plan, q, k_blocks, v_blocks, k_means, valid, shared_k, shared_v, sub_blocks: int, scale: float, share: int) -> Tensor:
    batch, heads, length, dim = q.shape
    size, device = plan.block_size, q.device
    queries = in_blocks(q, plan, plan.current)
    groups, count = plan.current_blocks // share, budget(plan, share)[1]
    parts, all_parts = [], queries.unflatten(2, (groups, share * size))
    if count:
        chosen = chosen_blocks(plan, queries, k_means, valid, sub_blocks, scale, share, count)  # [B, H, groups, count]
        index = chosen.reshape(batch, heads, groups * count, 1).expand(-1, -1, -1, size * dim)
        keys, values = (x.reshape(batch, heads, -1, size * dim).gather(2, index).reshape(batch, heads, groups, count * size, dim)
                        for x in (k_blocks, v_blocks))
        scores = all_parts @ keys.transpose(-1, -2) * scale
        mask = None
        if any(n % size for s, n in enumerate(plan.lengths) if plan.decode == (s in plan.static)):
            mask = torch.arange(size, device=device) < valid.index_select(0, chosen.flatten()).reshape(batch, heads, groups, count, 1)
        if budget(plan, share)[2] is not None:
            counted = cached(counted_entries, device, plan, share)[None, ..., None]
            mask = counted.expand(-1, -1, -1, -1, size) if mask is None else mask & counted
        if mask is not None:
            scores = torch.where(mask.flatten(3).unsqueeze(3), scores, max(LOW, torch.finfo(scores.dtype).min))
        parts.append((scores, values))
    if shared_k is not None:
        whole = (queries @ shared_k.transpose(-1, -2) * scale).unflatten(2, (groups, share * size))
        parts.append((whole, shared_v.unsqueeze(2)))
    scores = torch.cat([s for s, _ in parts], -1) if len(parts) > 1 else parts[0][0]
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    pieces = weights.split([s.shape[-1] for s, _ in parts], -1) if len(parts) > 1 else [weights]
    out = sum(w @ x for w, (_, x) in zip(pieces, parts)).flatten(2, 3)[:, :, :length]
    return laid_out(out.index_select(2, cached(_back, device, plan)))


def chosen_blocks(plan: Plan, queries, k_means, valid, sub_blocks: int, scale: float, share: int, count: int) -> Tensor:
    """int64 ``[B, H, groups, count]``: the blocks of each list, best first."""
    size, device = plan.block_size, queries.device
    own = block_valid(plan.lengths[plan.current], size, device)
    scores = (block_means(queries, own, size, sub_blocks) * scale) @ k_means.transpose(-1, -2)
    if sub_blocks > 1:
        real = (part_counts(own, size, sub_blocks) > 0)[:, None] & (part_counts(valid, size, sub_blocks) > 0)
        scores = torch.where(real, scores, LOW)
        scores = scores.unflatten(3, (-1, sub_blocks)).unflatten(2, (-1, sub_blocks)).logsumexp((3, 5))
    if share > 1:
        scores = scores.unflatten(2, (-1, share)).logsumexp(3)
    if not plan.decode:
        scores = torch.where(cached(_forced, device, plan, share), -LOW, scores)
    return scores.topk(count, -1).indices
