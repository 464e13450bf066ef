"""New nodes with their shapes, for passes whose later steps read them."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from li_compile.patterns._compat import fake_mode_of, faking
from li_compile.patterns.effects import WRITES, target
from li_compile.patterns.graph import name_of, value


def emit(like: Node, op: str, call, args: tuple, kwargs: dict | None = None) -> Node:
    """A node in front of ``like``, with its source line, its module and a fake value."""
    graph, kwargs = like.graph, kwargs or {}
    with graph.inserting_before(like):
        node = graph.create_node(op, call, args, kwargs)
    node.meta = {k: v for k, v in like.meta.items() if k not in ("example_value", "val", "li_pattern")}
    given, named = map_arg((args, kwargs), value)
    mode = fake_mode_of(tree_leaves((given, named)))
    if mode is not None or all(isinstance(v, (int, torch.SymInt)) for v in given):
        with faking(mode):
            node.meta["example_value"] = getattr(given[0], call)(*given[1:], **named) if op == "call_method" else call(*given, **named)
    return node


def written_between(graph: Graph, read: list[Node], first: Node, last: Node) -> Node | None:
    """A node from ``first`` to ``last`` that writes in place into what one of ``read`` shows, so that reading it at ``last``
    would give something else."""
    bases, inside = {target(n) for n in read}, False
    for node in graph.nodes:
        inside |= node is first
        if inside and node.op.startswith("call") and name_of(node) in WRITES and target(node) in bases:
            return node
        if node is last:
            return None
    return None
