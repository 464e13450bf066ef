"""Forwarded stores, exact: what was just written into a place is used directly and not read back; a view is taken once.

Before (a sampling loop that keeps its state in a part of a larger tensor)::     After::

    x0 = latents[:, :, 4:8]                                                          x0 = latents[:, :, 4:8]
    latents[:, :, 4:8] = x0 + v0 * d0                                                x1 = x0 + v0 * d0
    x1 = latents[:, :, 4:8]                                                          latents[:, :, 4:8] = x1 + v1 * d1
    latents[:, :, 4:8] = x1 + v1 * d1

A store that the next one overwrites unread is dropped; the last one stays. Only then does a graph show that a state
depends on the one before.
"""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from li_compile.patterns.effects import ALIASES, WRITES, target, writers
from li_compile.patterns.graph import name_of, value

from .record import Record


def forward_stores(module: GraphModule) -> Record:
    """Rewrite a graph in place (nested regions are left alone). Counts the reads that are gone."""
    record, stores, views, order = Record("forward_stores"), {}, {}, {n: i for i, n in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        if not node.op.startswith("call"):
            continue
        if node.target is operator.setitem and isinstance(node.args[0], Node):
            _store(module, node, stores)
        elif name_of(node) in WRITES:
            stores.pop(target(node), None)  # written in some other way
        elif node.target is operator.getitem and (known := _known(node, stores, views, order)) is not None:
            node.replace_all_uses_with(known)
            module.graph.erase_node(node)
            record.count += 1
        else:
            for base in {target(n) for n in node.all_input_nodes} & stores.keys():
                stores[base].read = True
            if node.target is operator.getitem and _is_view(node.args[1]):
                views[node.args[0], _place(node)] = node
    module.recompile()
    return record


class _Store:
    """The last write into a tensor. read: whether anything has read the tensor since, or a view of it."""

    def __init__(self, node: Node) -> None:
        self.node, self.place, self.value, self.read = node, _place(node), node.args[2], False


def _place(node: Node) -> str:
    return repr(node.args[1])


def _known(node: Node, stores: dict[Node, _Store], views: dict, order: dict[Node, int]) -> Node | None:
    """What a read gives: what was stored there last or, where nothing was, the view that was taken of the place before.

    A read is a view: what uses it after the next write would see what that wrote.
    """
    base = node.args[0]
    if base not in stores:
        return views.get((base, _place(node)))
    after = [order[w] for w in writers(base) if order[w] > order[node]]
    if stores[base].place != _place(node) or _last_use(node, order) > min(after, default=len(order)):
        return None
    return stores[base].value


def _last_use(node: Node, order: dict[Node, int]) -> int:
    return max((max(order.get(u, 0), _last_use(u, order) if u.op.startswith("call") and name_of(u) in ALIASES else 0)
                for u in node.users), default=0)


def _is_view(index) -> bool:
    """Whether an index takes a view, and no copy."""
    return all(_is_view(i) for i in index) if isinstance(index, tuple) else \
        index is None or index is Ellipsis or isinstance(index, (int, slice)) and not isinstance(index, bool)


def _store(module: GraphModule, node: Node, stores: dict[Node, _Store]) -> None:
    base, stored = node.args[0], node.args[2]
    before = stores.pop(target(base), None)
    if target(base) is not base or not isinstance(stored, Node):  # into a view: of what part, is not followed
        return
    if before is not None and before.place == _place(node) and not before.read:
        module.graph.erase_node(before.node)
    if _fits(base, node, stored) and not writers(stored):
        stores[base] = _Store(node)


def _fits(base: Node, node: Node, stored: Node) -> bool:
    """Whether what is stored is what is read back: of the place's shape and of the tensor's dtype."""
    whole, part = value(base), value(stored)
    try:
        place = whole[_example(node.args[1])]
    except Exception:  # an index that cannot be tried on example values
        return False
    return place.shape == part.shape and whole.dtype == part.dtype and whole.device == part.device


def _example(index):
    if isinstance(index, tuple):
        return tuple(_example(i) for i in index)
    if isinstance(index, slice):
        return slice(*(_example(i) for i in (index.start, index.stop, index.step)))
    return value(index) if isinstance(index, Node) else index

