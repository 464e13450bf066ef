"""Parts of tensors in torch.export's graphs, exact: what is written into them gets Python's spelling, which passes and matchers know.

Before::                                     After::

    s = aten.slice(cache, 1, 0, 8)           setitem(cache, (:, 0:8), k)
    aten.copy_(s, k)                         keys = getitem(cache, (:, 0:12))
    keys = aten.slice(cache, 1, 0, 12)
    r = aten.select(aten.slice(z, 1, 0, 3), 2, 3)
    aten.fill_(r, 1.0)                       setitem(z, (:, 0:3, 3), 1.0)

Of inputs, only slices of what the graph writes to in this way: preallocated caches, whose reads are respelled too. Of what the graph has
made, any part. Dynamo's graphs are spelled so from the start.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from li_compile.patterns.graph import shape, value

from .record import Record

SLICE, SELECT, COPY = torch.ops.aten.slice.Tensor, torch.ops.aten.select.int, torch.ops.aten.copy_.default
PUTS = {COPY, torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor}
LAST = torch.iinfo(torch.int64).max


def index_slices(module: GraphModule) -> Record:
    """Rewrite a graph in place. Counts the writes."""
    record, graph, caches = Record("index_slices"), module.graph, set()
    for node in list(graph.nodes):
        if node.target in PUTS and not node.users and (part := _part(node.args[0])) is not None:
            base, index, views = part
            with graph.inserting_before(node):
                graph.call_function(operator.setitem, (base, index, node.args[1])).meta = dict(node.meta)
            for done in (node, *views):
                graph.erase_node(done)
            record.count += 1
    for node in list(graph.nodes):
        if node.target is not COPY or node.users or (index := _index(node.args[0])) is None or list(node.args[0].users) != [node]:
            continue
        place = node.args[0]
        with graph.inserting_before(node):
            graph.call_function(operator.setitem, (place.args[0], index, node.args[1])).meta = dict(node.meta)
        caches.add(place.args[0])
        graph.erase_node(node)
        graph.erase_node(place)
        record.count += 1
    written: dict[Node, tuple] = {}
    for node in list(graph.nodes) if caches else ():
        if node.target is operator.setitem and node.args[0] in caches:
            written[node.args[0]] = node.args[1]
            continue
        index = _index(node)
        if index is not None and node.args[0] in written:
            with graph.inserting_before(node):
                read = graph.call_function(operator.getitem, (node.args[0], index))
            read.meta = dict(node.meta)
            node.replace_all_uses_with(read)
            graph.erase_node(node)
        elif node.op != "output" and node.target is not SLICE:
            for cache in [n for n in node.all_input_nodes if n in written]:  # all of it, of which torch.export keeps no slice
                dim = len(written[cache]) - 1
                with graph.inserting_before(node):
                    read = graph.call_function(operator.getitem, (cache, (*[slice(None)] * dim, slice(None, shape(cache)[dim]))))
                read.meta = dict(node.meta) | {"val": value(cache), "example_value": value(cache)}
                node.replace_input_with(cache, read)
    return record


def _part(node) -> tuple[Node, tuple, list[Node]] | None:
    """(tensor that the graph has made, what Python's brackets hold, the views, last first) of a part that nothing but one write looks at."""
    views = []
    while isinstance(node, Node) and node.target in (SLICE, SELECT) and len(node.users) == 1:
        views.append(node)
        node = node.args[0]
    if not views or not isinstance(node, Node) or not node.op.startswith("call") or node.target in (SLICE, SELECT) or shape(node) is None:
        return None
    index: list = [slice(None)] * len(shape(node))
    left = list(range(len(index)))  # dimensions that are not selected from yet
    for view in reversed(views):
        dim = left[view.args[1] if len(view.args) > 1 else 0]
        if index[dim] != slice(None) or any(isinstance(a, Node) for a in view.args[2:]):
            return None
        if view.target is SELECT:
            index[dim] = view.args[2]
            left.remove(dim)
            continue
        start, stop, step = (*view.args[2:], *(None, None, 1)[len(view.args) - 2 :])
        if step != 1:
            return None
        index[dim] = slice(start, None if stop == LAST else stop)
    return node, tuple(index), views


def _index(node) -> tuple | None:
    """What Python's brackets hold for a slice of an input, None if the node is none or skips."""
    if not isinstance(node, Node) or node.target is not SLICE or node.args[0].op != "placeholder":
        return None
    dim, start, stop, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    if step != 1 or dim < 0:
        return None
    return (*[slice(None)] * dim, slice(start, None if stop == LAST else stop))
