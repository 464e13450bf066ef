"""One call of a model, folded from N copies of it: corresponding nodes, and operands that are shared or that differ.

Copies that one Python loop left in a graph are isomorphic with their operands in order, and where they end is known, so
that walking back from corresponding outputs in lockstep decides the isomorphism in linear time::

    cat_1(x0, p) -> ... linear(h1, w) -> v0        body: cat(X, p) -> ... linear(h, w) -> v
    cat_2(x1, p) -> ... linear(h2, w) -> v1        shared: p, w      varying: X = [x0, x1], T = [t0, t1]

The walk ends where all calls read the same node (shared), where they read nodes that do not correspond or that something
else reads too (varying), and goes no further than what a call computes for itself.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from .effects import RANDOM, WRITES, outside_writes, switches_mode, target, writers, writes_own
from .graph import Miss, ancestors, descendants, name_of, shape, source_line, value

Nodes = tuple[Node, ...]  # corresponding nodes, one a call
# Operators whose number may as well be a tensor without dimensions.
ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, torch.add, torch.sub, torch.mul,
              torch.div, torch.pow, "add", "sub", "mul", "div", "pow", "multiply", "divide", "subtract"}


@dataclasses.dataclass(frozen=True)
class Number:
    """A constant that differs from call to call: leaf ``leaf`` of the arguments of body node ``node``."""

    node: int
    leaf: int
    values: tuple[float, ...]


@dataclasses.dataclass
class Body:
    """nodes[k], outputs[k] and varying[k] hold one node a call; nodes are in graph order of the first call."""

    nodes: list[Nodes]
    outputs: list[Nodes]
    shared: list[Node]
    varying: list[Nodes]
    numbers: list[Number]

    @property
    def calls(self) -> int:
        return len(self.outputs[0])

    @property
    def writes(self) -> bool:
        """Whether a call writes into what is not its own, as into a cache of keys and values."""
        return any(outside_writes(n[0]) for n in self.nodes)

    def of(self, call: int) -> list[Node]:
        """The nodes of one call."""
        return [n[call] for n in self.nodes]


def leaves(node: Node) -> list:
    """A node's arguments, flattened in order: nodes, numbers, names."""
    found: list = []
    map_aggregate((node.args, node.kwargs), lambda leaf: found.append(leaf))
    return found


def find_body(calls: list[list[Node]], outputs: list[list[Node]]) -> Body | Miss:
    """Fold calls with these anchors and these outputs, or say where two of them differ."""
    inner = [set(anchors) | (descendants(anchors) & set(ancestors(out))) for anchors, out in zip(calls, outputs)]
    order = {n: i for i, n in enumerate(calls[0][0].graph.nodes)}
    kept = [[n for n in order if order[c[0]] < order[n] < order[c[-1]] and name_of(n) in WRITES and outside_writes(n)] for c in calls]
    if len({len(k) for k in kept}) > 1:
        return _miss(calls[0][0], "the calls write into their inputs a different number of times")
    walk = _Walk(list(zip(*outputs)), list(zip(*kept)), inner)
    while True:
        try:
            walk.run()
        except _Differs as found:
            return found.miss
        own = [{n[i] for n in walk.body} for i in range(len(calls))]
        # What something else reads too is an operand, or it would be computed twice (the state, a time of two branches).
        read = {nodes for nodes in walk.body if nodes not in walk.roots and nodes not in walk.kept and any(
            user not in own[i] for i, n in enumerate(nodes) for user in n.users)}
        if not read:
            break
        walk.stops |= read
    missing = next((a for anchors, mine in zip(calls, own) for a in anchors if a not in mine), None)
    if missing is not None:
        return _miss(missing, "a part of the model has no influence on what the call hands on")
    foreign = next((n[0] for n in walk.body if name_of(n[0]) in WRITES and n not in walk.kept and target(n[0]) not in own[0]), None)
    if foreign is not None:
        return _miss(foreign, f"the model writes in place into what the sampling loop made ({name_of(foreign)})")
    nodes = sorted(walk.body, key=lambda n: order[n[0]])
    numbers = [Number(k, leaf, values) for k, n in enumerate(nodes) for leaf, values in walk.numbers.get(n, [])]
    return Body(nodes, walk.roots, list(walk.shared), list(walk.varying), numbers)


def _miss(node: Node, reason: str) -> Miss:
    return Miss("shared steps", node.name, reason, source_line(node))


class _Differs(Exception):
    def __init__(self, node: Node, reason: str) -> None:
        self.miss = _miss(node, reason)


class _Walk:
    """One walk back from the roots and from writes into inputs (``kept``); ``stops``: tuples that are operands in any case."""

    def __init__(self, roots: list[Nodes], kept: list[Nodes], inner: list[set[Node]]) -> None:
        self.roots, self.kept, self.inner, self.stops = roots, kept, inner, set()

    def run(self) -> None:
        # Dictionaries for their order: operands are found in the same order in every run.
        self.body: dict[Nodes, None] = {}
        self.shared: dict[Node, None] = {}
        self.varying: dict[Nodes, None] = {}
        self.numbers: dict[Nodes, list[tuple[int, tuple]]] = {}
        self.written: set[Nodes] = set()
        todo = list(reversed([*self.roots, *self.kept]))
        while todo:
            nodes = todo.pop()
            if nodes in self.body or nodes in self.varying:
                continue
            if len(set(nodes)) == 1 or _same_attribute(nodes):
                self.shared[nodes[0]] = None
            elif self._enters(nodes):
                self.body[nodes] = None
                operands = zip(*([x for x in leaves(n) if isinstance(x, Node)] for n in nodes))
                todo += reversed(list(operands))
                todo += self._writers(nodes)
            else:
                self.varying[nodes] = None

    def _writers(self, nodes: Nodes) -> list[Nodes]:
        """What fills nodes of the body in place: nothing reads these writes, and they belong to the body all the same."""
        found = [writers(n) for n in nodes]
        if len({len(w) for w in found}) > 1:
            raise _Differs(nodes[0], f"the calls write into {name_of(nodes[0])} a different number of times")
        self.written |= set(zip(*found))
        return list(zip(*found))

    def _enters(self, nodes: Nodes) -> bool:
        """Whether nodes are part of the body; raises if they must be and cannot."""
        needed = nodes in self.written or nodes in self.kept or any(n in mine for n, mine in zip(nodes, self.inner))
        reason, numbers = _compare(nodes, kept=nodes in self.kept)
        if reason is None and numbers and not (needed and nodes[0].target in ARITHMETIC and all(
                isinstance(v, float) for _, values in numbers for v in values)):
            reason = f"the calls differ in a constant of {name_of(nodes[0])} ({numbers[0][1][0]}, {numbers[0][1][1]})"
        if reason is None and len(set(nodes)) < len(nodes):
            reason = "some of the calls share a value that others do not"
        if reason is not None and needed:
            raise _Differs(nodes[0], reason)
        if reason is not None or (nodes in self.stops and not needed):
            return False
        self.numbers[nodes] = numbers
        return True


def _compare(nodes: Nodes, kept: bool) -> tuple[str | None, list[tuple[int, tuple]]]:
    """Why nodes do not correspond (None if they do), and where numbers among their arguments differ."""
    first = nodes[0]
    if first.op not in ("call_function", "call_method"):
        return f"the calls read different inputs, {first.name} and {nodes[1].name}", []
    if name_of(first) in RANDOM or switches_mode(first) or name_of(first) in WRITES and not (kept or writes_own(first)):
        return f"{name_of(first)} has an effect", []
    for other in nodes[1:]:
        if (other.op, other.target) != (first.op, first.target) or _structure(other) != _structure(first):
            return f"the calls differ: {name_of(first)} in one, {name_of(other)} in another ({other.name})", []
        if str(shape(other)) != str(shape(first)) or _dtype(other) != _dtype(first):
            return f"the calls differ in the shape or dtype of {name_of(first)}", []
    numbers = []
    for i, values in enumerate(zip(*map(leaves, nodes))):
        if not isinstance(values[0], Node) and any(repr(v) != repr(values[0]) and not _identifier(first, v, values[0]) for v in values):
            if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
                return f"the calls differ in an argument of {name_of(first)} ({values[0]}, {values[1]})", []
            numbers.append((i, values))
    return None, numbers


def _structure(node: Node) -> str:
    mark = lambda leaf: "node" if isinstance(leaf, Node) else "leaf"
    return repr(map_aggregate((node.args, node.kwargs), mark))


def _dtype(node: Node):
    v = value(node)
    return v.dtype if isinstance(v, torch.Tensor) else type(v)


def _same_attribute(nodes: Nodes) -> bool:
    """Whether all are one attribute of the module, or regions that compute the same."""
    if any(n.op != "get_attr" for n in nodes):
        return False
    if len({n.target for n in nodes}) == 1:
        return True
    found = [getattr(n.graph.owning_module, n.target, None) for n in nodes]
    return all(isinstance(f, GraphModule) for f in found) and all(same_graph(found[0], f) for f in found[1:])


def same_graph(one: GraphModule, other: GraphModule) -> bool:
    """Whether two graphs are alike node by node, nested regions included."""
    pairs: dict[Node, Node] = {}
    if len(one.graph.nodes) != len(other.graph.nodes):
        return False
    for a, b in zip(one.graph.nodes, other.graph.nodes):
        if a.op != b.op or _structure(a) != _structure(b):
            return False
        if a.op == "get_attr":
            subs = getattr(one, a.target, None), getattr(other, b.target, None)
            if not all(isinstance(s, GraphModule) for s in subs) or not same_graph(*subs):
                return False
        elif a.op != "placeholder" and a.target != b.target:
            return False
        for x, y in zip(leaves(a), leaves(b)):
            alike = pairs.get(x) is y if isinstance(x, Node) else a.op == "placeholder" or _identifier(a, x, y) or repr(x) == repr(y)
            if not alike:
                return False
        pairs[a] = b
    return True


def _identifier(node: Node, x: object, y: object) -> bool:
    """Whether two different leaves are but the names that two calls of regions give their region."""
    from .graph import REGION

    return node.target is REGION and isinstance(x, str) and isinstance(y, str)
