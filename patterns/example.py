"""Patterns by example: a small function, traced, whose parameters are holes, is looked for in a graph.

::

    def example(q, k, v, scale=1.0):                          # tensors, and a number that may be any
        scores = torch.einsum("blhd,bmhd->bhlm", q, k) * scale
        return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)

Other constants must be as in the example. Wherever the graph or the example casts, copies or reshapes to the shape that
there is, the other need not: casts change precision only, as fused kernels do. Anything may stand behind a hole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Graph, Node

from .binding import bind
from .graph import name_of, shape, source_line

_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "_to_copy"}
_COPIES = {"contiguous", "clone", "detach", "alias"}
_MOVES = {"view", "reshape", "expand", "flatten", "unflatten"}
_SAME = {"multiply": "mul", "divide": "div", "truediv": "div", "subtract": "sub", "concat": "cat", "concatenate": "cat", "imul": "mul",
         "iadd": "add", "swapaxes": "transpose", "_softmax": "softmax"}
_DIMENSIONS = {"softmax", "cat", "transpose"}  # what follows their first operand
_COMMUTE = {"mul", "add"}
_PARAMETERS = {"softmax": ("input", "dim"), "cat": ("tensors", "dim"), "transpose": ("input", "dim0", "dim1"),
               "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")}


class Example:
    """A traced example. ``holes``: the names of its parameters; those with a default are numbers, the others tensors."""

    def __init__(self, function: Callable) -> None:
        self.function, self.graph = function, torch.fx.symbolic_trace(function).graph
        nodes = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.holes = {n.target: bool(n.args) for n in nodes}
        self.anchor = self.graph.output_node().args[0]
        if not isinstance(self.anchor, Node) or self.anchor.op == "placeholder":
            raise ValueError("an example must compute one value from its parameters")
        self.anchor = _past(self.anchor, self.graph)

    def match(self, node: Node) -> Match:
        """Try to read a node as the example's result; ``Match.found`` says whether it is."""
        match = Match()
        match.found = match.walk(self.anchor, node)
        missing = [h for h in self.holes if h not in match.bound]
        if match.found and missing:
            match.found, match.reason = False, f"nothing stands for {', '.join(missing)}"
        return match


class Match:
    """bound: hole -> node or number. nodes: covered, operands before users. reason, at: where the walk ended in a miss;
    depth: nodes that had the right name until then."""

    def __init__(self) -> None:
        self.found, self.bound, self.nodes, self.reason, self.at, self.depth = False, {}, [], "", None, 0

    def walk(self, mine, given) -> bool:
        """Whether ``given`` (of the graph) is what ``mine`` (of the example) says."""
        if isinstance(mine, Node) and mine.op == "placeholder":
            return self._bind(mine, given)
        if isinstance(mine, Node):
            return isinstance(given, Node) and self._node(mine, given)
        if isinstance(mine, (tuple, list)):
            return isinstance(given, (tuple, list)) and len(mine) == len(given) and all(map(self.walk, mine, given))
        if isinstance(mine, dict):
            return isinstance(given, dict) and mine.keys() == given.keys() and all(self.walk(mine[k], given[k]) for k in mine)
        return mine == given and not isinstance(given, Node)

    def _bind(self, hole: Node, given) -> bool:
        number = isinstance(given, (int, float)) and not isinstance(given, bool)
        if bool(hole.args) != number or not (number or isinstance(given, Node)):
            return self._miss(None, f"{hole.target} would be {given!r}")
        if hole.target in self.bound and self.bound[hole.target] is not given and self.bound[hole.target] != given:
            return self._miss(None, f"{hole.target} would be two things, {self.bound[hole.target]} and {given}")
        self.bound[hole.target] = given
        return True

    def _node(self, mine: Node, given: Node) -> bool:
        mine, skipped = _past(mine, mine.graph), []
        if mine.op == "placeholder":
            return self._bind(mine, given)
        while _name(given) != _name(mine) and _changes_nothing(given):
            skipped.append(given)
            given = given.args[0]
        if _name(given) != _name(mine) or not given.op.startswith("call"):
            return self._miss(given, f"{_name(given)} stands where the example has {_name(mine)}")
        self.depth += 1
        rank = len(shape(given) or ())
        (args, kwargs), (others, keywords) = _arguments(mine, rank), _arguments(given, rank)
        before = dict(self.bound), list(self.nodes)
        for order in _orders(others, _name(mine)):
            self.bound, self.nodes = dict(before[0]), list(before[1])
            if self.walk(args, order) and self.walk(kwargs, keywords):
                self.nodes += [given, *reversed(skipped)]
                return True
        return self._miss(given, f"{_name(given)} has other operands or constants than the example")

    def _miss(self, node: Node | None, reason: str) -> bool:
        if node is not None and self.at is None or not self.reason:  # the innermost comes first, and says most
            self.reason, self.at = self.reason or reason, node
        return False

    @property
    def where(self) -> str:
        return source_line(self.at) if self.at is not None else ""


def _name(node: Node) -> str:
    name = name_of(node)
    return _SAME.get(name, name)


def _orders(args, name: str):
    yield args
    if name in _COMMUTE and len(args) >= 2:
        yield (args[1], args[0], *args[2:])


def _arguments(node: Node, rank: int) -> tuple[tuple, dict]:
    """Operands by position as far as their names are known, the rest by name; dimensions counted from the front, of ``rank``."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten" or \
            isinstance(node.target, torch._ops.OpOverloadPacket):
        return (), bind(node)[0]
    names = _PARAMETERS.get(_name(node), ("input", "other"))
    args, kwargs = list(node.args), {k: v for k, v in node.kwargs.items() if v is not None and k != "_stacklevel"}
    kwargs = {("dim" if k == "axis" else k): v for k, v in kwargs.items()}
    while len(args) < len(names) and names[len(args)] in kwargs:
        args.append(kwargs.pop(names[len(args)]))
    if _name(node) in _DIMENSIONS and rank:
        args[1:] = [a % rank if isinstance(a, int) else a for a in args[1:]]
    if _name(node) == "einsum" and args and isinstance(args[0], str):
        args[0] = _canonical_equation(args[0])
    return tuple(args), kwargs


def _canonical_equation(equation: str) -> str:
    """Letters in order of appearance: "blhd,bmhd->bhlm" and "b i h d, b j h d -> b h i j" are one equation."""
    letters: dict[str, str] = {}
    plain = equation.replace(" ", "")
    return "".join(letters.setdefault(c, chr(ord("a") + len(letters))) if c.isalpha() else c for c in plain)


def _changes_nothing(node: Node) -> bool:
    """Whether a node is a cast, a copy, or a move to the shape that there is already."""
    if not node.op.startswith("call") or not node.args or not isinstance(node.args[0], Node):
        return False
    name = name_of(node)
    if name in _CASTS | _COPIES:
        return True
    mine, before = shape(node), shape(node.args[0])
    return name in _MOVES and mine is not None and before is not None and len(mine) == len(before) \
        and all(isinstance(a, int) and a == b for a, b in zip(mine, before))


def _past(node: Node, graph: Graph) -> Node:
    """The example's node behind casts and copies, which the graph need not have."""
    while name_of(node) in _CASTS | _COPIES and node.op.startswith("call"):
        node = node.args[0]
    return node
