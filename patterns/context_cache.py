"""Context that a graph holds only as cached keys and values: given as they are, or in a preallocated cache.

::

    keys = cat([text_k, cached_k, k], dim=2)                     # form "cache": cached_k is an input
    cache[:, a:b] = k; keys = cache[:, c:b].transpose(1, 2)      # form "slices": the graph writes its own, then reads

The frames that a plan drops were computed before, by another graph. Here they are not read, whatever became of them.
"""

from __future__ import annotations

import dataclasses
import operator

from torch.fx import GraphModule, Node

from .attention import CURRENT, AttentionSite, Segment, token_grids
from .context import ContextConcat, ContextInput, miss
from .graph import (SDPA, SHAPE_ONLY, Miss, argument, calls, hint, is_parameter, known, name_of, region_operand, shape,
                    through_shapes, value)

__all__ = ["CacheRead", "cache_reads", "context_segment", "find_cache", "find_slices"]


def find_cache(module: GraphModule, sites: list[AttentionSite], roles: dict[str, str]) -> ContextConcat | Miss | None:
    """Context keys and values that are inputs of the graph; None where there are none."""
    inputs: dict[str, ContextInput] = {}
    found = []
    for site in sites:
        tokens = site.grid[0] * site.grid[1]
        chosen = [(call, context_segment(module, site, call)) for call in site.calls]
        if any(segment is None for _, segment in chosen):
            continue
        for call, segment in chosen:
            for node in (segment.key, segment.value):
                source = source_of(module, site, call, node)
                # By number: keys and values of every layer have a size symbol each.
                dims = [i for i, d in enumerate(shape(source)) if hint(d) == hint(segment.length)]
                if not dims:
                    return miss(f"the cached keys {source.name} do not hold the context's {segment.length} tokens along one "
                                "dimension", site.node)
                inputs[source.name] = ContextInput(2 if 2 in dims else dims[0], tokens)
        found.append((site, chosen[0][1]))
    if not found:
        return None
    site, segment = found[0]
    tokens = site.grid[0] * site.grid[1]
    return ContextConcat("cache", inputs, {}, None, None, sum(len(s.calls) for s, _ in found), tokens, hint(site.frames(CURRENT)),
                         hint(segment.length) // tokens)


def context_segment(module: GraphModule, site: AttentionSite, call: Node) -> Segment | None:
    """The segment of a site with the context's cached keys and values: inputs of the graph, of whole frames; the last
    such before the current tokens. None where there is none."""
    tokens = site.grid[0] * site.grid[1]
    cached = [s for s in site.segments if s.role != CURRENT and hint(s.length) and hint(s.length) % tokens == 0
              and source_of(module, site, call, s.key) is not None and source_of(module, site, call, s.value) is not None]
    return cached[-1] if cached else None


def source_of(module: GraphModule, site: AttentionSite, call: Node, node: Node) -> Node | None:
    """The graph's input that a segment's node is, but for moves; None if anything else has a part in it."""
    node = through_shapes(node)
    if site.region and node.op == "placeholder":
        node = through_shapes(region_operand(call, getattr(module, site.region), node))
    return node if node.op == "placeholder" and not is_parameter(node) else None


@dataclasses.dataclass
class CacheRead:
    """Keys or values read from a preallocated cache: node = cache[..., first:stop, ...] along dim, after
    cache[..., begin:stop, ...] = written. first, begin: int, SymInt or Node; None for 0."""

    node: Node
    cache: Node
    dim: int
    written: Node
    first: object
    begin: object


def cache_reads(attention: Node) -> tuple[CacheRead, CacheRead] | None:
    """How keys and values of an attention node are read from caches that the same graph writes to, or None."""
    reads = [_read(_to_slice(argument(attention, i, name))) for i, name in ((1, "key"), (2, "value"))]
    return tuple(reads) if all(reads) else None


def _to_slice(node: Node) -> Node:
    """Walk back over operators that only move values, as far as a slice of an input."""
    while not _is_slice(node) and node.op in ("call_function", "call_method") and name_of(node) in SHAPE_ONLY \
            and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is_slice(node: Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[0], Node) and node.args[0].op == "placeholder"


def _ranges(index) -> tuple:
    return index if isinstance(index, tuple) else (index,)


def _read(node: Node) -> CacheRead | None:
    if not _is_slice(node):
        return None
    cache, index = node.args[0], _ranges(node.args[1])
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    written = sorted((u for u in cache.users if u.target is operator.setitem and u.args[0] is cache), key=order.get)
    before = [w for w in written if order[w] < order[node]]
    cuts = [i for i, r in enumerate(index) if isinstance(r, slice) and r != slice(None)]
    if not before or len(cuts) > 1 or any(not isinstance(r, slice) for r in index):
        return None
    # The steps of a loop all write into the same place, each before it reads; what was there before them is the context.
    if any(repr(w.args[1]) != repr(before[-1].args[1]) for w in written):
        return None
    stores = _ranges(before[-1].args[1])
    where = [i for i, r in enumerate(stores) if isinstance(r, slice) and r != slice(None)]
    if len(where) != 1 or any(not isinstance(r, slice) for r in stores):
        return None
    dim, store = where[0], stores[where[0]]
    if cuts and cuts[0] != dim:
        return None
    load = index[dim] if dim < len(index) else slice(None)
    if load.step is not None or store.step is not None or not _same(load.stop, store.stop):
        return None
    return CacheRead(node, cache, dim, before[-1].args[2], load.start, store.start)


def _same(a, b) -> bool:
    """Whether two ends of slices are the same: one node, or equal numbers."""
    a, b = (value(x) if isinstance(x, Node) else x for x in (a, b))
    return a is not None and b is not None and known(a == b)


def find_slices(module: GraphModule, sites: list[AttentionSite], roles: dict[str, str]) -> ContextConcat | Miss | None:
    """Attention over preallocated caches that the graph writes its own keys and values to; None where there is none."""
    inputs, count, current, context, first = {}, 0, None, None, None
    grids = token_grids(module)
    for node in module.graph.nodes:
        reads = cache_reads(node) if calls(node, SDPA) else None
        if reads is None:
            continue
        first = first or node
        if not grids:
            return miss("keys are read from a preallocated cache, but no patch embedding tells the tokens of a frame", node)
        tokens = grids[0][0] * grids[0][1]
        for read in reads:
            own, whole = shape(read.written)[read.dim], shape(read.node)[read.dim]
            if not known(own % tokens == 0) or hint(whole - own) % tokens:
                return miss(f"the cache is read in {whole} and written in {own} tokens, which are no whole frames of {tokens}", node)
            inputs[read.cache.name] = ContextInput(read.dim, tokens)
            current, context = hint(own) // tokens, hint(whole - own) // tokens
        count += 1
    if not inputs:
        return None
    if not context:
        return miss("the preallocated cache holds no context before what this graph writes", first)
    return ContextConcat("slices", inputs, {}, None, None, count, tokens, current, context)
