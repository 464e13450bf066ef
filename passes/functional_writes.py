"""Writes into fresh tensors become values, exact.

Before::                                  After::

    z = zeros([n, 4, 4])                  z = zeros([n, 4, 4])
    z[..., 0, 0] = a                      z1 = select_scatter(z, select_scatter(select(z, -2, 0), a, -1, 0), -2, 0)
    z[..., :3, 3] = b                     ...
    use(z)                                use(z2)

Matrices are often built this way, one per layer, and rotary embeddings put back in place; as values they can be merged and moved. Only
tensors that the graph itself has made, or views of products and sums that nothing else reads, written with integers and slices, and not
looked at through a view that outlives a write.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from li_compile.patterns.effects import ALIASES, effects, writers
from li_compile.patterns.graph import LINEAR, REGION, Miss, calls, name_of, shape, source_line, subgraphs, value

from .record import Record

FRESH = {"zeros", "ones", "empty", "full", "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_full", "clone"}  # fmt: skip
SCATTER = {"select_scatter", "slice_scatter"}
SUMS = {"mul", "add", "sub", "truediv", "div"}
MOVES = {"view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous", "to", "type", "type_as", "float", "half", "bfloat16"}


def functional_writes(module: GraphModule) -> Record:
    """Rewrite ``setitem`` in a graph and its regions, in place. Counts the writes."""
    record = Record("functional_writes")
    for graph_module in (module, *subgraphs(module).values()):
        for node in list(graph_module.graph.nodes):
            if node.target is not operator.setitem:
                continue
            reason = _refusal(node)
            if reason is None:
                _rewrite(graph_module.graph, node)
                record.count += 1
            else:
                record.misses.append(Miss("functional writes", node.name, reason, source_line(node)))
    return record


def _refusal(node: Node) -> str | None:
    base, index, given = node.args
    made = base
    while made.op in ("call_function", "call_method") and name_of(made) in SCATTER:
        made = made.args[0]
    if made.op not in ("call_function", "call_method") or name_of(made) not in FRESH and not _computed(made):
        return "it writes into what the graph was given, or into what more than this reads"
    if node.users or not isinstance(shape(base), tuple):
        return "sizes of what it writes into are not known"
    places = _places(index, len(shape(base)))
    if places is None:
        return "it writes at computed places"
    if not all(isinstance(shape(base)[dim], int) for dim, _ in places):
        return "the size of a dimension that it writes into a part of is not known"
    left = len(shape(base)) - sum(isinstance(i, int) for _, i in places)
    if isinstance(given, Node) and (shape(given) is None or len(shape(given)) > left):
        return "what it writes has more dimensions than the place, or is no tensor"
    if any(name_of(w) != "setitem" for w in writers(base)) or any(u.target is REGION and effects(u) for u in base.users):
        return "it is written in other ways too"
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    if any(_last_use(u, order) > order[node] for u in base.users if _views(u, base) and order[u] < order[node]):
        return "a view that was taken before the write is read after it"
    return None


def _computed(node: Node) -> bool:
    """Whether a node is what a sum, a product or a layer gave, moved at most, and nothing else has a view of that."""
    while name_of(node) in MOVES and isinstance(node.args[0], Node) and len(node.args[0].users) == 1:
        node = node.args[0]
    return node.op.startswith("call") and (name_of(node) in SUMS or calls(node, LINEAR))


def _views(node: Node, base: Node) -> bool:
    return node.op.startswith("call") and name_of(node) in ALIASES and base in node.args[:1]


def _last_use(view: Node, order: dict[Node, int]) -> int:
    """Where a view, or a view of it, is read last."""
    return max((max(order[u], _last_use(u, order) if _views(u, view) else 0) for u in view.users), default=0)


def _places(index, rank: int) -> list | None:
    """One integer or slice with step 1 for each dimension that is not taken whole: [(dim, place), ...]; None if there are others."""
    index = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(i is not Ellipsis and not isinstance(i, (int, slice)) or isinstance(i, bool) for i in index) or index.count(Ellipsis) > 1:
        return None
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index[at : at + 1] = [slice(None)] * (rank - len(index) + 1)
    if len(index) > rank or any(isinstance(i, slice) and (i.step not in (None, 1) or isinstance(i.start, Node) or isinstance(i.stop, Node)) for i in index):
        return None
    return [(dim, i) for dim, i in enumerate(index) if i != slice(None)]


def _rewrite(graph: Graph, node: Node) -> None:
    base, index, given = node.args
    with graph.inserting_before(node):
        new = _put(graph, base, _places(index, len(shape(base))), given)
    after, seen = False, []
    for other in graph.nodes:
        if other is node:
            after = True
        elif after and base in other.all_input_nodes and other is not new:
            seen.append(other)
    for other in seen:
        other.replace_input_with(base, new)
    graph.erase_node(node)


def _put(graph: Graph, base: Node, places: list, given) -> Node:
    """base with given at places, as a new value."""
    example = value(base)
    if not places:
        if isinstance(given, Node):
            new = graph.call_method("to", (given,), {"dtype": example.dtype, "device": example.device})
            new.meta["example_value"] = value(given).to(example.device, example.dtype)
            if str(shape(given)) != str(tuple(example.shape)):  # sizes may be symbols
                new = graph.call_method("expand_as", (new, base))
        else:
            new = graph.call_function(torch.full_like, (base, given))
        new.meta["example_value"] = example
        return new
    (dim, place), rest = places[-1], places[:-1]
    if isinstance(place, int):
        place %= example.shape[dim]
        part = graph.call_function(torch.select, (base, dim, place))
        part.meta["example_value"] = example.select(dim, place)
        new = graph.call_function(torch.select_scatter, (base, _put(graph, part, rest, given), dim, place))
    else:
        start, stop, _ = place.indices(example.shape[dim])
        part = graph.call_function(torch.narrow, (base, dim, start, stop - start))
        part.meta["example_value"] = example.narrow(dim, start, stop - start)
        new = graph.call_function(torch.slice_scatter, (base, _put(graph, part, rest, given), dim, start, stop, 1))
    new.meta["example_value"] = example
    return new
