"""A part of a graph becomes a nested region that is called where it stood; equal parts become one region.

Before::                                          After::

    h0 = linear(x0, w); v0 = silu(h0)                 v0 = invoke_subgraph(name, w, x0)[0]
    x1 = x0 + v0                                      x1 = x0 + v0
    h1 = linear(x1, w); v1 = silu(h1)                 v1 = invoke_subgraph(name, w, x1)[0]
"""

from __future__ import annotations

import operator

import networkx as nx
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from li_compile.patterns._compat import free_symbols
from li_compile.patterns.effects import effect, modes, outside_writes, switches_mode, target
from li_compile.patterns.graph import REGION, placeholders, value
from li_compile.patterns.loop_body import Body, leaves


def outline(module: GraphModule, body: Body, name: str, before: Node | None = None) -> list[Node]:
    """Replace each call of a body by a call of one new region; returns the calls, in order.

    before: where a single call is to stand; None: each where its last node stood, or as near as its operands allow.
    Numbers that differ from call to call become 0-d tensors. Raises ValueError if a call cannot stand in one place, or
    would have to take or give something else than tensors and numbers.
    """
    shared = [n for n in body.shared if n.op != "get_attr"]  # attributes are read inside of the region too
    odd = next((n for n in (*shared, *(n[0] for n in (*body.varying, *body.outputs))) if isinstance(value(n), (tuple, list))), None)
    if odd is not None:
        raise ValueError(f"{odd.name} holds several values and would cross the border of a region")
    sizes = _symbols(module, [*shared, *(n[0] for n in body.varying)])
    sub = _region(module, body, sizes)
    module.add_submodule(name, sub)
    graph, calls = module.graph, []
    order, handed = {n: i for i, n in enumerate(graph.nodes)}, {}  # what a call gives may be what the next one takes
    for i in range(body.calls):
        own = sorted(body.of(i), key=order.__getitem__)
        with graph.inserting_after(own[-1]) if before is None else graph.inserting_before(before):
            getter = graph.get_attr(name)
        with graph.inserting_after(getter):
            operands = [*shared, *(handed.get(n[i], n[i]) for n in body.varying), *sizes]
            call = graph.call_function(REGION, (getter, name, *operands))
        with graph.inserting_before(getter):
            numbers = [_scalar(graph, n.values[i], body.nodes[n.node][i]) for n in body.numbers]
        call.args = (*call.args, *numbers)
        call.meta["example_value"] = tuple(value(out[i]) for out in body.outputs)
        with graph.inserting_after(call):
            for k, out in reversed(list(enumerate(body.outputs))):
                item = graph.call_function(operator.getitem, (call, k))
                item.meta, handed[out[i]] = dict(out[i].meta), item
                for user in [u for u in out[i].users if u not in own]:
                    user.replace_input_with(out[i], item)
        for node in reversed(own):
            graph.erase_node(node)
        calls.append(call)
    _drop_empty_modes(graph)
    _sort(graph)
    graph.lint()
    module.recompile()
    return calls


def _region(module: GraphModule, body: Body, sizes: list[Node]) -> GraphModule:
    """The body's graph: shared operands, varying ones, sizes, numbers -> outputs; modes as they were around each node."""
    # By what all calls read there: a first state may also be read as it is by all, say for its size.
    graph, made, opened = Graph(), {}, []
    for nodes in (*((n,) for n in body.shared), *body.varying, *((n,) for n in sizes)):
        node = nodes[0]
        if node.op == "get_attr":
            made[nodes] = graph.get_attr(node.target)
            made[nodes].meta = dict(node.meta)
            continue
        again = len(nodes) > 1 and node in body.shared
        made[nodes] = graph.placeholder(f"{node.name}_varying" if again else node.name)
        made[nodes].meta, made[nodes].type = dict(node.meta), node.type
    numbers = {(n.node, n.leaf): graph.placeholder(f"number_{k}") for k, n in enumerate(body.numbers)}
    around = modes(module.graph)
    for k, nodes in enumerate(body.nodes):
        opened = _switch(graph, opened, around[nodes[0]])
        operands = zip(*([x for x in leaves(n) if isinstance(x, Node)] for n in nodes))
        made[nodes] = copied = graph.node_copy(nodes[0], lambda n: (lambda read: made.get(read) or made[n,])(next(operands)))
        if any(n == k for n, _ in numbers):
            copied.args, copied.kwargs = _with_numbers(copied, {i: p for (n, i), p in numbers.items() if n == k})
    _switch(graph, opened, ())
    graph.output(tuple(made[out] for out in body.outputs))
    return GraphModule(module, graph)


def _switch(graph: Graph, opened: list[tuple[Node, Node]], wanted: tuple[Node, ...]) -> list[tuple[Node, Node]]:
    """Leave and enter autocast until exactly ``wanted`` (nodes of the outer graph) are open."""
    same = 0
    while same < min(len(opened), len(wanted)) and opened[same][0] is wanted[same]:
        same += 1
    for _, entered in reversed(opened[same:]):
        graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
    opened = opened[:same]
    for enter in wanted[same:]:
        opened.append((enter, graph.call_function(enter.target, enter.args, enter.kwargs)))
    return opened


def _with_numbers(node: Node, given: dict[int, Node]) -> tuple:
    """A node's arguments with these leaves, counted as ``loop_body.leaves`` counts them, replaced."""
    at = iter(range(1 << 30))
    return map_aggregate((node.args, node.kwargs), lambda leaf: given.get(next(at), leaf))


def _scalar(graph: Graph, number: float, like: Node) -> Node:
    tensor = value(like)
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    node = graph.call_function(torch.full, ((), number), {"dtype": dtype, "device": tensor.device})
    node.meta["example_value"] = None
    return node


def _symbols(module: GraphModule, operands: list[Node]) -> list[Node]:
    """Inputs of the graph that hold the sizes which occur in the operands' shapes: a region needs them beside these."""
    needed = set().union(*(free_symbols(value(o)) for o in operands))
    return [p for p in placeholders(module.graph) if p not in operands and isinstance(value(p), torch.SymInt)
            and free_symbols(value(p)) & needed]


def _drop_empty_modes(graph: Graph) -> None:
    """Erase pairs of ``_enter_autocast`` and ``_exit_autocast`` with nothing between them."""
    around = modes(graph)
    used = {enter for node, open_ in around.items() for enter in open_ if not switches_mode(node)}
    for node in reversed(list(graph.nodes)):
        if switches_mode(node) and (node if not node.args or not isinstance(node.args[0], Node) else node.args[0]) not in used:
            graph.erase_node(node)


def _sort(graph: Graph) -> None:
    """Bring the nodes into an order in which all operands come first, as near as can be to the order that they have.

    What has an effect, or reads what another writes into, keeps its order. Raises ValueError where a region would have to run both before and after another node.
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    edges = nx.DiGraph()
    edges.add_nodes_from(order)
    edges.add_edges_from((operand, node) for node in order for operand in node.all_input_nodes)
    written = {w.base for n in order for w in outside_writes(n)}
    effects = [n for n in order if switches_mode(n) or (n.op.startswith("call") and (
        effect(n) is not None or any(target(o) in written for o in n.all_input_nodes)))]
    edges.add_edges_from(zip(effects, effects[1:]))
    output = graph.output_node()
    edges.add_edges_from((n, output) for n in order if n is not output)
    try:
        wanted = list(nx.lexicographical_topological_sort(edges, key=order.__getitem__))
    except nx.NetworkXUnfeasible:
        raise ValueError("a part of the graph that was to become one call is entered, left and entered again") from None
    if wanted != list(order):
        for node in wanted:
            output.prepend(node) if node is not output else None
