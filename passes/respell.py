"""Registered spellings, exact: whatever a pattern reads is put into canonical form, so that all behind sees one spelling.

Before::                                                   After::

    o = flash_attn._flash_attn_forward(q, k, v, ...)[0]        a = scaled_dot_product_attention(q.transpose(1, 2), ...)
                                                               o = a.transpose(1, 2)
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from li_compile.patterns import Family
from li_compile.patterns.find_spellings import FIRED, find_spellings
from li_compile.patterns.graph import SDPA, calls
from li_compile.patterns.spelling import Spelling, refuse

from .emit import emit, written_between
from .record import Record


def respell(module: GraphModule, family: Family | None = None) -> Record:
    """Rewrite a graph and its regions in place."""
    record = Record("respell")
    for region, spellings in find_spellings(module, family).spellings.items():
        owner = getattr(module, region) if region else module
        order = {n: i for i, n in enumerate(owner.graph.nodes)}
        made: dict[Node, Node] = {}  # what a spelling replaced may be another's operand
        for spelling in spellings:
            spelling.operands = [made.get(o, o) for o in spelling.operands]
            operands = [o for o in spelling.operands if isinstance(o, Node)]
            write = written_between(owner.graph, operands, min(spelling.nodes, key=order.get), spelling.anchor)
            if write is not None:
                record.misses.append(refuse(spelling.kind, spelling.anchor, spelling.pattern, f"{write.name} writes into what it reads"))
                continue
            made |= _rewrite(spelling)
            record.count += 1
        owner.recompile()
    return record


def _rewrite(spelling: Spelling) -> dict[Node, Node]:
    """Node that is gone -> node in its place."""
    said = torch.fx.symbolic_trace(spelling.meaning).graph
    holes = [n for n in said.nodes if n.op == "placeholder"]
    known = dict(zip(holes, spelling.operands)) | {h: h.args[0] for h in holes[len(spelling.operands):]}
    made: list[Node] = []
    for node in said.nodes:
        if node.op in ("call_function", "call_method"):
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: known[n])
            made.append(known.setdefault(node, emit(spelling.anchor, node.op, node.target, args, kwargs)))
    result = known[said.output_node().args[0]]
    marked = [n for n in made if calls(n, SDPA)] or made[-1:]
    marked[0].meta[FIRED] = spelling.pattern
    for node in spelling.replaced:
        node.replace_all_uses_with(result)
    graph = spelling.anchor.graph
    for node in [*(r for r in spelling.replaced if r is not spelling.anchor), *reversed(spelling.nodes), *reversed(spelling.dead)]:
        if not node.users:
            graph.erase_node(node)
    return dict.fromkeys(spelling.replaced, result)
