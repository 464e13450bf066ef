"""Concatenation last, exact: what is done to keys and values token by token is done to each segment before they are joined.

Before (layout changed, RoPE applied after the cat)::          After::

    k1 = cat([cached, k], 1)                                       a = rope(cached, cos[:m]).transpose(1, 2)
    k2 = (k1 * cos + swap(k1) * sin).transpose(1, 2)               b = rope(k, cos[m:]).transpose(1, 2)
    o = sdpa(q, k2, v2)                                            o = sdpa(q, cat([a, b], 2), v2)

Only then does a graph show which keys are whose. Nothing is computed twice: each token is still transformed once.
"""

from __future__ import annotations

import math
import operator

import torch
from torch.fx import GraphModule, Node

from li_compile.patterns.graph import LINEAR, SDPA, ancestors, argument, calls, cat_operands, hint, known, name_of, shape, subgraphs

from .emit import emit, written_between
from .record import Record

_POINTWISE = {"mul", "add", "sub", "div", "truediv", "multiply", "neg", "to", "float", "half", "bfloat16", "double", "type", "type_as",
              "_to_copy", "contiguous", "clone", "detach", "alias", "imul", "iadd", "view_as_real", "view_as_complex", "pow", "rsqrt",
              "cos", "sin", "sigmoid", "silu"}
_SWAPS = {"transpose", "swapaxes"}
_PARTS = {"chunk", "split", "unbind"}


def split_cone(module: GraphModule) -> Record:
    """Rewrite keys and values of every attention in a graph and its regions, in place. Counts the attentions rewritten."""
    record = Record("split_cone")
    for owner in (module, *subgraphs(module).values()):
        for node in [n for n in owner.graph.nodes if calls(n, SDPA)]:
            operands = [argument(node, i, name) for i, name in ((1, "key"), (2, "value"))]
            query = argument(node, 0, "query")
            if any(len(shape(x) or ()) != 4 for x in (query, *operands)):
                continue
            cuts = [_Cut(x) for x in operands]
            parts = [cut.pieces(x, 2) for cut, x in zip(cuts, operands)]
            # Of as many keys as queries, from one projection, nothing is context: taken apart for RoPE, as Matrix-Game-3.0 does.
            same = known(shape(query)[2] == shape(operands[0])[2])
            if None in parts or not _alike(*parts) or same and _one_source(cuts[0].leaves) or all(isinstance(p, _Leaf) for x in parts for p in x) \
                    or any(written_between(owner.graph, [*c.leaves, *c.tables], c.first, x) for c, x in zip(cuts, operands)):
                continue
            for x, cut, made in zip(operands, cuts, parts):
                if any(not isinstance(p, _Leaf) for p in made):
                    node.replace_input_with(x, emit(node, "call_function", torch.cat, (cut.build(made), 2)))
            record.count += 1
        owner.recompile()
    return record


class _Cut:
    """Cuts a tensor into the segments that it was joined from. ``pieces`` only looks and gives, for each segment, how to
    make it; ``build`` makes the nodes, once it is known that all can be made."""

    def __init__(self, operand: Node) -> None:
        self.graph, self.like = operand.graph, operand
        self.order = {n: i for i, n in enumerate(operand.graph.nodes)}
        self.leaves: list[Node] = []  # segments as they were joined
        self.tables: list[Node] = []  # what is cut along with them
        self.first, self.known = operand, {}

    def pieces(self, node: Node, dim: int):
        """Recipes of the segments whose cat along ``dim`` is ``node``, or None. A recipe is a node, or (node like it, operands)."""
        key = node, dim
        if key not in self.known:
            self.known[key] = None
            self.known[key] = self._pieces(node, dim)
        return self.known[key]

    def _pieces(self, node: Node, dim: int):
        read, name = cat_operands(node), name_of(node)
        if not node.op.startswith("call"):
            return None
        if read is not None and read[1] == dim:
            self.first = min(self.first, node, key=self.order.get)
            found = []
            for operand in read[0]:
                inner = self.pieces(operand, dim)
                self.leaves += [] if inner else [operand]
                found += inner or [_Leaf(operand, dim)]
            return found if len(found) > 1 else None
        if read is not None or name == "stack":
            axis = read[1] if read is not None else argument(node, 1, "dim", default=0) % len(shape(node))
            inside = dim - (1 if read is None and axis < dim else 0)
            return None if axis == dim else self._all(node, argument(node, 0, "tensors"), inside, dim,
                                                      lambda parts: (list(parts), axis))
        if not node.args or not isinstance(node.args[0], Node):
            return None
        source, rest = node.args[0], node.args[1:]
        rank = len(shape(source) or ())
        if name in _SWAPS:
            a, b = ([*rest, *node.kwargs.values()][i] % rank for i in (0, 1))
            return self._one(node, source, {a: b, b: a}.get(dim, dim), dim)
        if name == "permute":
            order = rest[0] if rest and isinstance(rest[0], (tuple, list)) else rest
            return self._one(node, source, order[dim] % rank, dim) if order else None
        if name == "movedim":
            moved, to = ([*rest, *node.kwargs.values()][i] for i in (0, 1))
            order = [d for d in range(rank) if d != moved % rank] if isinstance(moved, int) and isinstance(to, int) else None
            if order is None:
                return None
            order.insert(to % rank, moved % rank)
            return self._one(node, source, order[dim], dim)
        if name == "unsqueeze":
            axis = rest[0] % (rank + 1)
            return None if axis == dim else self._one(node, source, dim - (axis < dim), dim)
        if name in ("view", "reshape", "unflatten", "flatten"):
            return self._reshaped(node, source, dim)
        if node.target is operator.getitem:
            return self._item(node, source, rest[0], dim)
        if name in _POINTWISE:
            return self._pointwise(node, dim)
        return None

    def _one(self, node: Node, source: Node, inside: int, dim: int):
        return self._all(node, [source], inside, dim, lambda parts: (parts[0], *node.args[1:]))

    def _all(self, node: Node, sources, inside: int, dim: int, args):
        """Segments of a node all of whose ``sources`` are cut alike."""
        cut = [self.pieces(s, inside) if isinstance(s, Node) else None for s in sources]
        if None in cut or any(not _alike(cut[0], c) for c in cut[1:]):
            return None
        return [_Made(node, dim, [c[i] for c in cut], args, cut[0][i].length) for i in range(len(cut[0]))]

    def _reshaped(self, node: Node, source: Node, dim: int):
        before, after = shape(source), shape(node)
        ahead = math.prod(d for d in after[:dim])
        inside = next((i for i, d in enumerate(before) if known(d == after[dim]) and known(math.prod(before[:i]) == ahead)), None)
        if inside is None or not all(isinstance(d, int) for i, d in enumerate(after) if i != dim):
            return None
        sizes = [-1 if i == dim else d for i, d in enumerate(after)]
        return self._all(node, [source], inside, dim, lambda parts: ("reshape", parts[0], *sizes))

    def _item(self, node: Node, source: Node, index, dim: int):
        if isinstance(index, int) and name_of(source) in _PARTS and isinstance(source.args[0], Node):  # an item of a tuple
            rank = len(shape(source.args[0]))
            axis = argument(source, 2, "dim", default=0) if name_of(source) != "unbind" else argument(source, 1, "dim", default=0)
            axis %= rank
            gone = name_of(source) == "unbind"
            inside = dim + (gone and axis <= dim)
            if axis == inside:
                return None
            cut = self.pieces(source.args[0], inside)
            return cut and [_Made(node, dim, [c], lambda parts: ("item", source, parts[0], index), c.length) for c in cut]
        index = index if isinstance(index, tuple) else (index,)
        rank = len(shape(source) or ())
        if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice))) for i in index):
            return None
        taken = sum(i is not None and i is not Ellipsis for i in index)
        full: list = []
        for i in index:
            full += [slice(None)] * (rank - taken) if i is Ellipsis else [i]
        full += [slice(None)] * (rank - sum(i is not None for i in full))
        inside, out = 0, 0
        for i in full:
            if i is None:
                out += 1
                continue
            if not isinstance(i, int):
                if out == dim:
                    return self._one(node, source, inside, dim) if i == slice(None) else None
                out += 1
            inside += 1
        return None

    def _pointwise(self, node: Node, dim: int):
        from_right, total = len(shape(node)) - dim, shape(node)[dim]
        if name_of(node) in ("view_as_real", "view_as_complex"):
            return self._one(node, node.args[0], dim, dim) if dim < len(shape(node.args[0])) - 1 or name_of(node) == "view_as_real" else None
        held = {a: len(shape(a)) - from_right for a in node.all_input_nodes if shape(a) is not None and len(shape(a)) >= from_right}
        long = {a: d for a, d in held.items() if not known(shape(a)[d] == 1)}
        if any(not known(shape(a)[d] == total) for a, d in long.items()) or any(isinstance(v, Node) for v in node.kwargs.values()):
            return None
        cut = {a: self.pieces(a, d) for a, d in long.items()}
        given = [c for c in cut.values() if c]
        if not given or any(not _alike(given[0], c) for c in given[1:]):
            return None
        self.tables += [a for a in long if not cut[a]]
        lengths, found = [p.length for p in given[0]], []
        for i in range(len(lengths)):
            parts = [cut[a][i] if cut[a] else _Slice(a, long[a], given[0], i) for a in long]
            names = list(long)

            def args(made, names=names):
                own = dict(zip(names, made))
                return tuple(own.get(a, a) if isinstance(a, Node) else a for a in node.args)

            found.append(_Made(node, dim, parts, args, lengths[i]))
        return found

    def build(self, recipes) -> list[Node]:
        made: dict = {}
        return [r.build(self, made) for r in recipes]


class _Leaf:
    def __init__(self, node: Node, dim: int) -> None:
        self.node, self.dim, self.length = node, dim, shape(node)[dim]

    def build(self, cut: _Cut, made: dict) -> Node:
        return self.node

    def size(self, cut: _Cut, made: dict):
        return self.length if isinstance(self.length, int) else emit(cut.like, "call_method", "size", (self.node, self.dim))


class _Slice:
    """The part of a table that belongs to segment ``i`` of ``segments``."""

    def __init__(self, node: Node, dim: int, segments: list, i: int) -> None:
        self.node, self.dim, self.segments, self.i, self.length = node, dim, segments, i, segments[i].length

    def build(self, cut: _Cut, made: dict) -> Node:
        key = self.node, self.dim, self.i
        if key not in made:
            start = 0
            for s in self.segments[: self.i]:
                size = s.size(cut, made)
                both = isinstance(start, int) and isinstance(size, int)
                start = start + size if both else emit(cut.like, "call_function", operator.add, (start, size))
            made[key] = emit(cut.like, "call_function", torch.narrow, (self.node, self.dim, start, self.segments[self.i].size(cut, made)))
        return made[key]


class _Made:
    """A segment that is made from its operands' segments as ``node`` is made from its operands."""

    def __init__(self, node: Node, dim: int, parts: list, args, length) -> None:
        self.node, self.dim, self.parts, self.args, self.length = node, dim, parts, args, length

    def build(self, cut: _Cut, made: dict) -> Node:
        if self not in made:
            args = self.args([p.build(cut, made) for p in self.parts])
            if args and args[0] == "reshape":
                made[self] = emit(cut.like, "call_method", "reshape", args[1:])
            elif args and args[0] == "item":
                _, source, part, index = args
                key = source, part
                if key not in made:
                    made[key] = emit(cut.like, source.op, source.target, (part, *source.args[1:]), dict(source.kwargs))
                made[self] = emit(cut.like, "call_function", operator.getitem, (made[key], index))
            else:
                joins = cat_operands(self.node) is not None or name_of(self.node) == "stack"  # all that it is given is in args
                made[self] = emit(cut.like, self.node.op, self.node.target, args, {} if joins else dict(self.node.kwargs))
        return made[self]

    def size(self, cut: _Cut, made: dict):
        return self.length if isinstance(self.length, int) else emit(cut.like, "call_method", "size", (self.build(cut, made), self.dim))


def _one_source(nodes: list[Node]) -> bool:
    """Whether all segments come from one projection."""
    roots = [{a for a in ancestors([n], lambda n: calls(n, LINEAR)) if calls(a, LINEAR)} for n in nodes]
    return bool(roots[0]) and all(r == roots[0] for r in roots)


def _alike(one, other) -> bool:
    """Whether two tensors are cut at the same places."""
    return len(one) == len(other) and all(_same(a.length, b.length) for a, b in zip(one, other))


def _same(a, b) -> bool:
    """Whether two lengths are one. Dynamo gives the keys and the values of a cache a symbol each."""
    return known(a == b) or (not isinstance(a, int) and not isinstance(b, int) and hint(a) is not None and hint(a) == hint(b))
