"""Dense attention by a kernel of ours where there is a faster one than PyTorch's, and without concatenating keys and values, exact.

Before::                                                  After::

    k1 = cat([context_k, k], 2); k2 = cat([text_k, k1], 2)     o = li.dense_attention(q, [text_k, context_k, k],
    o = scaled_dot_product_attention(q, k2, v2)                        [text_v, context_v, v], scale)

What is concatenated outside of a nested region, or into pieces of unequal lengths for keys and values, stays so and is one segment. Where
there is no such kernel, as on a CPU, nothing changes.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from li_compile.kernels.dense_attention import why_no_dense_kernel
from li_compile.patterns import Miss
from li_compile.patterns.attention import segments, why_not_plain
from li_compile.patterns.graph import SDPA, argument, calls, hint, known, region_calls, shape, source_line, subgraphs, value

from .record import Record
from .regions import drop_dead


def dense_attention(module: GraphModule, anywhere: bool = False) -> Record:
    """Rewrite a graph and its regions, in place. anywhere: also where no kernel is. Counts the calls of attention."""
    record = Record("dense_attention")
    for region, graph_module in {"": module, **subgraphs(module)}.items():
        graph = graph_module.graph
        for node in list(graph.nodes):
            if not calls(node, SDPA):
                continue
            why = _why_not(node, anywhere)
            if why is not None:
                record.misses.append(Miss("dense attention", node.name, f"left to PyTorch: {why}", source_line(node)))
                continue
            query, key, val = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
            keys, values = segments(key, val) or ([key], [val])
            scale = argument(node, 6, "scale") or shape(query)[3] ** -0.5
            with graph.inserting_before(node):
                new = graph.call_function(torch.ops.li.dense_attention.default, (query, keys, values, float(scale)))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            record.count += len(region_calls(module, region)) if region else 1
        drop_dead(graph_module)
    return record


def _why_not(node: Node, anywhere: bool) -> str | None:
    query, key, val = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    if (why := why_not_plain(node)) is not None:
        return why
    q, k, v = (value(n) for n in (query, key, val))
    if q.dim() != 4 or not all(known(x.shape[i] == q.shape[i]) for x in (k, v) for i in (0, 1, 3)):
        return "queries, keys and values differ in batch, heads or head_dim"
    if not q.dtype == k.dtype == v.dtype == value(node).dtype:
        return f"its operands are cast to {value(node).dtype} in it"
    return None if anywhere else why_no_dense_kernel(q, hint(k.shape[2]) or 0)
