"""Block-sparse attention, approximate: attention sites become ``li::sparse_attention`` on their unconcatenated segments.

Before::                                                  After::

    k1 = cat([context_k, k], 2); k2 = cat([text_k, k1], 2)     o = li.sparse_attention(q, [text_k, context_k, k],
    o = scaled_dot_product_attention(q, k2, v2)                        [text_v, context_v, v], roles=[0, 1, 2], ...)

Text and current frames are read whole, context by top-k blocks of 3D tiles (paper section 3.3), also where both are one
sequence, of which the family tells the current frames. Leading layers stay dense; a nested region that serves both kinds
of layers is split in two.
"""

from __future__ import annotations

import copy

import torch
from torch.fx import GraphModule, Node

from li_compile.kernels import expected_provider  # the import also registers li::sparse_attention
from li_compile.patterns import CONTEXT, CURRENT, AttentionSite, Miss
from li_compile.patterns.attention import ROLE_NAMES
from li_compile.patterns.graph import shape, source_line, value

from .record import Record


def sparse_attention(module: GraphModule, sites: list[AttentionSite], *, topk_ratio: float, prefill_ratio: float,
                     tile: tuple[int, int, int], block_size: int, sub_blocks: int, min_context: int, skip_layers: int,
                     summary: bool = False, head_ratios: tuple[float, ...] | None = None) -> Record:
    """Rewrite the sites in place. Keyword arguments as in ``SparseConfig``."""
    record = Record("sparse_attention")
    order = list(dict.fromkeys(layer for site in sites for layer in site.layers))
    settings = (list(tile), block_size, float(topk_ratio), float(prefill_ratio), sub_blocks, summary)
    for site in sites:
        miss = lambda reason: record.misses.append(
            Miss("sparse attention", site.node.name, reason, source_line(site.node)))
        if site.protected is None:
            miss("the family's inputs do not tell which of its frames are new and must be read whole")
            continue
        history = site.kind == "decode" or site.protected > 0
        frames = site.chosen_from
        if isinstance(frames, int) and frames < min_context:
            miss(f"{frames} {ROLE_NAMES[CONTEXT if history else CURRENT]} frames, sparse from {min_context} (sparse.min_context)")
            continue
        heads = shape(site.query)[1]
        if head_ratios is not None and history and len(head_ratios) != heads:
            miss(f"sparse.head_ratios has {len(head_ratios)} ratios, and here are {heads} heads; give one a head")
            continue
        chosen = [c for c, layer in zip(site.calls, site.layers) if order.index(layer) >= skip_layers]
        if len(chosen) < len(site.calls):
            miss(f"{len(site.calls) - len(chosen)} calls in the first {skip_layers} layers stay dense (sparse.skip_layers)")
        if not chosen:
            continue
        owner, node = _owner(module, site, chosen)
        _rewrite(owner, node, site, settings, list(head_ratios or ()) if history else [])
        record.count += len(chosen)
        kinds = " | ".join(f"{ROLE_NAMES[s.role]} {s.length}" for s in site.segments)
        kinds += f", the last {site.protected} frames protected" if site.protected else ""
        kernel, why = expected_provider(value(site.query), block_size)
        record.details.append(f"{site.kind}: {len(chosen)} x [{kinds}], {site.branches} branches, kernel {kernel} ({why})")
    return record


def _owner(module: GraphModule, site: AttentionSite, chosen: list[Node]) -> tuple[GraphModule, Node]:
    """The graph to rewrite and the attention node in it; splits a region if only some of its calls are chosen."""
    if not site.region:
        return module, site.node
    sub = getattr(module, site.region)
    if len(chosen) == len(site.calls):
        return sub, site.node
    name = f"{site.region}_sparse"
    clone = copy.deepcopy(sub)
    module.add_submodule(name, clone)
    for call in chosen:
        with module.graph.inserting_before(call):
            attribute = module.graph.get_attr(name)
        attribute.meta = dict(call.args[0].meta)
        call.args = (attribute, name, *call.args[2:])
    return clone, next(n for n in clone.graph.nodes if n.name == site.node.name)


def _rewrite(owner: GraphModule, node: Node, site: AttentionSite, settings: tuple, head_ratios: list[float]) -> None:
    # In a split region the segments' nodes are the clone's nodes of the same names.
    own = {n.name: n for n in owner.graph.nodes}
    head_dim = shape(site.query)[-1]
    keys, values = [own[s.key.name] for s in site.segments], [own[s.value.name] for s in site.segments]
    tile, block_size, topk, prefill, sub_blocks, summary = settings
    with owner.graph.inserting_before(node):
        new = owner.graph.call_function(
            torch.ops.li.sparse_attention.default,
            (own[site.query.name], keys, values, [s.role for s in site.segments], *site.grid, tile, block_size, topk,
             prefill, sub_blocks, float(site.scale or head_dim**-0.5), summary, head_ratios),
            {"protected": site.protected} if site.protected else {})
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    owner.graph.erase_node(node)
