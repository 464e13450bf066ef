"""Work on nested regions that several passes share: values brought out of a region, operands added and dropped.

A region is called as ``invoke_subgraph(get_attr, identifier, *operands)``; the n-th placeholder of its graph stands for the
n-th operand of every call.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from li_compile.patterns._compat import bare_symbols, first_symbol, free_symbols
from li_compile.patterns.effects import effect, switches_mode
from li_compile.patterns.graph import SHAPE_ONLY, all_graphs, name_of, placeholders, region_calls, subgraphs, value

# Operators that move and repeat values and compute nothing.
MOVES = SHAPE_ONLY | {"repeat", "repeat_interleave"}


def structure(x, through=MOVES) -> object:
    """A hashable description of a value: equal for two nodes that do the same of ``through`` to the same nodes."""
    if isinstance(x, Node):
        if x.op in ("call_function", "call_method") and name_of(x) in through:
            return (name_of(x), structure(x.args, through), structure(tuple(sorted(x.kwargs.items())), through))
        return x
    if isinstance(x, (list, tuple)):
        return tuple(structure(y, through) for y in x)
    return repr(x)


def outside(graph: Graph, sub: GraphModule, x: Node, call: Node, made: dict[Node, Node], before: Node | None = None) -> Node:
    """A value of a region in terms of the operands of one of its calls, computed before the call, or before another node.

    made: what was already.
    """
    if x.op == "placeholder":
        return call.args[2 + placeholders(sub.graph).index(x)]
    if x not in made:
        args, kwargs = map_arg((x.args, x.kwargs), lambda a: outside(graph, sub, a, call, made, before))
        with graph.inserting_before(before or call):
            made[x] = graph.create_node(x.op, x.target, args, kwargs)
        made[x].meta = dict(x.meta)
    return made[x]


def hand_in(sub: GraphModule, calls: list[Node], values: list[list[Node]], name: str) -> list[Node]:
    """New placeholders of a region, and for each call its values as their operands; returns the placeholders."""
    inside: list[Node] = []
    for i in range(len(values[0])):
        known = placeholders(sub.graph)
        with sub.graph.inserting_after(known[-1]):
            inside.append(sub.graph.placeholder(f"{name}_{len(known)}"))
        inside[-1].meta = {k: v for k, v in values[0][i].meta.items() if k == "example_value"}
    for call, given in zip(calls, values):
        call.args = (*call.args, *given)
    return inside


def hand_in_sizes(module: GraphModule) -> None:
    """Hand every region the sizes of which its operands' shapes are made, where none of them is such a size itself: Dynamo does so, passes
    do not, and Inductor 2.11 cannot get s from a shape 16 * s."""
    if not any(isinstance(value(p), torch.SymInt) for p in placeholders(module.graph)):
        return
    graphs = all_graphs(module)
    for sub in graphs[1:]:
        calls = [(part, call) for part in graphs for name, other in subgraphs(part).items() if other is sub for call in region_calls(part, name)]
        sizes = [_sizes(part.graph, call) for part, call in calls]
        if sizes and sizes[0] and len({len(s) for s in sizes}) == 1:
            hand_in(sub, [call for _, call in calls], sizes, "size")
    for part in reversed(graphs):
        part.recompile()


def _sizes(graph: Graph, call: Node) -> list[Node]:
    """The graph's inputs that hold the sizes missing among a call's operands, in the order of their first use."""
    operands = [value(x) for x in call.args[2:]]
    known = set().union(*map(bare_symbols, operands))
    missing = dict.fromkeys(s for x in operands for s in sorted(free_symbols(x), key=str) if s not in known)
    inputs = {first_symbol(value(p)): p for p in placeholders(graph) if isinstance(value(p), torch.SymInt)}
    return [inputs[s] for s in missing if s in inputs]


def retarget(module: GraphModule, call: Node, region: str) -> None:
    """Let a call run another region of the graph, on the same operands."""
    with module.graph.inserting_before(call):
        attribute = module.graph.get_attr(region)
    attribute.meta = dict(call.args[0].meta)
    call.args = (attribute, region, *call.args[2:])


def drop_dead(graph_module: GraphModule) -> None:
    """Remove nodes that nothing reads and that have no effect of their own; modes stay, as they act without being read, and so
    do the limits of a ``torch.func.vmap``."""
    for node in reversed(list(graph_module.graph.nodes)):
        lasting = switches_mode(node) or name_of(node).startswith("_vmap_")
        if not node.users and node.op not in ("placeholder", "output") and effect(node) is None and not lasting:
            graph_module.graph.erase_node(node)


def drop_unused(module: GraphModule, sub: GraphModule, region: str) -> None:
    """Remove moves that nothing reads and operands that the region no longer reads: what they hold can then be freed."""
    for node in reversed(list(sub.graph.nodes)):
        if not node.users and node.op in ("call_function", "call_method") and name_of(node) in MOVES:
            sub.graph.erase_node(node)
    for i, inner in reversed(list(enumerate(placeholders(sub.graph)))):
        if not inner.users:
            sub.graph.erase_node(inner)
            for call in region_calls(module, region):
                call.args = (*call.args[: 2 + i], *call.args[3 + i :])
