"""Pruned context where only cached keys and values are at hand: dropped frames are not read.

Form "cache", with dense attention: lists of frames in the kernel, no copy::

    k1 = cat([cached_k, k], 2)                        o = li.frame_attention(q, [text_k, cached_k, k],
    o = sdpa(q, cat([text_k, k1], 2), v2)                                    [text_v, cached_v, v], roles, li_frames, ...)

Form "cache", where attention is made block-sparse afterwards: frames selected at the inputs::

    k1 = cat([cached_k, k], 2)                        k1 = cat([cached_k.index_select(2, tokens(li_frames)), k], 2)

Form "slices"::

    cache[:, a:b] = k; kk = cache[:, c:b]             cache[:, a:b] = k
    o = sdpa(q, kk.transpose(1, 2), ...)              kk = cat([cache.index_select(1, c + tokens(li_frames)), k], 1)

``li_frames`` is a new last input, int64 ``[kept]``: which frames of the context. Keys keep the temporal indices that
they were rotated with: positions are kept, not compacted. The cache itself is written as before.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

import li_compile.kernels.frame_attention  # noqa: F401  (registers li::frame_attention)
from li_compile.patterns import CONTEXT, AttentionSite, ContextConcat
from li_compile.patterns.context_cache import cache_reads, context_segment
from li_compile.patterns.graph import SDPA, calls, placeholders, shape, value

from .record import Record

FRAMES = "li_frames"


def prune_cache(module: GraphModule, context: ContextConcat, sites: list[AttentionSite], block_size: int | None) -> Record:
    """Rewrite the sites in place and add the input ``li_frames``.

    sites: of this graph, for form "cache". block_size: of the kernel that reads by lists of frames; None: select.
    """
    record = Record("prune_context")
    last = placeholders(module.graph)[-1]
    with module.graph.inserting_after(last):
        frames = module.graph.placeholder(FRAMES)
    if context.form == "slices":
        _read_slices(module, context, frames, record)
    elif block_size is None:
        _select(module, context, frames)
        record.count = context.sites
        record.details.append(f"frames selected at {len(context.inputs)} cached inputs")
    else:
        for site in sites:
            _read_lists(module, site, context.tokens, frames, block_size, record)
    return record


def _tokens(graph: torch.fx.Graph, frames: Node, per: int, first: object) -> Node:
    """Nodes that turn frames into positions of their tokens: first + frame * per + (0 ... per - 1)."""
    column = graph.call_function(torch.unsqueeze, (graph.call_function(torch.mul, (frames, per)), 1))
    row = graph.call_function(torch.arange, (per,), {"device": graph.call_function(getattr, (frames, "device"))})
    flat = graph.call_method("flatten", (graph.call_function(torch.add, (column, row)),))
    return flat if isinstance(first, int) and first == 0 else graph.call_function(operator.add, (flat, first))


def _select(module: GraphModule, context: ContextConcat, frames: Node) -> None:
    nodes = {p.name: p for p in placeholders(module.graph)}
    with module.graph.inserting_before(frames.next):
        tokens = _tokens(module.graph, frames, context.tokens, 0)
        for name, held in context.inputs.items():
            cached = nodes[name]
            chosen = module.graph.call_function(torch.index_select, (cached, held.dim, tokens))
            cached.replace_all_uses_with(chosen, delete_user_cb=lambda user, own=chosen: user is not own)


def _read_slices(module: GraphModule, context: ContextConcat, frames: Node, record: Record) -> None:
    for node in [n for n in module.graph.nodes if calls(n, SDPA)]:
        reads = cache_reads(node)
        if reads is None:
            continue
        for read in reads:
            with module.graph.inserting_before(read.node):
                tokens = _tokens(module.graph, frames, context.tokens, 0 if read.first is None else read.first)
                past = module.graph.call_function(torch.index_select, (read.cache, read.dim, tokens))
                own = read.written
                if value(own).dtype != value(read.cache).dtype:  # as the write did
                    own = module.graph.call_method("to", (own, value(read.cache).dtype))
                joined = module.graph.call_function(torch.cat, ([past, own], read.dim))
            read.node.replace_all_uses_with(joined)
            module.graph.erase_node(read.node)
        record.count += 1
    record.details.append(f"{record.count} reads of preallocated caches, {context.tokens} tokens a frame")


def _read_lists(module: GraphModule, site: AttentionSite, tokens: int, frames: Node, block_size: int, record: Record) -> None:
    chosen = context_segment(module, site, site.calls[0])
    if chosen is None:
        return
    owner = getattr(module, site.region) if site.region else module
    if site.region:
        with owner.graph.inserting_after(placeholders(owner.graph)[-1]):
            inner = owner.graph.placeholder(FRAMES)
        for call in site.calls:
            call.args = (*call.args, frames)
        frames = inner
    roles = [CONTEXT if s is chosen else 0 for s in site.segments]
    with owner.graph.inserting_before(site.node):
        new = owner.graph.call_function(torch.ops.li.frame_attention.default, (
            site.query, [s.key for s in site.segments], [s.value for s in site.segments], roles, frames, tokens, block_size,
            float(site.scale or shape(site.query)[-1] ** -0.5)))
    new.meta = dict(site.node.meta)
    site.node.replace_all_uses_with(new)
    owner.graph.erase_node(site.node)
    record.count += len(site.calls)
    record.details.append(f"{len(site.calls)} x lists of frames in the kernel, blocks of {block_size}")
